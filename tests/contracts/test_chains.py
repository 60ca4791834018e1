"""The laws of compression: every method, and every ordered pair of pruning and rounding."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import compress, leaves
from jaxmodel.compress.apply import run_chain
from jaxmodel.compress.draft import fake, open_leaf, store

LAYERS = 2
OUT = 8
IN = 32
PRUNE = {
    "magnitude": "magnitude(0.5)",
    "magnitude 2:4": "magnitude(pattern=(2, 4))",
    "wanda": "wanda(0.5)",
    "sparsegpt": "sparsegpt(0.5)",
    "sparsegpt 2:4": "sparsegpt(pattern=(2, 4), sweeps=1)",
}
ROUND = {
    "rtn": "rtn(4)",
    "rtn groups": "rtn(4, group=16, search=2)",
    "gptq": "gptq(4)",
    "gptq groups": "gptq(3, group=16, act_order=False, sweeps=1)",
}
AFFINE = {"rtn affine": "rtn(3, symmetric=False)", "gptq affine": "gptq(4, symmetric=False)"}
SINGLE = {**PRUNE, **ROUND, **AFFINE}
PAIRS = [
    f"{first} | {second}"
    for first, second in (
        *itertools.product(PRUNE.values(), ROUND.values()),
        *itertools.product(ROUND.values(), PRUNE.values()),
    )
]


def random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


WEIGHT = random(0, LAYERS, OUT, IN) * jnp.exp(0.5 * random(1, 1, 1, IN))
INPUTS = random(2, LAYERS, 100, IN) @ random(3, LAYERS, IN, IN)
GRAM = jnp.einsum("lti,ltj->lij", INPUTS, INPUTS)
STATS = {
    "gram": GRAM,
    "square": jnp.diagonal(GRAM, axis1=1, axis2=2),
    "count": jnp.full(LAYERS, 100.0),
}
KEYS = jax.random.split(jax.random.key(0), LAYERS)


def run(text, weight=WEIGHT, stats=STATS, keys=KEYS):
    leaf = run_chain(compress.parse(text), weight, stats, keys)[0]
    leaf.check()
    return leaf


def layer(tree, i):
    return jax.tree.map(lambda array: array[i], tree)


def test_every_method_is_here():
    texts = " ".join(SINGLE.values())
    assert {name for name in compress.methods() if f"{name}(" in texts} == set(compress.methods())


@pytest.mark.parametrize("text", [*SINGLE.values(), *PAIRS])
def test_one_layer_alone_gives_the_same_and_fake_is_what_is_stored(text):
    leaf = run(text)
    dense = leaves.decode(leaf, jnp.float32)
    alone = run(text, WEIGHT[1], layer(STATS, 1), KEYS[1])
    np.testing.assert_array_equal(leaves.decode(alone, jnp.float32), dense[1])
    chain = compress.parse(text)
    faked, gradient = jax.jit(jax.value_and_grad(lambda w: fake(chain, w, layer(STATS, 1), KEYS[1]).sum()))(
        WEIGHT[1]
    )
    np.testing.assert_allclose(faked, dense[1].sum(), atol=1e-4)
    np.testing.assert_array_equal(gradient, jnp.ones_like(gradient))


@pytest.mark.parametrize("text", PAIRS)
def test_what_an_earlier_method_made_survives(text):
    first, second = (leaves.decode(run(part), jnp.float32) for part in (text.split(" | ")[0], text))
    pruned = text.split("(")[0] in ("magnitude", "wanda", "sparsegpt")
    if pruned:
        assert bool(jnp.all(second[first == 0] == 0))
    else:
        leaf = run(text.split(" | ")[0])
        grid = layer(open_leaf_of(leaf), 0)
        np.testing.assert_allclose(grid.round(second[0]), second[0], atol=1e-6)


def open_leaf_of(leaf):
    return jax.vmap(lambda one: open_leaf(one).grid)(leaf)


@pytest.mark.parametrize("text", [*SINGLE.values(), *PAIRS[:4]])
def test_open_and_store_are_inverse(text):
    leaf = run(text)
    draft = jax.vmap(open_leaf)(leaf)
    chex_equal(store(draft), leaf)


def chex_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
