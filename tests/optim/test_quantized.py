"""Weights that are codes train: the gradient is exact, rounding has an exact mean, the loss is that
of float32, memory is not.
"""

from __future__ import annotations

import dataclasses
import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodel import checkpoint, data, ops, train, tree
from jaxmodel.compress import Rtn
from jaxmodel.errors import InputError
from jaxmodel.leaves import QTensor, Sparse, decode
from jaxmodel.losses import next_token
from jaxmodel.models import gpt2, llama
from jaxmodel.optim.optimizers import optimizer
from jaxmodel.optim.quantized import apply_updates, by_layer, dense, quantize_weights
from jaxmodel.optim.rounding import dither, moved, rounded
from jaxmodel.train.gradients import value_and_grad
from jaxmodel.train.state import init_state
from jaxmodel.train.step import make_step

CONFIG = gpt2.Config(256, 64, 2, 4, 16)
MODEL = gpt2.model(CONFIG)
RULES = [(".*(norm/.*|_bias)", None), (".*", 8)]
STREAM = data.Stream(
    data.windows(np.random.default_rng(0).integers(0, 16, 1000), 17, stride=16), 8, seed=1
)
ALL = [(".*", True)]


@pytest.fixture(scope="module")
def params():
    return quantize_weights(jax.jit(MODEL.init)(jax.random.key(0)), RULES)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


# ---------------------------------------------------------------------------------------- gradients


@pytest.fixture(scope="module")
def wanted(params):
    """The loss and the gradients of the decoded weights."""
    batch = jax.device_put(STREAM.batch(0))
    run = lambda params: next_token(MODEL, params, batch)
    return jax.jit(lambda params: jax.value_and_grad(run, has_aux=True)(dense(params)))(params)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_gradient_is_that_of_the_decoded_weights(remat, params, wanted):
    """Of a tied table too, which is looked up and multiplied with."""
    model = MODEL.with_policy(ops.Policy(remat=remat))
    batch = jax.device_put(STREAM.batch(0))
    run = lambda params: next_token(model, params, batch)
    got = jax.jit(value_and_grad(run, jnp.float32))(params)
    chex.assert_trees_all_close(got, wanted, rtol=1e-4, atol=1e-7)
    if remat != "none":
        return
    short = jax.jit(value_and_grad(run))(params)[1]
    assert (
        short["blocks"]["0-1"]["attn"]["q"].dtype == jnp.bfloat16
        and short["norm"]["bias"].dtype == jnp.float32
    )
    chex.assert_trees_all_close(
        jax.tree.map(lambda a: a.astype(jnp.float32), short), got[1], rtol=2e-2, atol=2e-4
    )


def test_the_gradient_of_experts_is_that_of_the_decoded_weights():
    config = next(c for c in llama.SIZES.values() if getattr(c, "experts", 0) and c.width <= 64)
    model = llama.model(config)
    start = jax.jit(model.init)(jax.random.key(0))
    params = tree.map_leaves(lambda _, leaf: rounded(leaf) if leaf.ndim == 4 else leaf, start)
    assert any(
        isinstance(leaf, QTensor) and leaf.ndim == 4 for leaf in tree.flatten(params).values()
    )
    batch = {name: a[:2] for name, a in jax.device_put(STREAM.batch(0)).items()}
    run = lambda params: next_token(model, params, batch)
    got = jax.jit(value_and_grad(run, jnp.float32))(params)
    want = jax.jit(jax.value_and_grad(run, has_aux=True))(dense(params))
    chex.assert_trees_all_close(got, want, rtol=1e-3, atol=1e-6)


def test_the_backward_pass_keeps_codes_and_not_what_they_stand_for():
    """Of frozen leaves too: without it, what is saved for the backward pass holds every layer's
    plain weight.
    """
    leaf = rounded(random(3, 32, 64))

    def loss(x, leaf):
        return jax.lax.scan(
            lambda x, w: (jnp.tanh(ops.einsum("BD,FD->BF", x, w)) @ jnp.ones((32, 64)), None),
            x,
            leaf,
        )[0].sum()

    kept = jax.tree.leaves(
        jax.eval_shape(lambda x: jax.vjp(lambda x: loss(x, leaf), x)[1], random(2, 64))
    )
    shapes = [(a.shape, a.dtype) for a in kept]
    assert not any(
        shape[-2:] == (32, 64) and dtype == jnp.float32 and len(shape) == 3
        for shape, dtype in shapes
    ), shapes


def test_micro_batches_give_the_same_gradient(params, wanted):
    step = make_step(MODEL, next_token, optax.sgd(1.0), trainable=ALL, accumulate=4)
    state = init_state(params, optax.sgd(1.0), ALL)
    found = jax.jit(step)(state, STREAM.batch(0))[1]
    (loss, _), gradients = wanted
    squares = sum(np.sum(np.asarray(leaf) ** 2) for leaf in jax.tree.leaves(gradients))
    np.testing.assert_allclose(found["grad_norm"], np.sqrt(squares), rtol=5e-3)
    np.testing.assert_allclose(found["loss"], loss, rtol=1e-5)


