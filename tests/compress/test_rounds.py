"""Budgets over leaves, rounds with statistics measured anew, whole units."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodel import compress, leaves, optim, tree
from jaxmodel.errors import InputError
from jaxmodel.models import mlp

MODEL = mlp.model(mlp.Config(8, (16, 12), 3))
RECIPE = [(".*/dense", "magnitude(0.5)"), (".*", ())]
RNG = np.random.default_rng(0)
BATCHES = [
    {
        "features": jnp.asarray(RNG.normal(size=(16, 8)), jnp.float32),
        "labels": jnp.asarray(RNG.integers(0, 3, 16), jnp.int32),
    }
    for _ in range(2)
]


@functools.cache
def start():
    """Return parameters; not made on import, which each process of tests does."""
    return jax.jit(MODEL.init)(jax.random.key(0))


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


TREE = {
    "blocks": {"0-1": {"w": random(1, 2, 8, 16), "v": 3 * random(2, 2, 4, 8)}},
    "out": {"w": random(3, 8, 8)},
}


def dense(params):
    return jax.device_get(tree.flatten(DECODE(params)))


DECODE = jax.jit(lambda params: tree.map_leaves(lambda _, leaf: leaves.decode(leaf), params))


@pytest.mark.parametrize("method", ["magnitude", "gradient", "gradient(prune='largest')"])
def test_a_global_budget_equals_a_sort(method):
    stats = {
        path: {"gradient": jnp.asarray(random(9, *leaf.shape))}
        for path, leaf in tree.flatten(TREE).items()
    }
    text = f"{method.rstrip(')')}{', ' if '(' in method else '('}fraction=0.7)"
    recipe = compress.budget([(".*", text)], TREE, stats=stats)
    pruned, _ = compress.apply(recipe, TREE, stats)
    assert list(pruned["blocks"]) == ["0-1"]  # one threshold: no segment is split
    before = dense(TREE)
    size = {
        path: abs(w) if method == "magnitude" else abs(np.asarray(stats[path]["gradient"]))
        for path, w in before.items()
    }
    size = {path: -s for path, s in size.items()} if "largest" in method else size
    every = np.sort(np.concatenate([s.ravel() for s in size.values()]))
    limit = every[round(0.7 * every.size)]
    for path, weight in dense(pruned).items():
        np.testing.assert_array_equal(weight, np.where(size[path] >= limit, before[path], 0))


def test_an_erk_budget_keeps_the_total():
    recipe = compress.budget([("out/w", ()), (".*", "magnitude(0.8) | rtn(8)")], TREE, "erk")
    texts = dict(recipe.texts())
    assert texts["out/w"] == "" and all("| rtn(" in text for path, text in texts.items() if text)
    pruned, _ = compress.apply(recipe, TREE)
    kept = {path: np.mean(weight != 0) for path, weight in dense(pruned).items()}
    sizes = {"blocks/0-1/w": 128, "blocks/0-1/v": 32}
    assert kept["out/w"] == 1
    ratio = [
        kept[path] / (sum(TREE["blocks"]["0-1"][path[-1]].shape[1:]) / n)
        for path, n in sizes.items()
    ]
    np.testing.assert_allclose(ratio[0], ratio[1], rtol=0.1)
    assert abs(sum(kept[path] * n for path, n in sizes.items()) - 0.2 * 160) <= 4


def test_what_a_budget_refuses():
    with pytest.raises(InputError, match="no chain begins with a method that prunes"):
        compress.budget([(".*", "rtn(4)")], TREE)
    with pytest.raises(InputError, match="a global budget allows methods with a score"):
        compress.budget([(".*", "magnitude(pattern=(2, 4))")], TREE)
    with pytest.raises(InputError, match=r"needs 'gradient' of 'blocks/0-1/w'; see observe"):
        compress.budget([(".*", "snip(0.5)")], TREE)


def test_rounds_of_a_threshold_end_when_no_weight_passes():
    """By hand: gradients anew in each round, of the weights that are left, with one threshold."""
    recipe = [(".*/dense", "gradient(threshold=0.02)"), (".*", ())]
    seen = []
    final, rounds = compress.prune_in_rounds(
        MODEL, start(), recipe, BATCHES, between=lambda params, done: seen.append(done) or params
    )
    assert len(rounds) >= 3 and rounds[-1].pruned == 0 and all(r.pruned for r in rounds[:-1])
    assert [done.number for done in seen] == list(range(1, len(rounds) + 1))
    params = start()
    for _ in rounds:
        stats = compress.observe_gradients(MODEL, params, BATCHES, ".*/dense")
        leaves_of = tree.flatten(params)
        for path, found in stats.items():
            stays = np.abs(found["gradient"]) >= 0.02
            leaves_of[path] = jnp.asarray(np.where(stays, leaves_of[path], np.float32(0)))
        params = tree.unflatten(leaves_of)
    want, got = dense(params), dense(final)
    for path, weight in want.items():
        np.testing.assert_array_equal(got[path] != 0, weight != 0)
    zeros = sum(int(np.sum(want[path] == 0)) for path in want if path.endswith("dense"))
    assert rounds[-1].zeros == zeros > rounds[0].zeros
    _, first = compress.prune_in_rounds(MODEL, start(), recipe, BATCHES, stop=lambda done: True)
    assert len(first) == 1


def test_layer_by_layer_measures_what_is_compressed_below():
    recipe = [(".*/dense", "wanda(0.5)"), (".*", ())]
    each = compress.bottom_up(recipe, MODEL, start())
    assert len(each) == 2
    got, rounds = compress.prune_in_rounds(MODEL, start(), each, BATCHES)
    assert [done.pruned for done in rounds] == [64, 96]
    params = start()
    for i in range(2):
        stats = compress.observe(MODEL, params, BATCHES, f"blocks/{i}/dense")
        own = [(f"blocks/{i}/dense", "wanda(0.5)"), (".*", ())]
        params, _ = compress.apply(own, params, stats)
    want = dense(params)
    for path, weight in dense(got).items():
        np.testing.assert_array_equal(weight, want[path])


def test_units_are_scored_by_all_that_holds_them():
    w = {path: np.asarray(leaf) for path, leaf in tree.flatten(start()).items()}
    scores = compress.prune.score_units(MODEL.axes, start())
    squares = (
        (w["blocks/0/dense"] ** 2).sum(1),
        w["blocks/0/dense_bias"] ** 2,
        (w["blocks/1/dense"] ** 2).sum(0),
    )
    first = sum(square / max(square.mean(), 1e-30) for square in squares)
    np.testing.assert_allclose(scores["F1"], first, rtol=1e-5)
    stats = compress.observe_gradients(MODEL, start(), BATCHES)
    g = {path: np.asarray(found["gradient"]) for path, found in stats.items()}
    both = (w["blocks/1/dense"] * g["blocks/1/dense"]).sum(1) + (w["head"] * g["head"]).sum(0)
    got = compress.prune.score_units(MODEL.axes, start(), by="gradient", stats=stats)["F2"]
    np.testing.assert_allclose(got, abs(both), rtol=1e-4, atol=1e-6)
    together = compress.prune.choose_units(
        {"a": jnp.array([5.0, 6, 7]), "b": jnp.array([1.0, 2])}, 0.4, True
    )
    assert together["a"].tolist() == [1, 2] and together["b"].tolist() == [1]
    with pytest.raises(InputError, match="letters: 'Z' given; allowed: some of F"):
        compress.prune.score_units(MODEL.axes, start(), "Z")


def test_what_training_moves_is_pruned_by_movement():
    """The statistic of `optim.prune_gradually` is one of the methods' own."""
    optimizer = optim.prune_gradually(optax.sgd(0.1), 0.0, begin=9, end=9, by="movement")
    w, g = jnp.asarray(random(1, 4, 8)), jnp.asarray(random(2, 4, 8))
    update = jax.jit(lambda w, g: optimizer.update({"w": g}, optimizer.init({"w": w}), {"w": w})[1])
    state = update(w, g)
    stats = {"w": {"movement": optim.kept(state).movement["w"]}}
    pruned, _ = compress.apply([("w", "movement(0.5)")], {"w": w}, stats)
    keep = np.argsort(np.argsort(-(np.asarray(w) * np.asarray(g)), axis=-1), axis=-1) >= 4
    np.testing.assert_array_equal(dense(pruned)["w"], np.where(keep, w, 0))
