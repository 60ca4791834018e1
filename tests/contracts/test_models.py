"""The laws that every architecture keeps. Members are discovered (see conftest.py): a new file in models/ is tested as it is."""

from __future__ import annotations

import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmodel import axes, ops, sharding, tree
from jaxmodel.cli.inspect import COUNTS
from jaxmodel.layers import fuse, unfuse
from jaxmodel.leaves import QTensor, decode
from jaxmodel.models import Output, wrap


def close(got: jax.Array, want: jax.Array, tolerance: float = 1e-4) -> None:
    chex.assert_trees_all_close(got, want, rtol=tolerance, atol=tolerance, strict=True)


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
    params = case.init(jax.random.key(0))

    def check(node):
        if isinstance(node, dict):
            assert type(node) is dict
            assert all(isinstance(key, str) and "/" not in key for key in node)
            return [leaf for child in node.values() for leaf in check(child)]
        return [node]

    leaves = check(params)
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32 for leaf in leaves)
    chex.assert_tree_all_finite(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, case.params)
    if "blocks" in params:
        tree.segments(params["blocks"])  # whole, or it raises
    other = case.init(jax.random.key(1))
    assert tree.fingerprint(params) == tree.fingerprint(case.init(jax.random.key(0)))
    assert tree.fingerprint(params) != tree.fingerprint(other)


def test_every_leaf_has_axes_and_no_rule_is_dead(case):
    used = set()
    for name in sorted(case.module.SIZES, key=lambda name: not name.startswith("tiny")):
        shapes = case.shapes(name)  # of big ones too, without their arrays
        model = case.module.model(case.module.SIZES[name])
        assert set(axes.roles(model.axes, shapes).values()) <= set(axes.ROLES)
        specs = tree.assign(model.rules, shapes)
        for path, leaf in tree.flatten(shapes).items():
            shape = tree.layer_shape(path, leaf)
            for layer in tree.layer_paths(path):
                assert isinstance(specs[layer], P) and len(specs[layer]) <= len(shape), layer
                cut = {axis for entry in specs[layer] if entry for axis in ((entry,) if isinstance(entry, str) else entry)}
                assert cut or np.prod(shape) < 2**20, f"{name}: {layer} {shape} is cut over no axis, so a big one does not fit"
        if name.startswith("tiny"):
            used |= set(map(str, specs.values()))
        else:
            assert set(map(str, specs.values())) <= used, f"{name} has a leaf that no tiny member has"


def test_stored_counts_are_true(case):
    """If not: `python -c "from jaxmodel.cli import inspect; inspect.store_counts()"`. A size that is not stored is counted."""
    stored, family = json.loads(COUNTS.read_text()), case.name.split("/")[0]
    for name in case.module.SIZES:
        if (size := stored.get(f"{family}/{name}")) is not None:
            assert size["parameters"] == tree.count(case.shapes(name)), name


# ------------------------------------------------------------------------------------------------------------ functions


def test_apply_is_the_composition_of_its_parts(case):
    embed, block, head = case.model.parts

    @jax.jit
    def composed(params, inputs):
        x, context = embed(params, inputs)
        context.pop("aux", None)
        for i, layer in tree.unstack(params)["blocks"].items() if block is not None else ():
            x, cache, aux = block(layer, x, context, None, int(i))
            assert cache is None
            assert all(value.shape == () for value in aux.values())
        return head(params, x), x

    logits, x = composed(case.params, case.inputs)
    close(case.apply(case.params, case.inputs), logits)
    out = jax.jit(case.model.hidden)(case.params, case.inputs)
    assert isinstance(out, Output)
    assert out.logits is None
    close(out.hidden, x)
    assert logits.dtype == jnp.float32
    assert np.abs(logits).max() > 0.3  # the tolerances above mean something


def test_an_array_alone_is_the_one_input(case):
    if len(case.inputs) == 1:
        (only,) = case.inputs.values()
        close(case.apply(case.params, only), case.apply(case.params, case.inputs), 1e-6)
    else:
        with pytest.raises(ValueError, match=f"a dict of {', '.join(case.inputs)} is needed"):
            case.apply(case.params, next(iter(case.inputs.values())))


def test_the_second_call_traces_nothing(case):
    chex.clear_trace_counter()

    @functools.partial(jax.jit, static_argnums=0)
    @chex.assert_max_traces(n=1)
    def apply(model, params, inputs):
        return model.apply(params, inputs).logits

    apply(case.model, case.params, case.inputs)
    apply(case.model, jax.tree.map(lambda a: a + 1, case.params), case.inputs)
    model = case.module.model(dataclasses.replace(case.model.config))  # built anew from an equal config
    apply(model, case.params, case.inputs)
    with pytest.raises(AssertionError, match="traced > 1 times"):  # another model is another program, so this does count
        apply(case.model.with_policy(ops.Policy(remat="full")), case.params, case.inputs)


@pytest.mark.parametrize("policy", [{"compute": "bfloat16"}, {"compute": "bfloat16", "stream": "bfloat16"}])
def test_bfloat16_is_close_and_logits_stay_float32(case, policy):
    model = case.model.with_policy(ops.Policy(**policy))
    logits = jax.jit(model.apply)(tree.cast(case.params, jnp.bfloat16), case.inputs).logits
    want = case.apply(case.params, case.inputs)
    assert logits.dtype == jnp.float32
    assert np.sqrt(np.mean((logits - want) ** 2)) < 0.05 * np.std(want)


