"""The laws of compression: every method, and ordered pairs of pruning and rounding.

Add a method's text to one of the tables; all laws hold for it then. A chain is compiled once here.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import compress, leaves
from jaxmodel.compress.draft import (
    Draft,
    _stored,
    draft_of,
    fake,
    open_leaf,
    run_chain,
    store,
)
from jaxmodel.compress.prune.masks import Pruning
from jaxmodel.errors import InputError
from jaxmodel.leaves.hadamard import largest_block

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

# of each way to make a weight: as it was, rounded, moved, drawn, and several of them
WAYS = ["wanda(0.5)", "nf4(group=16)", "gptq(3)", "binary(stochastic=True)", "rtn(4) | obs(0.5)"]

ADDING = ("gpt", "compensate", "obs", "turn")
"""What names of methods have that add up products over a row."""

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
    "turn() | gptq(4, group=8)",
    "turn(4) | wanda(0.5) | rtn(4)",
]


# made by NumPy: these files are imported by each process of tests


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


WEIGHT = random(0, LAYERS, OUT, IN) * np.exp(0.5 * random(1, 1, 1, IN))
INPUTS = random(2, LAYERS, 100, IN) @ random(3, LAYERS, IN, IN)
GRAM = np.einsum("lti,ltj->lij", INPUTS, INPUTS)
EDGES = 2.0 ** (-24 + 0.5 * np.arange(65))  # of the bins of `ops.probe`
STATS = {
    "gram": GRAM,
    "histogram": np.stack([np.histogram(abs(x), EDGES)[0] for x in INPUTS]).astype(np.float32),
    "square": np.diagonal(GRAM, axis1=1, axis2=2),
    "count": np.full(LAYERS, 100, np.float32),
    "gradient": random(4, LAYERS, OUT, IN),
    "fisher": random(5, LAYERS, OUT, IN) ** 2,
    "movement": random(6, LAYERS, OUT, IN),
}
KEYS = jax.random.split(jax.random.key(0), LAYERS)
ROUND_ALL = jax.jit(jax.vmap(lambda grid, weight: grid.round(weight)))


class Ran(NamedTuple):
    """What a chain makes of both layers, and what follows from it.

    Attributes:
      both: the drafts of both layers.
      leaf: what is stored of them.
      again: what is stored when that is opened.
      dense: what the drafts say it stands for.
      decoded: what it decodes to.
      faked: what `fake` makes of the second layer alone.
    """

    both: Draft
    leaf: Any
    again: Any
    dense: Any
    decoded: Any
    faked: Any


@functools.partial(jax.jit, static_argnums=0)
def drafts(chain, weight, stats, keys):
    """Return the drafts of both layers, and what `fake` makes of the second."""
    second, seen, key = jax.tree.map(lambda array: array[1], (weight, stats, keys))
    return draft_of(chain, weight, stats, keys), fake(chain, second, seen, key)


decoded = functools.partial(leaves.decode, dtype=jnp.float32)


def dense_of(both):
    return jax.vmap(lambda draft: draft.dense())(both)


@functools.partial(jax.jit, static_argnums=0)
def stored(most, both):
    """Store drafts whose rows keep so many weights, and what follows from it."""
    leaf = _stored(both, most)
    again = _stored(jax.vmap(open_leaf)(leaf), most)
    return leaf, again, dense_of(both), decoded(leaf)


@functools.cache
def ran(text):
    """Return what a chain makes of the weight, in two programs where it is not cut into blocks."""
    both, faked = drafts(compress.parse(text), WEIGHT, STATS, KEYS)
    if both.block is not None:
        leaf = store(both)
        again = store(jax.jit(jax.vmap(open_leaf))(leaf))
        rest = jax.jit(lambda both, leaf: (dense_of(both), decoded(leaf)))(both, leaf)
    else:
        most = None
        if both.keep is not None:
            most = both.kept or max(1, int(np.sum(both.keep, axis=-1).max()))
        leaf, again, *rest = stored(most, both)
    return Ran(both, leaf, again, *jax.device_get(rest), faked)


def test_every_method_is_in_a_chain():
    texts = " ".join((*CHAINS, *OTHER))
    assert {name for name in compress.methods() if f"{name}(" in texts} == set(compress.methods())


@pytest.mark.parametrize("text", CHAINS)
def test_what_is_stored_is_what_fake_makes_of_a_layer_alone(text):
    done = ran(text)
    done.leaf.check()
    if isinstance(done.leaf, leaves.Sparse):
        done.leaf.check_values()
    # what is added in another order may round a weight to its other neighbour
    off = np.abs(np.asarray(done.faked) - done.decoded[1]) > 1e-5
    assert np.mean(off) <= (0.01 if any(word in text for word in ADDING) else 0)
    np.testing.assert_array_equal(done.decoded, done.dense)


@pytest.mark.parametrize("text", ["sparsegpt(0.5)", "gptq(3)", "obs(0.5)"])
def test_where_much_is_added_fake_is_what_is_stored_of_that_layer(text):
    """Every weight of it."""
    second = {name: jnp.asarray(array[1]) for name, array in STATS.items()}
    leaf, _ = run_chain(compress.parse(text), jnp.asarray(WEIGHT[1]), second, KEYS[1])
    np.testing.assert_allclose(ran(text).faked, jax.jit(decoded)(leaf), atol=1e-5)


@pytest.mark.parametrize("text", WAYS)
def test_fake_has_the_gradient_of_the_identity(text):
    chain = compress.parse(text)
    total = lambda weight, stats, key: jnp.sum(fake(chain, weight, stats, key))
    stats = {name: array[1] for name, array in STATS.items()}
    gradient = jax.jit(jax.grad(total))(WEIGHT[1], stats, KEYS[1])
    np.testing.assert_array_equal(gradient, np.ones_like(gradient))


@pytest.mark.parametrize("text", CHAINS)
def test_what_is_stored_opens_to_the_same(text):
    chex.assert_trees_all_equal(ran(text).again, ran(text).leaf)


@pytest.mark.parametrize("pair", list(itertools.product(MASKS, GRIDS)), ids=" | ".join)
def test_zeros_survive_later_rounding(pair):
    first = ran(pair[0]).both.keep
    then = ran(" | ".join(pair)).both
    np.testing.assert_array_equal(then.keep, first)
    assert not np.any(np.asarray(then.weight)[~np.asarray(first)])


@pytest.mark.parametrize("pair", list(itertools.product(GRIDS, MASKS)), ids=" | ".join)
def test_values_on_a_grid_survive_later_pruning(pair):
    grid = ran(pair[0]).both.grid
    then = ran(" | ".join(pair)).both
    chex.assert_trees_all_equal(then.grid, grid)
    on_grid = ROUND_ALL(grid, then.weight)
    np.testing.assert_allclose(on_grid, then.weight, rtol=1e-6, atol=1e-7)


def test_compensation_lowers_the_error_of_the_output():
    def error(text):
        off = np.asarray(ran(text).both.weight) - WEIGHT
        return np.einsum("lod,lde,loe->l", off, STATS["gram"], off)

    assert np.all(error("gptq(4)") < 0.8 * error("rtn(4)"))
    assert np.all(error("wanda(0.5) | compensate()") < 0.8 * error("wanda(0.5)"))
    assert np.all(error("sparsegpt(0.5)") < 2 * error("wanda(0.5)"))  # of one block, it is greedy


def test_turn_keeps_the_product_and_stands_first():
    (turn,) = compress.parse("turn()")
    leaf = turn(WEIGHT)
    assert isinstance(leaf, leaves.Turned) and leaf.hadamard == largest_block(IN) > 1
    np.testing.assert_allclose(decoded(leaf), WEIGHT, atol=1e-5)
    assert turn(leaf) is leaf  # it is rotated already
    odd = WEIGHT[..., :7]
    assert turn(odd) is odd  # no Hadamard matrix divides it
    with pytest.raises(InputError, match=r"turn: the weights are pruned already; .* before"):
        compress.parse("turn()")[0](compress.parse("magnitude(0.5)")[0](WEIGHT))
    with pytest.raises(InputError, match="block is 6; allowed: a size of a Hadamard matrix"):
        compress.parse("turn(6)")


def test_strength_zero_is_the_identity():
    pruning = sorted(name for name, cls in compress.methods().items() if issubclass(cls, Pruning))
    assert len(pruning) >= 10
    for text in (*(f"{name}(0)" for name in pruning), "compensate()"):
        method = compress.parse(text)[0]
        assert method(WEIGHT, {name: jnp.asarray(array) for name, array in STATS.items()}) is WEIGHT
