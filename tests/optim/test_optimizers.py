"""Optimisers by name are optax's; Adam with moments of 8 bits is Adam, on one device, on a mesh and
from a checkpoint.

This file runs itself in a process with eight simulated devices:
`JAX_NUM_CPU_DEVICES=8 python FILE`.
"""

from __future__ import annotations

import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodel import checkpoint, data, sharding, train, tree
from jaxmodel.errors import InputError
from jaxmodel.leaves import QTensor
from jaxmodel.losses import next_token
from jaxmodel.models import gpt2
from jaxmodel.optim import rounding
from jaxmodel.optim.optimizers import NAMES, Adam8State, optimizer, scale_by_adam8
from jaxmodel.train.state import init_state, state_shardings
from jaxmodel.train.step import make_step

MODEL = gpt2.model(gpt2.Config(256, 64, 2, 4, 16))
STREAM = data.Stream(
    data.windows(np.random.default_rng(0).integers(0, 16, 1000), 17, stride=16), 8, seed=1
)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


def run(chosen: optax.GradientTransformation, steps: int) -> tuple[train.TrainState, list[float]]:
    state = jax.jit(lambda key: init_state(MODEL.init(key), chosen))(jax.random.key(0))
    step = jax.jit(make_step(MODEL, next_token, chosen), donate_argnums=0)
    losses = []
    for i in range(steps):
        state, metrics = step(state, STREAM.batch(i))
        losses.append(float(metrics["loss"]))
    return state, losses


# ------------------------------------------------------------------------------------------ by name


def test_every_name_is_what_optax_makes():
    params = {
        "blocks": {"0-2": {"up": random(3, 160, 144), "up_bias": random(3, 160)}},
        "embed": random(130, 144),
    }
    grads = jax.tree.map(lambda a: 0.1 * jnp.cos(37 * a), params)
    matrices = lambda params: tree.map_leaves(lambda path, _: not path.endswith("bias"), params)
    muons = lambda params: {
        "blocks": {"0-2": {"up": optax.contrib.MuonDimensionNumbers(2, 1), "up_bias": None}},
        "embed": None,
    }
    decay = {"weight_decay": 0.1, "mask": matrices}
    add = optax.add_decayed_weights(0.1, matrices)
    want = {
        "adamw": optax.adamw(0.01, 0.9, 0.95, weight_decay=0.1, mask=matrices),
        "sgd": optax.chain(add, optax.sgd(0.01)),
        "lion": optax.lion(0.01, 0.9, 0.95, weight_decay=0.1, mask=matrices),
        "adafactor": optax.adafactor(0.01),
        "muon": optax.contrib.muon(
            0.01, adam_b2=0.95, consistent_rms=0.2, muon_weight_dimension_numbers=muons
        ),
    }
    assert {*want, "adamw8"} == set(NAMES)
    for name, by_optax in want.items():
        plain = name in ("adafactor", "muon", "sgd")
        ours = optimizer(
            name, 0.01, **({} if plain else decay), **({"b1": 0.0} if name == "sgd" else {})
        )
        if name == "sgd":
            by_optax = optax.sgd(0.01)
        results = []
        for each in (ours, by_optax):
            apart = (
                tree.unstack if name == "adafactor" else lambda params: params
            )  # it looks at leaves as a whole
            state = each.init(apart(params))
            updates = None
            for _ in range(3):
                updates, state = each.update(apart(grads), state, apart(params))
            results.append(tree.stack(updates))
        chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-7)


def test_decay_is_decoupled_and_masked():
    params = {"w": jnp.array([1.0, -2.0]), "norm": jnp.array([3.0])}
    mask = lambda params: {"w": True, "norm": False}
    for name in ("sgd", "lion", "adamw", "adamw8", "adafactor", "muon"):
        chosen = optimizer(name, 0.1, weight_decay=0.5, mask=mask)
        updates, _ = chosen.update(
            jax.tree.map(jnp.zeros_like, params), chosen.init(params), params
        )
        np.testing.assert_allclose(updates["w"], [-0.05, 0.1], rtol=1e-6)
        np.testing.assert_array_equal(updates["norm"], [0.0])