# ----------------------------------------------------------------------------------------- rounding


def test_dither_is_uniform_and_independent():
    key = jax.random.key(3)
    u = np.asarray(dither(key, (400, 500)), np.float64)
    counts = np.histogram(u, bins=64, range=(0, 1))[0]
    assert ((counts - u.size / 64) ** 2 / (u.size / 64)).sum() < 63 + 5 * (
        2 * 63
    ) ** 0.5  # chi-squared
    others = [
        np.roll(u, 1, 0),
        np.roll(u, 1, 1),
        np.asarray(dither(jax.random.fold_in(key, 1), (400, 500))),
    ]
    for other in others:
        assert abs(np.corrcoef(u.ravel(), other.ravel())[0, 1]) < 5 / u.size**0.5
    np.testing.assert_array_equal(u, dither(key, (400, 500)))


@pytest.mark.parametrize(
    "leaf",
    [
        rounded(random(4, 64), 32),
        rounded(random(2, 4, 32), bits=4),
        Rtn(bits=8)(random(4, 20)),
        Rtn(bits=3, group=8, scale_dtype="float32")(random(4, 20)),
        dataclasses.replace(Rtn(bits=8)(random(4, 24)), scale=jnp.full((1, 1), 0.02, jnp.float32)),
    ],
    ids=["groups", "stacked int4", "rows", "padded int3", "one scale"],
)
@pytest.mark.parametrize(
    "size", [1e-3, 2.0]
)  # of the update: within the old scales, and beyond them
def test_the_mean_of_a_moved_weight_is_exact(leaf, size):
    update = random(*leaf.shape, seed=7, scale=size)
    keys = jax.random.split(jax.random.key(0), 3000)
    found = np.asarray(
        jax.jit(jax.vmap(lambda key: moved(leaf, update, key).decode()))(keys), np.float64
    )
    want = np.asarray(decode(leaf) + update, np.float64)
    one = moved(leaf, update, keys[0])
    rare = (
        10 / len(keys) * float(jnp.max(one.scale))
    )  # what would be rounded the other way too seldom to be seen
    assert np.all(
        np.abs(found.mean(axis=0) - want) <= 5 * found.std(axis=0) / len(keys) ** 0.5 + rare
    )
    one.check()
    chex.assert_trees_all_equal_shapes_and_dtypes(one, leaf)


def test_scales_stay_while_they_fit_and_move_when_they_do_not():
    leaf = rounded(random(8, 64), 64)
    key = jax.random.key(0)
    still = moved(leaf, jnp.zeros((8, 64)), key)
    chex.assert_trees_all_equal(still, leaf)  # no update changes nothing, to the bit
    near = moved(leaf, random(8, 64, seed=1, scale=1e-3), key)
    np.testing.assert_array_equal(near.scale, leaf.scale)
    grown = moved(leaf, 3 * decode(leaf), key)
    shrunk = moved(leaf, -0.9 * decode(leaf), key)
    for other, factor in ((grown, 4.0), (shrunk, 0.1)):
        peak = np.abs(decode(leaf)).max(axis=-1, keepdims=True) * factor
        np.testing.assert_allclose(other.scale, 1.25 * peak / 127, rtol=1e-5)


def test_a_leaf_of_zeros_can_begin_to_move():
    leaf = rounded(jnp.zeros((4, 64)))
    update = random(4, 64, scale=1e-3)
    np.testing.assert_allclose(
        moved(leaf, update, jax.random.key(0)).decode(), update, atol=2 * 4e-3 / 127
    )


def test_layer_by_layer_is_each_layer():
    leaf = rounded(random(3, 4, 32))
    update = random(3, 4, 32, seed=2, scale=0.1)
    key = jax.random.key(5)
    (whole,) = by_layer("blocks/0-2/up", lambda *args: (moved(*args),), key, (leaf,), update)
    alone = lambda path, leaf, update: by_layer(
        path, lambda *args: (moved(*args),), key, (leaf,), update
    )[0]
    for i in range(3):  # the same codes, however layers are stacked
        one = alone(f"blocks/{i}/up", jax.tree.map(lambda a, i=i: a[i], leaf), update[i])
        chex.assert_trees_all_equal(jax.tree.map(lambda a, i=i: a[i], whole), one)
    (experts,) = by_layer(
        "blocks/3/up", lambda *args: (moved(*args),), key, (leaf,), update
    )  # whose first axis a mesh may cut
    chex.assert_trees_all_equal(
        experts, moved(leaf, update, jax.random.fold_in(key, zlib.crc32(b"blocks/3/up")))
    )


def test_plain_leaves_are_updated_as_optax_does(params):
    updates = jax.tree.map(lambda a: 0.01 * jnp.ones_like(a), dense(params))
    new = apply_updates(params, updates, jax.random.key(0))
    np.testing.assert_array_equal(
        new["norm"]["weight"], params["norm"]["weight"] + jnp.float32(0.01)
    )
    assert isinstance(new["embed"], QTensor)


