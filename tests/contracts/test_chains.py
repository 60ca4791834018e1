"""The laws of compression: every method, and ordered pairs of pruning and rounding.

Add a method's text to one of the tables; all laws hold for it then. A chain is compiled once here.
"""

from __future__ import annotations

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import compress, leaves
from jaxmodel.compress.draft import draft_of, fake, open_leaf, opened, store
from jaxmodel.compress.prune.masks import Pruning
from jaxmodel.ops.probe import histogram

LAYERS = 2
OUT = 8
IN = 32
PRUNE = [
    "magnitude(0.5)",
    "magnitude(0.4, scope='leaf')",
    "magnitude(pattern=(2, 4))",
    "wanda(0.5)",
    "sparsegpt(0.5)",
    "sparsegpt(pattern=(2, 4), sweeps=1)",
    "random(0.5)",
    "magnitude(threshold=0.7)",
    "magnitude(0.5, block=(4, 8))",
    "magnitude(0.5, block=(1, 0))",
    "magnitude(0.25, scope='leaf', block=(0, 1))",
    "gradient(0.5)",
    "gradient(0.25, prune='largest', scope='leaf')",
    "snip(0.5)",
    "fisher(0.5)",
    "taylor(0.5)",
    "movement(0.5)",
    "obs(0.5)",
    "obs(0.5, scope='leaf')",
    "obs(pattern=(2, 4))",
]
ROUND = [
    "rtn(4)",
    "rtn(4, group=16, range='mse')",
    "rtn(3, symmetric=False)",
    "rtn(1)",
    "rtn(3, symmetric=False, range='hqq')",
    "rtn(4, group=16, range='gibbs(weighted=True)')",
    "nf4(group=16)",
    "inverse_transform(3)",
    "equalised(3, group=16)",
    "fp8('e5m2', group=16)",
    "truncate(4)",
    "stochastic(3, symmetric=False)",
    "ternary(group=10)",
    "binary(stochastic=True)",
    "rtn(4, group=16) | activations(percentile=99.0)",
    "gptq(4)",
    "gptq(3, group=16, act_order=False, sweeps=1)",
    "gptq(4, symmetric=False, range='percentile(99)')",
]
OTHER = ["compensate()"]
"""Methods that do nothing alone."""

# what pairs are made of: one of each way to choose a mask, and to choose and to use a grid
MASKS = ["magnitude(pattern=(2, 4))", "wanda(0.5)", "sparsegpt(0.5)"]
GRIDS = ["rtn(4, group=16, range='mse')", "gptq(3)"]
PAIRS = [
    " | ".join(pair)
    for pair in (*itertools.product(MASKS, GRIDS), *itertools.product(GRIDS, MASKS))
]
CHAINS = [
    *PRUNE,
    *ROUND,
    *PAIRS,
    "wanda(0.5) | rtn(4) | compensate(sweeps=1)",
    "magnitude(0.5, block=(4, 8)) | rtn(4)",
    "wanda(0.3) | obs(pattern=(2, 4))",
    "rtn(4) | obs(0.5)",
]


def random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


WEIGHT = random(0, LAYERS, OUT, IN) * jnp.exp(0.5 * random(1, 1, 1, IN))
INPUTS = random(2, LAYERS, 100, IN) @ random(3, LAYERS, IN, IN)
GRAM = jnp.einsum("lti,ltj->lij", INPUTS, INPUTS)
STATS = {
    "gram": GRAM,
    "histogram": jax.vmap(histogram)(INPUTS),
    "square": jnp.diagonal(GRAM, axis1=1, axis2=2),
    "count": jnp.full(LAYERS, 100.0),
    "gradient": random(4, LAYERS, OUT, IN),
    "fisher": random(5, LAYERS, OUT, IN) ** 2,
    "movement": random(6, LAYERS, OUT, IN),
}
KEYS = jax.random.split(jax.random.key(0), LAYERS)


@functools.cache
def ran(text):
    """Return the drafts of both layers, of the second alone, and what `fake` makes of it."""
    chain = compress.parse(text)

    @jax.jit
    def run():
        weight, stats, key = jax.tree.map(lambda array: array[1], (WEIGHT, STATS, KEYS))
        total = lambda weight: jnp.sum(fake(chain, weight, stats, key))
        return (
            draft_of(chain, WEIGHT, STATS, KEYS),
            opened(chain, weight, stats, key),
            fake(chain, weight, stats, key),
            jax.grad(total)(weight),
        )

    return run()


def decoded(leaf):
    return np.asarray(leaves.decode(leaf, jnp.float32))


def test_every_method_is_in_a_chain():
    texts = " ".join((*CHAINS, *OTHER))
    assert {name for name in compress.methods() if f"{name}(" in texts} == set(compress.methods())


@pytest.mark.parametrize("text", CHAINS)
def test_a_layer_alone_and_fake_are_what_is_stored(text):
    both, alone, faked, gradient = ran(text)
    leaf = store(both)
    leaf.check()
    if isinstance(leaf, leaves.Sparse):
        leaf.check_values()
    # what is added in another order may round a weight to its other neighbour
    off = np.abs(decoded(store(alone)) - decoded(leaf)[1]) > 1e-5
    assert np.mean(off) <= (0.01 if any(word in text for word in ("gpt", "comp", "obs")) else 0)
    np.testing.assert_array_equal(decoded(leaf), np.asarray(jax.vmap(lambda d: d.dense())(both)))
    np.testing.assert_allclose(faked, decoded(store(alone)), atol=1e-5)
    np.testing.assert_array_equal(gradient, np.ones_like(gradient))


@pytest.mark.parametrize("text", CHAINS)
def test_what_is_stored_opens_to_the_same(text):
    leaf = store(ran(text)[0])
    again = store(jax.vmap(open_leaf)(leaf))
    chex.assert_trees_all_equal(again, leaf)


@pytest.mark.parametrize("pair", list(itertools.product(MASKS, GRIDS)), ids=" | ".join)
def test_zeros_survive_later_rounding(pair):
    first = ran(pair[0])[0].keep
    then = ran(" | ".join(pair))[0]
    np.testing.assert_array_equal(then.keep, first)
    assert not np.any(np.asarray(then.weight)[~np.asarray(first)])


@pytest.mark.parametrize("pair", list(itertools.product(GRIDS, MASKS)), ids=" | ".join)
def test_values_on_a_grid_survive_later_pruning(pair):
    grid = ran(pair[0])[0].grid
    then = ran(" | ".join(pair))[0]
    chex.assert_trees_all_equal(then.grid, grid)
    on_grid = jax.vmap(lambda grid, weight: grid.round(weight))(grid, then.weight)
    np.testing.assert_allclose(on_grid, then.weight, rtol=1e-6, atol=1e-7)


def test_compensation_lowers_the_error_of_the_output():
    def error(text):
        off = ran(text)[0].weight - WEIGHT
        return np.asarray(jnp.einsum("lod,lde,loe->l", off, GRAM, off))

    assert np.all(error("gptq(4)") < 0.8 * error("rtn(4)"))
    assert np.all(error("wanda(0.5) | compensate()") < 0.8 * error("wanda(0.5)"))
    assert np.all(error("sparsegpt(0.5)") < 2 * error("wanda(0.5)"))  # of one block, it is greedy


def test_strength_zero_is_the_identity():
    pruning = sorted(name for name, cls in compress.methods().items() if issubclass(cls, Pruning))
    assert len(pruning) >= 10
    for text in (*(f"{name}(0)" for name in pruning), "compensate()"):
        method = compress.parse(text)[0]
        assert method(WEIGHT, STATS) is WEIGHT