def test_muon_takes_each_layer_as_a_matrix_of_its_own():
    params = {"blocks": {"0-1": {"up": random(2, 16, 12)}}}
    chosen = optimizer("muon", 1.0)
    updates, _ = chosen.update(
        {"blocks": {"0-1": {"up": random(2, 16, 12, seed=1)}}}, chosen.init(params), params
    )
    singular = np.linalg.svd(np.asarray(updates["blocks"]["0-1"]["up"]), compute_uv=False)
    assert (
        singular.shape == (2, 12) and singular.max() / singular.min() < 2.5
    )  # random matrices: about 10


def test_unknown_names_are_refused():
    with pytest.raises(
        InputError,
        match="optimizer: 'adam' is not known; allowed: adafactor, adamw, adamw8, lion, muon, sgd",
    ):
        optimizer("adam", 0.1)
    with pytest.raises(InputError, match="group: 0 given"):
        scale_by_adam8(group=0)


# ----------------------------------------------------------------------------------- Adam in 8 bits


def test_small_and_odd_leaves_have_moments_in_float32():
    params = {
        "big": jnp.ones((64, 64)),
        "small": jnp.ones((63, 64)),
        "odd": jnp.ones((100, 65)),
        "vector": jnp.ones(8192),
    }
    state = scale_by_adam8().init(params)
    for moments, dtype in ((state.mu, jnp.int8), (state.nu, jnp.uint8)):
        kinds = {name: type(leaf) for name, leaf in moments.items()}
        assert kinds.pop("big") is QTensor and moments["big"].packed.dtype == dtype
        assert all(leaf.dtype == jnp.float32 for name, leaf in moments.items() if name in kinds)
        moments["big"].check()
    assert tree.nbytes(state.mu["big"]) + tree.nbytes(state.nu["big"]) == 64 * 64 * 2 + 64 * 3 * 4


@pytest.mark.parametrize(("power", "signed"), [(2, True), (4, False)])
def test_moments_are_rounded_with_an_exact_mean(power, signed):
    x = random(4, 64) ** 3 * 10.0 ** jnp.arange(-3, 1, dtype=jnp.float32)[:, None]
    x = x if signed else x * x
    codes = jax.vmap(
        lambda key: rounding.straight(rounding.curved(x, 32, power, signed, key), power)
    )
    found = np.asarray(jax.jit(codes)(jax.random.split(jax.random.key(0), 2000)), np.float64)
    largest = np.abs(np.asarray(x)).reshape(4, 2, 32).max(-1, keepdims=True)
    root = np.abs(np.asarray(x)) ** (1 / power)
    grid = largest ** (1 / power) / (127 if signed else 255)
    step = (root + np.repeat(grid, 32, axis=-1).reshape(4, 64)) ** power - root**power
    allowed = (
        5 * found.std(axis=0) / 2000**0.5 + 10 * step / 2000
    )  # the latter for what is too rare to be seen
    assert np.all(np.abs(found.mean(axis=0) - np.asarray(x)) <= allowed + 1e-5 * np.abs(x))
    steps = np.abs(found - np.asarray(x)).max(0).reshape(4, 2, 32) / largest
    assert steps.max() <= power / (127 if signed else 255)  # a step of the grid at its coarse end
    tiny = np.abs(np.asarray(x)).reshape(4, 2, 32) < 1e-2 * largest
    assert tiny.any() and steps[tiny].max() < 3e-3


def test_a_slow_second_moment_still_moves():
    """With b2 = 0.999 a step moves it by less than any code: rounding to the nearest would leave it
    for ever.
    """
    params = {"w": jnp.zeros((64, 64))}
    slow = scale_by_adam8(b2=0.999)
    update = jax.jit(slow.update)
    grads = {"w": 1 + 0.1 * random(64, 64)}
    zeros = {"w": jnp.zeros((64, 64))}
    state = slow.init(params)
    for i in range(300):
        _, state = update(grads if i < 100 else zeros, state)
    got = np.asarray(rounding.straight(state.nu["w"], 4))
    want = np.asarray(grads["w"]) ** 2 * (1 - 0.999**100) * 0.999**200
    np.testing.assert_allclose(got.mean(), want.mean(), rtol=0.01)
    assert np.abs(got / want - 1).mean() < 0.05