# ----------------------------------------------------------------------------------------- training


def run(
    start: tree.Params, chosen: optax.GradientTransformation, steps: int
) -> tuple[train.TrainState, list[float]]:
    state = jax.jit(lambda params: init_state(params, chosen, ALL))(start)
    step = jax.jit(make_step(MODEL, next_token, chosen, trainable=ALL), donate_argnums=0)
    losses = []
    for i in range(steps):
        state, metrics = step(state, STREAM.batch(i))
        losses.append(float(metrics["loss"]))
    return state, losses


def test_the_loss_is_that_of_weights_in_float32(params):
    state, got = run(params, optimizer("adamw8", 3e-3, weight_decay=0.1), 60)
    _, want = run(
        jax.jit(MODEL.init)(jax.random.key(0)), optimizer("adamw", 3e-3, weight_decay=0.1), 60
    )
    assert got[-1] < 0.65 * got[0]
    assert np.mean(got[-10:]) == pytest.approx(np.mean(want[-10:]), rel=0.03)
    before = tree.flatten(params)
    after = tree.flatten(state.params)
    assert {path: type(leaf) for path, leaf in after.items()} == {
        path: type(leaf) for path, leaf in before.items()
    }
    held = sum(a.nbytes for a in jax.tree.leaves(state)) / tree.count(params)
    assert (
        held < 0.36 * 12
    )  # of float32 Adam; of wide models, where vectors hardly count, a quarter


def test_fit_trains_them_repeats_exactly_and_goes_on_from_a_checkpoint(params, tmp_path):
    config = train.TrainConfig(
        steps=4,
        learning_rate=3e-3,
        warmup_steps=1,
        log_every=1,
        trainable=ALL,
        ema_decay=0.9,
        save_every=2,
    )
    states = []
    for name in ("a", "b", "a"):
        with checkpoint.Checkpoints(
            tmp_path / name, at_most=2 if len(states) == 2 else None
        ) as checkpoints:
            given = {
                "params": params,
                "checkpoints": checkpoints,
                "optimizer": optimizer("adamw8", 3e-3),
            }
            states.append(train.fit(MODEL, STREAM, config, **given)[0])
    assert len({checkpoint.fingerprint(state) for state in states}) == 1
    assert isinstance(states[0].params["embed"], QTensor)
    average = train.averaged(states[0])["embed"]
    assert (
        isinstance(average, jax.Array)
        and 0 < float(jnp.abs(average - decode(states[0].params["embed"])).max()) < 0.1
    )


def test_a_program_needs_less_than_half_the_memory_of_adam():
    """At one row of tokens, where weights and not activations decide."""
    model = gpt2.model(dataclasses.replace(CONFIG, width=128, depth=12), ops.Policy(remat="full"))
    batch = {name: jax.ShapeDtypeStruct((1, 16), jnp.int32) for name in ("tokens", "targets")}

    def needed(kind: str, start, trainable) -> int:
        chosen = optimizer(kind, 1e-3)
        state = jax.eval_shape(
            lambda key: init_state(start(key), chosen, trainable), jax.random.key(0)
        )
        step = make_step(model, next_token, chosen, trainable=trainable)
        found = jax.jit(step, donate_argnums=0).lower(state, batch).compile().memory_analysis()
        given = found.argument_size_in_bytes
        out = found.output_size_in_bytes
        again = found.alias_size_in_bytes
        return given + found.temp_size_in_bytes + out - again

    ours = needed("adamw8", lambda key: quantize_weights(model.init(key), RULES), ALL)
    assert ours <= 0.45 * needed("adamw", model.init, None)


def test_what_cannot_be_trained_is_refused(params):
    update = jnp.zeros((4, 32))
    key = jax.random.key(0)
    with pytest.raises(
        InputError, match="trainable: an affine QTensor cannot be rounded stochastically"
    ):
        moved(Rtn(bits=4, group=32, symmetric=False)(random(4, 32)), update, key)
    with pytest.raises(
        InputError, match="trainable: a QTensor of 1 bit cannot be rounded stochastically"
    ):
        moved(Rtn(bits=1)(random(4, 32)), update, key)
    with pytest.raises(
        InputError,
        match="trainable: a Sparse leaf cannot be trained with rounding; allowed: arrays, QTensor",
    ):
        apply_updates({"w": Sparse.from_dense(random(4, 32))}, {"w": update}, key)
    with pytest.raises(InputError, match="bits: 9 given for 'embed'; allowed: 2 to 8, or None"):
        quantize_weights(dense(params), [("embed", 9), (".*", None)])
    with pytest.raises(
        InputError, match="the leaf 'norm/bias' of shape .64,. is not a plain matrix"
    ):
        quantize_weights(dense(params), [("norm/bias", 8), (".*", None)])
