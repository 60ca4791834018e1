"""Stochastic depth: what is skipped is the input, what stays is scaled, the mean is the whole
model; later layers more often.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import models, ops, tree
from jaxmodel.errors import InputError
from jaxmodel.layers.stochastic_depth import stochastic_depth
from jaxmodel.models import bert, cnn, gpt2
from jaxmodel.rng import fold

MODEL = gpt2.model(gpt2.SIZES["tiny"])  # three layers in one segment
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 256, (64, 4)), jnp.int32)


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


def test_a_row_is_what_it_was_or_scaled():
    x, y = (
        jnp.asarray(np.random.default_rng(i).normal(size=(400, 2, 3)), jnp.float32) for i in (0, 1)
    )
    out = np.asarray(jax.jit(stochastic_depth)(x, y, jnp.float32(0.25), jax.random.key(3)))
    skipped = np.all(out == np.asarray(x), axis=(1, 2))
    assert 0.15 < skipped.mean() < 0.35
    np.testing.assert_allclose(
        out[~skipped], np.asarray(x + (y - x) / 0.75)[~skipped], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        stochastic_depth(x, y, 0.0, jax.random.key(3)), y, rtol=1e-5, atol=1e-6
    )
    other = stochastic_depth(x, y, 0.25, jax.random.key(3), "another place")
    assert not np.array_equal(out, other)


def test_each_layer_has_its_rate_and_rows_are_the_path_that_was_drawn(params):
    """By hand, over the layers one by one, with the keys that `repeat` gives."""
    rate = 0.6
    rng = jax.random.key(5)
    found = jax.jit(
        lambda p: models.stochastic_depth(MODEL, rate).hidden(p, TOKENS, rng=rng, train=True).hidden
    )(params)
    embed, block, _ = MODEL.parts
    x, context = embed(params, {"tokens": TOKENS})
    run = jax.jit(lambda p, x: block(p, x, context)[0])
    shares = []
    for i, leaves in tree.unstack(params)["blocks"].items():
        y = run(leaves, x)
        key = fold(jax.random.fold_in(rng, int(i)), "stochastic depth")
        p = rate * (int(i) + 1) / 3
        keep = jax.random.bernoulli(key, 1 - p, (64,))
        shares.append(1 - float(jnp.mean(keep.astype(jnp.float32))))
        x = x + (keep.astype(jnp.float32) / (1 - p))[:, None, None] * (y - x)
    np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-5)
    assert shares[0] < shares[1] < shares[2]


def test_without_training_it_is_the_model(params):
    shallower = models.stochastic_depth(MODEL, 0.5)
    wanted = MODEL.apply(params, TOKENS[:2]).logits
    for rng in (None, jax.random.key(0)):
        np.testing.assert_array_equal(shallower.apply(params, TOKENS[:2], rng=rng).logits, wanted)
    bf16 = shallower.with_policy(ops.Policy(remat="full"))  # it stays with the model
    drawn = [
        m.hidden(params, TOKENS, rng=jax.random.key(1), train=True).hidden
        for m in (shallower, bf16)
    ]
    np.testing.assert_allclose(*drawn, rtol=1e-5, atol=1e-5)


def test_gradients_flow_through_what_stays(params):
    shallower = models.stochastic_depth(MODEL, 0.9)
    loss = lambda p, rng: jnp.sum(shallower.hidden(p, TOKENS[:1], rng=rng, train=True).hidden ** 2)
    grads = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(
        params, jax.random.split(jax.random.key(0), 8)
    )
    q = np.abs(np.asarray(grads["blocks"]["0-2"]["mlp"]["up"])).sum((2, 3))  # [draws, layers]
    assert np.isfinite(q).all() and (q == 0).any() and (q > 0).any()


def test_bad_input():
    with pytest.raises(InputError, match=r"rate: 1.0 given; allowed: at least 0 and below 1"):
        models.stochastic_depth(MODEL, 1.0)
    flat = next(m for m in (cnn.model(c) for c in cnn.SIZES.values()) if m.parts.block is None)
    with pytest.raises(InputError, match="model: no blocks"):
        models.stochastic_depth(flat, 0.5)
    assert models.stochastic_depth(bert.model(bert.SIZES["tiny"]), 0.1).config == bert.SIZES["tiny"]