def test_updates_are_adams_and_never_larger_than_adams_can_be():
    params = {"w": jnp.zeros((2, 64, 128))}
    exact = optax.scale_by_adam(0.9, 0.95)
    ours = scale_by_adam8(0.9, 0.95)
    states = [exact.init(params), ours.init(params)]
    updates = [jax.jit(exact.update), jax.jit(ours.update)]
    for i in range(30):
        grads = {"w": random(2, 64, 128, seed=i) * jnp.exp(3 * random(2, 64, 1, seed=99))}
        (want, states[0]), (got, states[1]) = (
            update(grads, state) for update, state in zip(updates, states, strict=True)
        )
    error = np.asarray(got["w"] - want["w"])
    assert (
        np.sqrt((error**2).mean()) < 0.02
        and np.corrcoef(got["w"].ravel(), want["w"].ravel())[0, 1] > 0.998
    )
    wild = {"w": random(2, 64, 128, seed=5) * jnp.exp(8 * random(2, 64, 128, seed=6))}
    for _ in range(3):
        got, states[1] = updates[1](wild, states[1])
        assert float(jnp.abs(got["w"]).max()) <= 0.1 / (0.05 * (1 - 0.81 / 0.95)) ** 0.5 + 1e-5


def test_the_loss_is_that_of_adam_in_float32():
    _, want = run(optax.adam(3e-3, b2=0.95), 60)
    state, got = run(optimizer("adamw8", 3e-3), 60)
    assert got[-1] < 0.65 * got[0]
    assert np.mean(got[-10:]) == pytest.approx(np.mean(want[-10:]), rel=0.01)
    moments = state.opt_state[0]
    assert isinstance(moments, Adam8State) and isinstance(
        moments.mu["blocks"]["0-1"]["attn"]["q"], QTensor
    )


def test_a_checkpoint_gives_it_back(tmp_path):
    chosen = optimizer("adamw8", 3e-3)
    state, _ = run(chosen, 2)
    like = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
    )
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        checkpoints.wait()
        back = checkpoints.restore(like)
    chex.assert_trees_all_equal(back, state)


def test_on_eight_devices(devices8):
    found = json.loads(devices8(Path(__file__)).splitlines()[-1])
    assert found["specs"] == [None, "tensor", "fsdp"]
    assert found["scales"] == [
        None,
        "tensor",
        None,
    ]  # a row of 128 is one block, which both devices share
    np.testing.assert_allclose(found["losses"], found["alone"], rtol=2e-3)


def _on_eight_devices() -> None:
    """Losses of three steps on a mesh and on one device, and where the moments of a stacked leaf
    lie.
    """
    model = gpt2.model(gpt2.Config(256, 128, 2, 4, 16))
    chosen = optimizer("adamw8", 3e-3)
    step = make_step(model, next_token, chosen)
    start = lambda key: init_state(model.init(key), chosen)
    mesh = sharding.make_mesh("fsdp=2,tensor=4")
    losses = []
    alone = jax.jit(start)(jax.random.key(0))
    with jax.set_mesh(mesh):
        where = state_shardings(jax.eval_shape(start, jax.random.key(0)), model.rules, mesh)
        state = jax.jit(start, out_shardings=where)(jax.random.key(0))
        moment = state.opt_state[0].nu["blocks"]["0-1"]["mlp"]["up"]
        run = jax.jit(step, donate_argnums=0, out_shardings=(where, None))
        for i in range(3):
            state, metrics = run(
                state, jax.device_put(STREAM.batch(i), jax.NamedSharding(mesh, jax.P("fsdp")))
            )
            losses.append(float(metrics["loss"]))
    single = jax.jit(step, donate_argnums=0)
    on_one = []
    for i in range(3):
        alone, metrics = single(alone, STREAM.batch(i))
        on_one.append(float(metrics["loss"]))
    specs = list(moment.packed.sharding.spec), list(moment.scale.sharding.spec)
    print(json.dumps({"losses": losses, "alone": on_one, "specs": specs[0], "scales": specs[1]}))


if __name__ == "__main__":
    _on_eight_devices()