# -------------------------------------------------------------------------------------------------- segments and leaves


def test_segments_do_not_change_the_function(case):
    close(case.apply(tree.unstack(case.params), case.inputs), case.apply(case.params, case.inputs))


def test_mixed_compressed_layers_run_close_to_their_decoded_version(case):
    decoded = jax.jit(lambda params: tree.map_leaves(lambda _, leaf: decode(leaf), params))(case.mixed)
    want = case.apply(decoded, case.inputs)
    close(case.of_mixed, want)
    assert np.abs(want - case.apply(case.params, case.inputs)).max() > 0.05  # they are compressed
    # in floating point arithmetic that is exact, what remains is the rounding of activations
    dynamic = jax.tree.map(
        lambda leaf: dataclasses.replace(leaf, activations="int8") if isinstance(leaf, QTensor) else leaf,
        case.mixed,
        is_leaf=lambda leaf: isinstance(leaf, QTensor),
    )
    error = np.asarray(case.apply(dynamic, case.inputs) - want)
    assert 0 < np.sqrt((error**2).mean()) < 0.1 * np.std(want)


def test_fused_equals_unfused(case):
    fused = fuse(case.params)
    close(case.apply(fused, case.inputs), case.apply(case.params, case.inputs), 1e-5)
    chex.assert_trees_all_equal(unfuse(fused), case.params, strict=True)
    close(case.apply(fuse(case.mixed), case.inputs), case.of_mixed, 1e-5)


# ------------------------------------------------------------------------------------------------------------- training


def example_loss(model, params, inputs):
    """Cross entropy of some fixed classes, for whatever the last axis of the logits is."""
    logits = model.apply(params, inputs, rng=jax.random.key(0), train=True).logits
    classes = jnp.arange(logits[..., 0].size, dtype=jnp.int32).reshape(logits.shape[:-1]) % logits.shape[-1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, classes).mean()


def trains(path: str) -> bool:
    """Statistics are set, not trained; softmax does not see a shift of all scores: biases of keys, SigLIP's of its logits."""
    return not path.endswith(("/mean", "/variance", "k_bias")) and path != "bias"


def test_the_loss_falls(case):
    optimizer = optax.adam(1e-2)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            loss, grads = jax.value_and_grad(lambda p: example_loss(case.model, p, case.inputs))(params)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, (params, optimizer.init(params)), None, 40)[1]

    losses = train(case.init(jax.random.key(0)))
    assert np.all(np.isfinite(losses))
    assert losses[-1] < 0.6 * losses[0]


def test_gradients_reach_every_leaf(case):
    grads = jax.jit(jax.grad(lambda p: example_loss(case.model, p, case.inputs)))(case.params)
    for path, grad in tree.flatten(grads).items():
        assert np.abs(grad).max() > 1e-6 or not trains(path), path


def test_one_step_lowers_on_an_abstract_mesh(case):
    """For a TPU pod that is not there: no device of it is needed before compilation."""
    mesh = AbstractMesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    model = case.module.model(case.model.config, ops.Policy("bfloat16", "bfloat16", remat="full", axes=ops.MESH_AXES))
    params, placed = sharding.shardings(model.rules, jax.eval_shape(model.init, jax.random.key(0)), mesh)
    optimizer = optax.adam(1e-3)
    state = jax.eval_shape(optimizer.init, params)

    def on(shapes, shardings):
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)

    def step(params, state, inputs):
        loss, grads = jax.value_and_grad(lambda p: example_loss(model, p, inputs))(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    batch = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, P("fsdp"))), model.inputs(8, 8)
    )
    arguments = on(params, placed), on(state, sharding.inherit(state, placed, mesh)), batch
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(step).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
    assert "num_partitions = 8" in text
    assert text.count("sharding_constraint") >= 1  # activations are placed too


def test_a_wrapped_model_is_wrapped_everywhere(case):
    """Also in what runs the parts on their own (losses, prefill, perplexity), and under another policy."""

    def quieter(parts):
        return parts._replace(embed=lambda *args: (lambda x, context: (0 * x, context))(*parts.embed(*args)))

    wrapped = wrap(case.model, quieter)
    other = wrapped.with_policy(ops.Policy(compute="bfloat16"))
    assert other.policy.compute == "bfloat16"
    for model in (wrapped, other):

        @jax.jit
        def run(params, inputs, model=model):
            x, _ = model.parts.embed(params, inputs, None, None, False)
            return x, model.hidden(params, inputs).hidden, model.apply(params, inputs).logits

        x, hidden, logits = run(case.params, case.inputs)
        assert not np.any(x)
        assert hidden.shape == jax.eval_shape(case.model.hidden, case.params, case.inputs).hidden.shape
        assert np.abs(np.asarray(logits - case.apply(case.params, case.inputs))).max() > 1e-2
    with pytest.raises(ValueError, match="init=False"):
        dataclasses.replace(case.model, apply=lambda params, inputs: None)
