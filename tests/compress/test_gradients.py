"""Gradients as statistics: against JAX's own, by finite differences behind a turned input."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import compress, losses, tree
from jaxmodel.compress.draft import Draft
from jaxmodel.errors import InputError
from jaxmodel.leaves import decode
from jaxmodel.models import llama, mlp

MODEL = llama.model(llama.SIZES["tiny"])
BATCHES = [
    jnp.asarray(np.random.default_rng(i).integers(0, 256, (2, 9)), jnp.int32) for i in (1, 2)
]


@functools.cache
def start():
    return jax.jit(MODEL.init)(jax.random.key(0))


@functools.cache
def by_jax():
    """The gradient of each batch's mean over the next tokens."""

    def mean(params, tokens):
        logits = MODEL.apply(params, tokens[:, :-1]).logits
        return losses.softmax_cross_entropy(logits, tokens[:, 1:]).mean()

    run = jax.jit(jax.grad(mean))
    return [tree.flatten(run(start(), tokens)) for tokens in BATCHES]


def test_gradients_and_their_squares_are_summed_over_batches():
    found = compress.observe_gradients(MODEL, start(), BATCHES)
    assert "blocks/0-2/attn_norm/weight" not in found
    for path, of in found.items():
        one, two = (grads[path] for grads in by_jax())
        np.testing.assert_allclose(of["gradient"], one + two, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(of["fisher"], one**2 + two**2, rtol=1e-3, atol=1e-9)


def test_a_compressed_leaf_has_the_gradient_of_what_it_stands_for():
    rules = [("blocks/1/.*/(up|q)", "rtn(8)"), (".*", ())]
    small, _ = compress.apply(rules, start())
    plain = jax.jit(lambda p: tree.map_leaves(lambda _, leaf: decode(leaf), p))(small)
    one, two = (
        compress.observe_gradients(MODEL, params, BATCHES[:1], "blocks/1/.*/(up|q)")
        for params in (small, plain)
    )
    assert list(one) == ["blocks/1/attn/q", "blocks/1/mlp/up"]
    for path in one:
        np.testing.assert_allclose(
            one[path]["gradient"], two[path]["gradient"], rtol=1e-3, atol=1e-6
        )


def test_behind_a_scale_and_a_rotation_gradients_are_those_of_the_draft():
    rng = np.random.default_rng(3)
    x, target = rng.normal(size=(2, 5, 8)).astype(np.float32)
    scale = rng.uniform(0.5, 1.5, 8).astype(np.float32)
    for hadamard in (0, 4):
        base = rng.normal(size=(3, 8)).astype(np.float32)
        draft = Draft(base, base, scale=scale, hadamard=hadamard)

        def cost(base, draft=draft):
            return jnp.sum(jnp.sin(x @ draft.to(base).dense().T) * target[:, :3])

        @jax.jit
        def run(draft, base, cost=cost):
            of_dense = lambda weight: jnp.sum(jnp.sin(x @ weight.T) * target[:, :3])
            dense = jax.grad(of_dense)(draft.dense())
            return draft.seen({"gradient": dense, "fisher": dense**2}), jax.grad(cost)(base)

        seen, want = run(draft, base)
        np.testing.assert_allclose(seen["gradient"], want, rtol=1e-4, atol=1e-5)
        if hadamard:
            assert "fisher" not in seen
        else:
            np.testing.assert_allclose(seen["fisher"], want**2, rtol=1e-4, atol=1e-5)


def test_what_is_wrong_is_said():
    with pytest.raises(InputError, match="paths: 'nothing' matches no matrix"):
        compress.observe_gradients(MODEL, start(), BATCHES, "nothing")
    with pytest.raises(InputError, match="batches: none given"):
        compress.observe_gradients(MODEL, start(), [])
    model = mlp.model(mlp.Config(3, (4,), 2))
    with pytest.raises(InputError, match="loss: none given, and the batch holds features"):
        compress.observe_gradients(model, model.init(jax.random.key(0)), [jnp.ones((2, 3))])
