"""The laws that every architecture keeps. Families are discovered: a new file in jaxmodel/models is tested without a change."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmodel import ops, sharding, tree
from jaxmodel.layers import fuse, unfuse
from jaxmodel.leaves import QTensor, Sparse, decode
from jaxmodel.models import Output, families, wrap

B, T = 3, 8


@dataclasses.dataclass(frozen=True)
class Case:
    module: object
    model: object
    params: tree.Params
    tokens: jax.Array
    apply: object  # jitted
    traces: list


@pytest.fixture(scope="module", params=families())
def case(request) -> Case:
    """The tiny member of a family with parameters that are large everywhere, biases and norms too."""
    module = families()[request.param]
    model = module.model(module.SIZES["tiny"])
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.2, a.dtype), shapes)
    tokens = jnp.asarray(rng.integers(0, model.config.vocab, (B, T)), jnp.int32)
    traces = []

    @jax.jit
    def apply(params, inputs):
        traces.append(1)
        return model.apply(params, inputs).logits

    return Case(module, model, params, tokens, apply, traces)


def close(got: jax.Array, want: jax.Array, tolerance: float = 1e-4) -> None:
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


# ----------------------------------------------------------------------------------------------------------- the record


def test_config_is_frozen_and_equal_arguments_give_the_same_model(case):
    make, config = case.module.model, case.model.config
    assert isinstance(config, case.module.Config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.depth = 1
    again = dataclasses.replace(config)
    assert again is not config
    assert make(again) is case.model
    assert make(again, ops.Policy()) is make(again, ops.Policy())
    assert make(config, ops.Policy(compute="bfloat16")) is not case.model
    assert case.model.policy == ops.Policy()


def test_params_are_a_plain_dict_of_arrays(case):
    params = jax.jit(case.model.init)(jax.random.key(0))

    def check(node):
        if isinstance(node, dict):
            assert type(node) is dict
            assert all(isinstance(key, str) and "/" not in key for key in node)
            return [leaf for child in node.values() for leaf in check(child)]
        return [node]

    leaves = check(params)
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32 for leaf in leaves)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in leaves)
    assert tree.segments(params["blocks"]) == [tree.segment_key(range(case.model.config.depth))]
    assert jax.tree.structure(params) == jax.tree.structure(case.params)
    other = jax.jit(case.model.init)(jax.random.key(1))
    assert tree.fingerprint(params) == tree.fingerprint(jax.jit(case.model.init)(jax.random.key(0)))
    assert not np.array_equal(params["embed"], other["embed"])


@pytest.mark.parametrize("depth", [1, 2])
def test_any_depth(case, depth):
    model = case.module.model(dataclasses.replace(case.model.config, depth=depth))
    params = jax.eval_shape(model.init, jax.random.key(0))
    assert tree.depth(params["blocks"]) == depth
    assert jax.eval_shape(model.apply, params, case.tokens).logits.shape == (B, T, model.config.vocab)


def test_every_path_is_covered_by_the_rules_and_no_rule_is_dead(case):
    specs = tree.assign(case.module.RULES, case.params)
    assert case.model.rules is case.module.RULES
    for path, leaf in tree.flatten(case.params).items():
        shape = tree.layer_shape(path, leaf)
        for layer in tree.layer_paths(path):
            assert isinstance(specs[layer], P)
            assert len(specs[layer]) <= len(shape)
            if len(shape) == 2:  # a matrix is cut over both kinds of axes, so that a big one fits
                assert {name for entry in specs[layer] if entry for name in ((entry,) if isinstance(entry, str) else entry)}
    used = set(map(str, specs.values()))
    for name, config in case.module.SIZES.items():  # big members too, without their arrays
        shapes = jax.eval_shape(case.module.model(config).init, jax.random.key(0))
        assert set(map(str, tree.assign(case.module.RULES, shapes).values())) <= used, name


# ------------------------------------------------------------------------------------------------------------ functions


def test_apply_is_the_composition_of_its_parts(case):
    embed, block, head = case.model.parts

    @jax.jit
    def composed(params, tokens):
        x, context = embed(params, {"tokens": tokens})
        for layer in tree.unstack(params)["blocks"].values():
            x, cache, aux = block(layer, x, context)
            assert cache is None
            assert aux == {} or all(value.shape == () for value in aux.values())
        return head(params, x), x

    logits, x = composed(case.params, case.tokens)
    close(case.apply(case.params, case.tokens), logits)
    out = jax.jit(lambda p, t: case.model.hidden(p, t))(case.params, case.tokens)
    assert isinstance(out, Output)
    assert out.logits is None
    close(out.hidden, x)
    assert logits.dtype == jnp.float32
    assert np.abs(logits).max() > 0.5  # the tolerances above mean something


def test_inputs_are_tokens_or_a_dict(case):
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    ones = jnp.ones((B, T), jnp.int32)
    plain = case.apply(case.params, case.tokens)
    full = {"tokens": case.tokens, "positions": positions, "segments": ones, "mask": ones.astype(bool)}
    close(case.apply(case.params, {"tokens": case.tokens}), plain, 1e-6)
    close(case.apply(case.params, full), plain, 1e-5)


def test_the_future_has_no_influence(case):
    changed = case.tokens.at[:, T - 2].set((case.tokens[:, T - 2] + 1) % case.model.config.vocab)
    before, after = (case.apply(case.params, tokens) for tokens in (case.tokens, changed))
    np.testing.assert_array_equal(before[:, : T - 2], after[:, : T - 2])
    assert np.abs(before[:, T - 2 :] - after[:, T - 2 :]).max() > 1e-2


def test_packed_segments_equal_separate_documents(case):
    lengths = (3, 4)  # and a position of padding
    row = case.tokens[0]
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 0]], jnp.int32)
    positions = jnp.asarray([[0, 1, 2, 0, 1, 2, 3, 0]], jnp.int32)
    packed = case.apply(case.params, {"tokens": row[None], "segments": segments, "positions": positions})
    start = 0
    for length in lengths:
        document = jnp.zeros((1, T), jnp.int32).at[0, :length].set(row[start : start + length])
        close(packed[0, start : start + length], case.apply(case.params, document)[0, :length])
        start += length


def test_padding_on_the_right_does_not_change_real_positions(case):
    lengths = np.array([3, T, 5])
    mask = np.arange(T) < lengths[:, None]
    rows = [np.asarray(jnp.where(mask, case.tokens, fill)) for fill in (0, 7)]
    outs = [case.apply(case.params, {"tokens": jnp.asarray(row), "mask": jnp.asarray(mask)}) for row in rows]
    np.testing.assert_array_equal(np.asarray(outs[0])[mask], np.asarray(outs[1])[mask])
    close(np.asarray(outs[0])[mask], np.asarray(case.apply(case.params, case.tokens))[mask])


def test_the_second_call_traces_nothing(case):
    case.apply(case.params, case.tokens)
    before = len(case.traces)
    case.apply(jax.tree.map(lambda a: a + 1, case.params), case.tokens + 0)
    assert len(case.traces) == before

    model = case.module.model(dataclasses.replace(case.model.config))  # built anew from an equal config
    step = jax.jit(lambda model, p, t: model.apply(p, t).logits, static_argnums=0)
    step(case.model, case.params, case.tokens)
    step(model, case.params, case.tokens)
    assert step._cache_size() == 1


@pytest.mark.parametrize("policy", [{"compute": "bfloat16"}, {"compute": "bfloat16", "stream": "bfloat16"}])
def test_bfloat16_is_close_and_logits_stay_float32(case, policy):
    model = case.module.model(case.model.config, ops.Policy(**policy))
    logits = jax.jit(model.apply)(tree.cast(case.params, jnp.bfloat16), case.tokens).logits
    want = case.apply(case.params, case.tokens)
    assert logits.dtype == jnp.float32
    assert np.sqrt(np.mean((logits - want) ** 2)) < 0.05 * np.std(want)


# -------------------------------------------------------------------------------------------------- segments and leaves


def quantise(w: jax.Array, bits: int, group: int | None = None, **static) -> QTensor:
    grouped = np.asarray(w).reshape(*w.shape[:-1], -1, group or w.shape[-1])
    scale = np.abs(grouped).max(-1) / (2 ** (bits - 1) - 1)
    codes = np.round(grouped / scale[..., None]).astype(np.int32).reshape(w.shape)
    return QTensor.from_codes(jnp.asarray(codes), jnp.asarray(scale), bits=bits, group=group, **static)


def half(w: jax.Array) -> Sparse:
    size = np.abs(np.asarray(w))
    return Sparse.from_dense(w, jnp.asarray(size >= np.median(size, axis=-1, keepdims=True)))


KINDS = (lambda w: quantise(w, 8), lambda w: quantise(w, 4, group=16), half)


def mixed(case: Case) -> tree.Params:
    """Another kind of leaf in each layer and an int8 table."""

    def compress(path: str, leaf: jax.Array) -> object:
        keys = path.split("/")
        if leaf.ndim != 2 or "norm" in path:
            return leaf
        return KINDS[int(keys[1]) % len(KINDS)](leaf) if keys[0] == "blocks" else quantise(leaf, 8)

    return tree.map_leaves(compress, tree.unstack(case.params))


def test_segments_do_not_change_the_function(case):
    close(case.apply(tree.unstack(case.params), case.tokens), case.apply(case.params, case.tokens))


def test_mixed_compressed_layers_run_close_to_their_decoded_version(case):
    compressed = mixed(case)
    decoded = tree.map_leaves(lambda _, leaf: decode(leaf), compressed)
    want = case.apply(decoded, case.tokens)
    close(case.apply(compressed, case.tokens), want)
    assert np.abs(want - case.apply(case.params, case.tokens)).max() > 0.05  # they are compressed
    # in floating point arithmetic that is exact, what remains is the rounding of activations
    dynamic = jax.tree.map(
        lambda leaf: dataclasses.replace(leaf, activations="int8") if isinstance(leaf, QTensor) else leaf,
        compressed,
        is_leaf=lambda leaf: isinstance(leaf, QTensor),
    )
    error = np.asarray(case.apply(dynamic, case.tokens) - want)
    assert 0 < np.sqrt((error**2).mean()) < 0.1 * np.std(want)


def test_a_cache_with_mixed_layers(case):
    params = tree.stack(mixed(case))
    cache = case.model.init_cache(B, T)
    run = jax.jit(case.model.apply)
    first = run(params, case.tokens[:, : T - 1], cache)
    last = run(params, case.tokens[:, T - 1 :], first.cache)
    close(jnp.concatenate([first.logits, last.logits], axis=1), case.apply(params, case.tokens))


def test_fused_equals_unfused(case):
    fused = fuse(case.params)
    assert len(tree.flatten(fused)) < len(tree.flatten(case.params))
    close(case.apply(fused, case.tokens), case.apply(case.params, case.tokens), 1e-5)
    jax.tree.map(np.testing.assert_array_equal, unfuse(fused), case.params)
    compressed = mixed(case)
    close(case.apply(fuse(compressed), case.tokens), case.apply(compressed, case.tokens), 1e-5)


# ------------------------------------------------------------------------------------------------------------- training


def next_token_loss(model, params, tokens):
    logits = model.apply(params, tokens, train=True).logits[:, :-1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def test_the_loss_falls(case):
    optimizer = optax.adam(1e-2)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            loss, grads = jax.value_and_grad(lambda p: next_token_loss(case.model, p, case.tokens))(params)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, (params, optimizer.init(params)), None, 30)[1]

    losses = train(jax.jit(case.model.init)(jax.random.key(0)))
    assert losses[0] == pytest.approx(np.log(case.model.config.vocab), rel=0.05)  # a new model knows nothing
    assert losses[-1] < 0.5 * losses[0]


def test_gradients_reach_every_leaf(case):
    grads = jax.jit(jax.grad(lambda p: next_token_loss(case.model, p, case.tokens)))(case.params)
    for path, grad in tree.flatten(grads).items():
        if path.endswith("k_bias"):
            continue  # softmax does not see a shift of all scores
        assert np.abs(grad).max() > 1e-6, path


def test_one_step_lowers_on_an_abstract_mesh(case):
    """For a TPU pod that is not there: no device of it is needed before compilation."""
    mesh = AbstractMesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    model = case.module.model(case.model.config, ops.Policy("bfloat16", "bfloat16", remat="full", axes=ops.MESH_AXES))
    params, placed = sharding.shardings(model.rules, jax.eval_shape(model.init, jax.random.key(0)), mesh)
    optimizer = optax.adam(1e-3)
    state = jax.eval_shape(optimizer.init, params)

    def on(shapes, shardings):
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)

    def step(params, state, tokens):
        loss, grads = jax.value_and_grad(lambda p: next_token_loss(model, p, tokens))(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    tokens = jax.ShapeDtypeStruct((8, T), jnp.int32, sharding=NamedSharding(mesh, P("fsdp")))
    arguments = on(params, placed), on(state, sharding.inherit(state, placed, mesh)), tokens
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(step).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
    assert "num_partitions = 8" in text
    assert text.count("sharding_constraint") >= 4  # activations are placed too


def test_a_wrapped_model_is_wrapped_everywhere(case):
    """Also in what runs the parts on their own (losses, prefill, perplexity), and under another policy."""

    def quieter(parts):
        return parts._replace(embed=lambda *args: (lambda x, context: (0 * x, context))(*parts.embed(*args)))

    wrapped = wrap(case.model, quieter)
    other = wrapped.with_policy(ops.Policy(compute="bfloat16"))
    zeros, ones = jnp.zeros_like(case.tokens), jnp.ones_like(case.tokens)
    for model in (wrapped, other):
        for run in (model.apply, model.hidden):
            first, second = (run(case.params, tokens).hidden for tokens in (zeros, ones))
            np.testing.assert_array_equal(first, second)
    assert other.policy.compute == "bfloat16"
    with pytest.raises(ValueError, match="init=False"):
        dataclasses.replace(case.model, apply=lambda params, inputs: None)
