"""Sparse training: zeros stay exact, numbers of connections are what was asked for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodel import data, optim, train, tree
from jaxmodel.errors import InputError
from jaxmodel.models import mlp

MODEL = mlp.model(mlp.Config(8, (16, 12), 3))
RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(96, 8)).astype(np.float32)
LABELS = ((ROWS[:, 0] > 0).astype(np.int32) + (ROWS[:, 1] > 0.5)).astype(np.int32)
STREAM = data.Stream({"features": ROWS, "labels": LABELS}, 16, 0)


def random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_zeros_stay_exact_in_a_run_that_is_resumed(tmp_path):
    """300 steps of AdamW with weight decay, with a stop in the middle of the schedule."""
    optimizer = optim.prune_gradually(
        optax.adamw(1e-2, weight_decay=0.1), 0.75, begin=20, end=100, every=10
    )
    config = train.TrainConfig(steps=300, save_every=50, log_every=50)
    whole, rows = train.fit(MODEL, STREAM, config, optimizer=optimizer)
    masks = tree.flatten(optim.kept(whole.opt_state).masks)
    leaves = tree.flatten(whole.params)
    assert set(masks) == {"blocks/0/dense", "blocks/1/dense"}  # the head stays
    for path, mask in masks.items():
        assert int(jnp.sum(mask)) == mask.size // 4
        assert int(jnp.sum(leaves[path] != 0)) == mask.size // 4
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]

    class Stop(Exception):
        pass

    def stop(row):
        if row["step"] >= 100:
            raise Stop

    with pytest.raises(Stop):
        train.fit(MODEL, STREAM, config, [stop], optimizer=optimizer, checkpoints=tmp_path / "c")
    again, _ = train.fit(MODEL, STREAM, config, optimizer=optimizer, checkpoints=tmp_path / "c")
    assert tree.fingerprint(again.params) == tree.fingerprint(whole.params)
    jax.tree.map(np.testing.assert_array_equal, again.opt_state, whole.opt_state)


WAVE = jnp.arange(32, dtype=jnp.float32)


def run(optimizer, params, grads, steps):
    """Return the state, the parameters and the number of kept weights after each update."""

    @jax.jit
    def all_of(params):
        def step(state, i):
            params, opt = state
            now = jax.tree.map(
                lambda g: g * jnp.cos(i + jnp.expand_dims(WAVE, range(g.ndim - 1))), grads
            )
            updates, opt = optimizer.update(now, opt, params)
            params = optax.apply_updates(params, updates)
            kept = jax.tree.map(lambda mask: jnp.sum(mask, (-2, -1)), opt.masks)
            full = jax.tree.map(lambda p: jnp.sum(p != 0, (-2, -1)), params)
            return (params, opt), (kept, full)

        start = params, optimizer.init(params)
        return jax.lax.scan(step, start, jnp.arange(steps, dtype=jnp.float32))

    (params, opt), (kept, full) = all_of(params)
    return params, opt, kept, full


SHAPES = {"blocks": {"0-1": {"w": (2, 8, 32)}}, "out": {"w": (4, 32)}}
IS_SHAPE = lambda node: isinstance(node, tuple)
PARAMS = jax.tree.map(lambda shape: random(1, *shape), SHAPES, is_leaf=IS_SHAPE)
GRADS = jax.tree.map(lambda shape: random(2, *shape), SHAPES, is_leaf=IS_SHAPE)


@pytest.mark.parametrize("by", ["magnitude", "movement"])
def test_the_schedule_is_that_of_zhu_and_gupta(by):
    rules = [("blocks/1/.*", 0.5), (".*", 0.75)]
    optimizer = optim.prune_gradually(optax.sgd(0.01), rules, begin=4, end=24, every=5, by=by)
    params = tree.split(PARAMS, {"blocks/0/w": 0, "blocks/1/w": 0, "out/w": 1})
    final, opt, kept, full = run(optimizer, params, GRADS, 40)
    for t in range(40):
        part = np.clip((t - (t - 4) % 5 - 4) / 20, 0, 1)
        for size, goal, found in (
            (256, 0.75, kept["blocks"]["0-1"]["w"][t, 0]),
            (256, 0.5, kept["blocks"]["0-1"]["w"][t, 1]),
            (128, 0.75, kept["out"]["w"][t]),
        ):
            want = size - np.round(size * goal * (1 - (1 - part) ** 3)) if t >= 4 else size
            assert abs(int(found) - want) <= 1, (t, size)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[3:], b[3:]), full, kept)
    assert int(opt.count) == 40 and bool(opt.movement) == (by == "movement")
    # how layers are stacked does not matter
    apart, alone, _, _ = run(optimizer, tree.unstack(params), tree.unstack(GRADS), 40)
    np.testing.assert_array_equal(
        alone.masks["blocks"]["1"]["w"], opt.masks["blocks"]["0-1"]["w"][1]
    )
    np.testing.assert_array_equal(apart["blocks"]["1"]["w"], final["blocks"]["0-1"]["w"][1])


def test_movement_prunes_what_moves_towards_zero():
    """By NumPy, of two updates."""
    w = np.asarray(PARAMS["out"]["w"])
    first, second = (np.asarray(random(seed, 4, 32)) for seed in (7, 8))
    optimizer = optim.prune_gradually(optax.sgd(0.1), 0.5, begin=1, end=1, by="movement")
    params = {"w": PARAMS["out"]["w"]}
    state = optimizer.init(params)
    for grad in (first, second):
        updates, state = optimizer.update({"w": jnp.asarray(grad)}, state, params)
        params = optax.apply_updates(params, updates)
    moved = -w * first - (w - np.float32(0.1) * first) * second
    keep = moved >= np.sort(moved, axis=None)[64]
    np.testing.assert_array_equal(state.masks["w"], keep)
    np.testing.assert_allclose(state.movement["w"], moved, rtol=1e-4, atol=1e-5)
    want = np.where(keep, w - np.float32(0.1) * (first + second), 0)
    np.testing.assert_allclose(params["w"], want, rtol=1e-5, atol=1e-6)


def test_what_movement_prunes_comes_back_with_the_value_it_had():
    """By NumPy, of a quadratic loss: each weight is drawn to a goal that changes in the middle."""
    w = np.asarray(PARAMS["out"]["w"])
    goals = np.where(np.arange(12)[:, None, None] < 4, 0.0, np.asarray(random(9, 4, 32)) + 3 * w)
    options = {"begin": 2, "end": 11, "every": 3, "by": "movement"}
    optimizer = optim.prune_gradually(optax.sgd(0.1), 0.5, **options)

    @jax.jit
    def all_of(params):
        def step(carry, goal):
            params, opt = carry
            updates, opt = optimizer.update({"w": params["w"] - goal}, opt, params)
            params = optax.apply_updates(params, updates)
            return (params, opt), (params["w"], opt.masks["w"])

        start = params, optimizer.init(params)
        return jax.lax.scan(step, start, jnp.asarray(goals, jnp.float32))[1]

    got, masks = map(np.asarray, all_of({"w": PARAMS["out"]["w"]}))
    value, mask, moved, back = w.astype(np.float64), np.ones(w.shape, bool), np.zeros(w.shape), 0
    for t, goal in enumerate(goals):
        grad = np.where(mask, value, 0) - goal
        moved -= value * grad
        new = mask
        if t in (2, 5, 8, 11):
            left = 128 - round(64 * (1 - (1 - (t - 2) / 9) ** 3))
            new = moved >= np.sort(moved, axis=None)[-left]
        back += np.sum(new & ~mask)
        value = np.where(mask & new, value - 0.1 * grad, value)
        mask = new
        np.testing.assert_array_equal(masks[t], mask)
        np.testing.assert_allclose(got[t], np.where(mask, value, 0), rtol=1e-4, atol=1e-6)
    assert back > 5


@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_rewiring_conserves_the_number_of_connections(grow):
    optimizer = optim.rewire(
        optax.adam(0.05), [("out/.*", 0.5), (".*", 0.875)], grow=grow, every=3, end=90
    )
    first = optimizer.init(PARAMS).masks
    params, opt, kept, _ = run(optimizer, PARAMS, GRADS, 120)
    assert np.all(np.asarray(kept["blocks"]["0-1"]["w"]) == 32)
    assert np.all(np.asarray(kept["out"]["w"]) == 64)
    for mask, leaf, before in zip(*map(jax.tree.leaves, (opt.masks, params, first)), strict=True):
        assert not np.any(np.asarray(leaf)[~np.asarray(mask)])
        assert 0.1 < np.mean(np.asarray(mask)[np.asarray(before)]) < 0.9  # some moved
    _, alone, _, _ = run(optimizer, tree.unstack(PARAMS), tree.unstack(GRADS), 120)
    np.testing.assert_array_equal(
        alone.masks["blocks"]["1"]["w"], opt.masks["blocks"]["0-1"]["w"][1]
    )


def test_rigl_grows_where_the_gradient_is_largest():
    """One change of the mask by NumPy: half of 16 of 32 connections at most, by the cosine."""
    optimizer = optim.rewire(optax.sgd(0.0), 0.5, every=1, end=4, drop=0.5)
    params = {"w": random(3, 4, 8)}
    state = optimizer.init(params)
    updates, state = optimizer.update({"w": random(4, 4, 8)}, state, params)
    params = optax.apply_updates(params, updates)
    old = np.asarray(state.masks["w"])
    w, g = np.asarray(params["w"]), np.asarray(random(5, 4, 8))
    _, state = optimizer.update({"w": jnp.asarray(g)}, state, params)
    moves = round(0.25 * (1 + np.cos(np.pi / 4)) * 16)
    size = np.where(old, abs(w), -1)
    stays = size >= np.sort(size, axis=None)[-(16 - moves)]
    wish = np.where(stays, -1, abs(g))
    want = stays | (wish >= np.sort(wish, axis=None)[-moves])
    np.testing.assert_array_equal(state.masks["w"], want)


def test_densities_are_those_of_erk():
    """Proportional to (out + in) / (out in), the total exact, full where it would be above 1."""
    shapes = {"a": (32, 64), "b": (16, 64), "c": (4, 4), "d": (128, 128)}
    params = {**{name: jnp.zeros(shape) for name, shape in shapes.items()}, "bias": jnp.zeros(4)}
    found = dict(optim.densities(params, 0.8))
    assert found.pop(".*") is None and set(found) == set(shapes)
    sizes = {name: np.prod(shape) for name, shape in shapes.items()}
    kept = {name: 1 - found[name] for name in shapes}
    total = sum(kept[name] * sizes[name] for name in shapes)
    np.testing.assert_allclose(total, 0.2 * sum(sizes.values()))
    raw = {name: sum(shape) / np.prod(shape) for name, shape in shapes.items()}
    assert kept["c"] == 1
    ratios = [kept[name] / raw[name] for name in "abd"]
    np.testing.assert_allclose(ratios, ratios[0])
    assert ratios[0] * raw["c"] > 1
    even = dict(optim.densities(params, 0.8, "uniform"))
    np.testing.assert_allclose([even[name] for name in shapes], 0.8)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: optim.rewire(optax.sgd(1.0), 1.0), "fractions: 1.0 given for 'w'; allowed: a num"),
        (lambda: optim.rewire(optax.sgd(1.0), [("b", 0.5), (".*", None)]), "plain matrices"),
        (
            lambda: optim.rewire(optax.sgd(1.0), 0.5, drop=2.0),
            "drop: 2.0 given; allowed: a number of",
        ),
        (lambda: optim.prune_gradually(optax.sgd(1.0), 0.5, begin=3, end=2), "end: 2"),
        (lambda: optim.kept({"w": jnp.ones(2)}), "no masks in it; allowed: of optim.keep"),
    ],
)
def test_what_is_refused(make, says):
    with pytest.raises(InputError, match=says):
        make().init({"w": jnp.ones((4, 4)), "b": jnp.ones(4)})
