"""Adapters change nothing at first, train alone on weights of any kind, and are merged as they are
computed; new heads.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import checkpoint, data, distributed, losses, ops, train, tree
from jaxmodel.adapt.adapters import ADAPTERS, LoRA, lora, merge_adapters
from jaxmodel.compress import Rtn
from jaxmodel.errors import InputError
from jaxmodel.leaves import Adapted, QTensor, Sparse, decode
from jaxmodel.models import gpt2

MODEL = gpt2.model(gpt2.SIZES["tiny"])
RULES = [("blocks/.*/(q|v|up)", LoRA(4, 12.0)), (".*", None)]
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 8)), jnp.int32)
STREAM = data.Stream(
    data.windows(np.random.default_rng(0).integers(0, 16, 1000), 17, stride=16), 8, seed=1
)
BASES = {
    "float": lambda w: w,
    "int4": Rtn(bits=4, group=32),
    "sparse": lambda w: Sparse.from_dense(w, jnp.abs(w) > 0.01),
}


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


def based(params, kind):
    return tree.map_leaves(
        lambda path, leaf: BASES[kind](leaf) if path.endswith(("/q", "/v", "/up")) else leaf, params
    )


def logits(model, params):
    return jax.jit(model.apply)(params, TOKENS).logits


def stirred(params):
    """Adapters that do something."""
    rng = np.random.default_rng(1)
    return tree.map_leaves(
        lambda path, a: (
            jnp.asarray(0.1 * rng.normal(size=a.shape), jnp.float32)
            if path.endswith("_lora/up")
            else a
        ),
        params,
    )


@pytest.mark.parametrize("kind", BASES)
def test_only_adapters_train_on_a_base_of_any_kind(kind, params):
    model, start = lora(MODEL, based(params, kind), RULES, jax.random.key(1))
    chex.assert_trees_all_equal(logits(model, start), logits(MODEL, based(params, kind)))
    config = train.TrainConfig(
        steps=12, learning_rate=1e-2, warmup_steps=1, log_every=1, trainable=ADAPTERS
    )
    state, history = train.fit(model, STREAM, config, params=start)
    assert history[-1]["loss"] < history[0]["loss"] - 0.05
    before = tree.flatten(start)
    after = tree.flatten(state.params)
    assert before.keys() == after.keys()
    for path in before:
        same = all(
            np.array_equal(a, b)
            for a, b in zip(*map(jax.tree.leaves, (before[path], after[path])), strict=True)
        )
        assert same != path.endswith(("_lora/down", "_lora/up")), path
    moments = {path for path in tree.flatten(state.opt_state[1][0].mu)}
    assert all("_lora/" in path for path in moments) and len(moments) == 6


def test_gradients_are_those_of_the_sum_written_out(params):
    model, start = lora(MODEL, params, RULES, jax.random.key(1))
    start = stirred(start)
    batch = jax.device_put(STREAM.batch(0))
    trains, frozen = tree.partition(start, ADAPTERS)

    def written_out(trains):
        whole = tree.flatten(tree.combine(trains, frozen))
        for path in [path for path in whole if f"{path}_lora/up" in whole]:
            down = whole[f"{path}_lora/down"]
            up = whole[f"{path}_lora/up"]
            whole[path] = whole[path] + 3.0 * jnp.einsum(
                "lor,lri->loi", up, down, precision="highest"
            )  # 12 / 4
        plain = tree.unflatten({path: leaf for path, leaf in whole.items() if "_lora" not in path})
        return losses.next_token(MODEL, plain, batch)[0]

    want = jax.jit(jax.value_and_grad(written_out))(trains)
    loss = lambda trains: losses.next_token(model, tree.combine(trains, frozen), batch)[0]
    got = jax.jit(jax.value_and_grad(loss))(trains)
    chex.assert_trees_all_close(got, want, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["float", "int4"])
def test_merged_is_what_is_computed_in_float32(kind, params):
    model, start = lora(MODEL, based(params, kind), RULES, jax.random.key(1))
    start = stirred(start)
    plain, how = merge_adapters(start)
    assert set(how.values()) == {"exact" if kind == "float" else "decoded"} and len(how) == 3
    assert tree.flatten(plain).keys() == tree.flatten(params).keys()
    leaves = tree.flatten(start)
    flat = tree.flatten(plain)
    for path in how:
        product = jnp.matmul(
            leaves[f"{path}_lora/up"], leaves[f"{path}_lora/down"], precision="highest"
        )
        np.testing.assert_array_equal(
            flat[path], jax.jit(lambda w, p: w + jnp.float32(3) * p)(decode(leaves[path]), product)
        )
    chex.assert_trees_all_close(logits(MODEL, plain), logits(model, start), rtol=1e-4, atol=1e-4)


def test_a_compressed_base_is_requantized_when_asked(params):
    _, start = lora(MODEL, based(params, "int4"), RULES, jax.random.key(1))
    plain, how = merge_adapters(stirred(start), Rtn(bits=4, group=32))
    leaf = plain["blocks"]["0-2"]["attn"]["q"]
    assert set(how.values()) == {"requantized"} and isinstance(leaf, QTensor) and leaf.bits == 4
    exact = merge_adapters(stirred(start))[0]["blocks"]["0-2"]["attn"]["q"]
    chex.assert_trees_all_equal(leaf, Rtn(bits=4, group=32)(exact))


def test_rules_may_tell_layers_apart_and_the_stack_does_not_matter(params):
    rules = [("blocks/1/.*/q", LoRA(2)), ("blocks/.*/q", LoRA(3)), (".*", None)]
    model, start = lora(MODEL, params, rules, jax.random.key(1))
    shapes = {
        path: leaf.shape
        for path, leaf in tree.flatten(start).items()
        if path.endswith("q_lora/down")
    }
    assert list(shapes.values()) == [(3, 32), (2, 32), (3, 32)]
    chex.assert_trees_all_close(logits(model, start), logits(MODEL, params), rtol=1e-4, atol=1e-5)
    whole = lora(MODEL, params, RULES, jax.random.key(1))[1]
    single = lora(MODEL, tree.unstack(params), RULES, jax.random.key(1))[1]
    chex.assert_trees_all_equal(tree.unstack(whole), single)


def test_the_wrapped_model_is_one_object_with_rules_for_adapters(params):
    model, start = lora(MODEL, params, RULES, jax.random.key(1))
    assert lora(MODEL, params, RULES, jax.random.key(2))[0] is model
    half = model.with_policy(ops.Policy(compute_dtype="bfloat16"))
    for one in (model, half):
        assert tree.assign(one.rules, start)["blocks/0/attn/q_lora/down"] == jax.P()
        assert one.apply(stirred(start), TOKENS).logits.shape == (2, 8, 256)


def test_an_embedding_may_have_an_adapter():
    rng = np.random.default_rng(0)
    table, down, up = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((9, 6), (2, 6), (9, 2))
    )
    leaf = Adapted(table, down, up, jnp.float32(0.5))
    ids = jnp.asarray([[1, 8, 3]], jnp.int32)
    np.testing.assert_allclose(
        ops.embed(leaf, ids), ops.embed(leaf.decode(), ids), rtol=1e-5, atol=1e-6
    )


def test_bad_rules_are_refused(params):
    with pytest.raises(
        InputError,
        match="given for 'embed' of shape .256, 32.; allowed: a LoRA for a matrix, or None",
    ):
        lora(MODEL, params, [("embed", 8), (".*", None)], jax.random.key(0))
    with pytest.raises(InputError, match="'norm/bias' of shape"):
        lora(MODEL, params, [("norm/bias", LoRA(2)), (".*", None)], jax.random.key(0))
    with pytest.raises(InputError, match="rank: 0 given"):
        LoRA(0)
    for alpha in (0, -1.0, float("nan")):
        with pytest.raises(InputError, match="alpha: "):
            LoRA(2, alpha)


def test_the_scale_is_alpha_over_the_rank_or_its_root():
    assert [
        LoRA(4).scale,
        LoRA(4, 6).scale,
        LoRA(4, 6, rslora=True).scale,
        LoRA(16, rslora=True).scale,
    ] == [2, 1.5, 3, 4]


def test_a_weight_gets_one_adapter_and_an_adapter_none(params):
    model, start = lora(MODEL, params, RULES, jax.random.key(1))
    with pytest.raises(
        InputError, match="'blocks/0-2/attn/q' has an adapter already; merge it first"
    ):
        lora(model, start, RULES, jax.random.key(2))
    again, more = lora(
        model, stirred(start), [("blocks/1/.*/k", LoRA(2)), (".*", None)], jax.random.key(2)
    )
    assert again is model
    assert sum(path.endswith("_lora/down") for path in tree.flatten(more)) == 3 * 3 + 1
    chex.assert_trees_all_close(
        logits(again, more), logits(model, stirred(start)), rtol=1e-5, atol=1e-5
    )


# ------------------------------------------------------------------------------------------ dropout


def dropping(rate=0.5, rules=".*/attn/q"):
    wanted = [(rules, LoRA(4, dropout=rate)), (".*", None)]
    model, start = lora(MODEL, jax.jit(MODEL.init)(jax.random.key(0)), wanted, jax.random.key(1))
    return model, stirred(start)


def test_dropout_is_on_the_adapters_input_alone():
    """By hand on one product: the base sees all of x, the adapter what is left of it, divided by
    what stays.
    """
    rng = np.random.default_rng(0)
    w, down, up = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((6, 8), (2, 8), (6, 2))
    )
    x = jnp.asarray(rng.normal(size=(3, 5, 8)), jnp.float32)
    leaf = Adapted(w, down, up, jnp.float32(0.5), jnp.float32(0.25), jax.random.key(7))
    kept = np.asarray(leaf.dropped(jnp.ones_like(x)), np.float64)
    assert set(np.unique(kept.round(4))) == {0.0, 1.3333} and 0.1 < (kept == 0).mean() < 0.4
    want = (
        np.asarray(x) @ np.asarray(w).T
        + 0.5 * (np.asarray(x) * kept) @ np.asarray(down).T @ np.asarray(up).T
    )
    np.testing.assert_allclose(ops.einsum("BTI,OI->BTO", x, leaf), want, rtol=1e-5, atol=1e-5)
    images = jnp.asarray(rng.normal(size=(2, 4, 4, 2)), jnp.float32)  # a kernel of 2 x 2, flattened
    kept = np.asarray(leaf.dropped(jnp.ones_like(images)))
    plain = lambda x, w: np.asarray(
        ops.conv(jnp.asarray(x), jnp.asarray(w), kernel=(2, 2)), np.float64
    )
    product = np.asarray(up) @ np.asarray(down)
    want = plain(images, w) + 0.5 * plain(np.asarray(images) * kept, product)
    np.testing.assert_allclose(ops.conv(images, leaf, kernel=(2, 2)), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(decode(leaf), decode(Adapted(w, down, up, jnp.float32(0.5))))


def test_dropout_is_a_function_of_the_step_and_of_training_alone():
    model, params = dropping()
    plain = tree.unflatten(
        {path: a for path, a in tree.flatten(params).items() if not path.endswith("/dropout")}
    )
    run = jax.jit(
        lambda params, key, train: model.apply(params, TOKENS, rng=key, train=train).logits,
        static_argnums=2,
    )
    one = jax.random.key(1)
    two = jax.random.key(2)
    np.testing.assert_array_equal(run(params, one, True), run(params, one, True))
    assert np.abs(run(params, one, True) - run(params, two, True)).max() > 1e-3
    np.testing.assert_array_equal(run(params, one, False), run(plain, one, False))
    np.testing.assert_allclose(
        run(params, one, True), run(tree.unstack(params), one, True), rtol=1e-4, atol=1e-5
    )


def test_a_run_with_dropout_repeats_and_goes_on(tmp_path):
    model, start = dropping(0.3, ".*/(q|up)")
    config = train.TrainConfig(
        steps=6, save_every=3, learning_rate=1e-2, trainable=ADAPTERS, gradient_accumulation_steps=2
    )
    whole, _ = train.fit(model, STREAM, config, params=start)
    stop = distributed.RunMonitor(stop=lambda i: i == 3)
    train.fit(model, STREAM, config, params=start, checkpoints=tmp_path, supervisor=stop)
    again, _ = train.fit(model, STREAM, config, params=start, checkpoints=tmp_path)
    assert checkpoint.fingerprint(again) == checkpoint.fingerprint(whole)
    rates = {path: a for path, a in tree.flatten(whole.params).items() if path.endswith("/dropout")}
    assert rates and all(
        bool(jnp.all(a == jnp.float32(0.3))) for a in rates.values()
    )  # a setting, which does not train


@pytest.mark.parametrize("rate", [-0.1, 1, float("nan")])
def test_a_dropout_that_is_none_is_refused(rate):
    with pytest.raises(InputError, match="dropout: .* given; allowed: at least 0 and below 1"):
        LoRA(4, dropout=rate)
