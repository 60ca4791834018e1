"""Weights in 16 bits train as in 32: their masters move where they would not."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodel import checkpoint, data, distributed, losses, ops, optim, sharding, train, tree
from jaxmodel.models import mlp
from jaxmodel.optim.masters import Masters, with_masters
from jaxmodel.train.state import init_state
from jaxmodel.train.step import make_step

RANDOM = np.random.default_rng(1)
X = RANDOM.normal(size=(32, 6)).astype(np.float32)
STREAM = data.Stream({"features": X, "labels": (X[:, 0] > X[:, 1]).astype(np.int32)}, 32)
MODEL = mlp.model(mlp.Config(6, (16, 16), 2))


@functools.cache
def first():
    return jax.jit(MODEL.init)(jax.random.key(2))


def fall(dtype, **settings) -> tuple[float, train.TrainState]:
    config = train.TrainConfig(
        steps=150,
        warmup_steps=0,
        schedule="constant",
        log_every=149,
        **{"learning_rate": 1e-4, **settings},
    )
    start = tree.cast(first(), dtype)
    state, rows = train.fit(MODEL, STREAM, config, params=start, loss=losses.classification)
    assert {a.dtype for a in jax.tree.leaves(state.params)} == {jnp.dtype(dtype)}
    return rows[0]["loss"] - rows[-1]["loss"], state


fall_in_float32 = functools.cache(functools.partial(fall, "float32"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("optimizer", "rate"), [("adamw", 1e-4), ("adamw", 3e-5), ("sgd", 1e-3), ("lion", 3e-5)]
)
def test_the_loss_falls_as_in_float32(dtype, optimizer, rate):
    settings = {"optimizer": optimizer, "learning_rate": rate, "b2": 0.999}
    want, _ = fall_in_float32(**settings)
    got, _ = fall(dtype, **settings)
    assert want > 0 and got == pytest.approx(want, rel=0.08)


def test_a_weight_is_its_master_rounded():
    _, state = fall("bfloat16")
    assert isinstance(state.opt_state, Masters)
    masters = tree.flatten(state.opt_state.params)
    assert masters.keys() == tree.flatten(state.params).keys()
    for path, a in masters.items():
        assert a.dtype == jnp.float32
        np.testing.assert_array_equal(a.astype(jnp.bfloat16), tree.flatten(state.params)[path])


def test_nothing_is_added_for_float32_and_compressed_weights():
    optimizer = optax.adam(0.1)
    chex.assert_trees_all_equal_structs(
        init_state(first(), optimizer).opt_state, optimizer.init(first())
    )
    codes = optim.quantize_weights(first(), [(".*_bias", None), (".*", 8)])
    rules = [(".*", True)]
    assert not isinstance(init_state(codes, optimizer, rules).opt_state, Masters)
    some = {**first(), "head": first()["head"].astype(jnp.bfloat16)}
    assert list(tree.flatten(init_state(some, optimizer).opt_state.params)) == ["head"]


def test_a_weight_that_was_changed_meanwhile_is_its_own_master():
    optimizer = with_masters(optax.sgd(1.0))
    params = {"w": jnp.array([1.0, 2.0], jnp.bfloat16)}
    state = optimizer.init(params)
    params = {"w": jnp.array([0.0, 2.0], jnp.bfloat16)}  # pruned, say
    _, state = optimizer.update({"w": jnp.array([0.0, 2.0**-12], jnp.bfloat16)}, state, params)
    assert state.params["w"].tolist() == [0.0, 2.0 - 2.0**-12]


def test_a_step_that_is_left_out_leaves_them(tmp_path):
    guard = optim.Guard()
    optimizer = optax.adam(1e-3)
    params = tree.cast(first(), jnp.bfloat16)
    state = init_state(params, optimizer, guard=guard)
    step = jax.jit(make_step(MODEL, losses.classification, optimizer, guard=guard))
    batch = STREAM.batch(0)
    broken, metrics = step(state, {**batch, "features": batch["features"] * np.float32(np.nan)})
    assert metrics["bad"] == 1
    chex.assert_trees_all_equal((broken.params, broken.opt_state), (state.params, state.opt_state))


def test_they_are_restored(tmp_path):
    config = train.TrainConfig(steps=8, save_every=3, learning_rate=1e-4, warmup_steps=0)
    run = lambda place, stop=None: train.fit(
        MODEL,
        STREAM,
        config,
        params=tree.cast(first(), jnp.bfloat16),
        loss=losses.classification,
        checkpoints=tmp_path / place,
        supervisor=distributed.RunMonitor(stop=lambda i: i == stop),
    )
    whole, _ = run("a")
    run("b", 4)
    assert checkpoint.fingerprint(run("b")[0]) == checkpoint.fingerprint(whole)


def check_masters_lie_as_their_weights() -> None:
    config = mlp.Config(8, (16, 16), 8)
    model = mlp.model(config, ops.Policy(axes=ops.MESH_AXES))
    mesh = sharding.make_mesh("fsdp=4,tensor=2")
    x = RANDOM.normal(size=(32, 8)).astype(np.float32)
    stream = data.Stream({"features": x, "labels": np.argmax(x, 1).astype(np.int32)}, 32)
    start = tree.cast(jax.jit(model.init)(jax.random.key(0)), jnp.bfloat16)
    settings = train.TrainConfig(steps=20, learning_rate=1e-4, warmup_steps=0)
    state, _ = train.fit(
        model, stream, settings, params=start, mesh=mesh, loss=losses.classification
    )
    one, _ = train.fit(
        mlp.model(config), stream, settings, params=start, loss=losses.classification
    )
    for path, a in tree.flatten(state.opt_state.params).items():
        assert a.sharding.spec == tree.flatten(state.params)[path].sharding.spec
        np.testing.assert_allclose(a, tree.flatten(one.opt_state.params)[path], atol=2e-5)


def test_on_eight_devices(outcomes8):
    name = "check_masters_lie_as_their_weights"
    assert outcomes8(__file__, [name]) == {name: ""}
