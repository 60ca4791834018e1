"""Learnt steps and limits: the gradients of LSQ and PACT, and what is stored at the end."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import compress, data, leaves, losses, ops, train, tree
from jaxmodel.compress.quantize.learnt import learnt_step
from jaxmodel.errors import InputError
from jaxmodel.models import mlp


def test_gradients_are_those_of_the_papers():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(3, 20)).astype(np.float32)
    step = np.array([0.2, 0.4, 0.6], np.float32)
    given = rng.normal(size=weight.shape).astype(np.float32)
    x = rng.normal(size=(5, 20)).astype(np.float32) * 2

    @jax.jit
    def run(weight, step, limit):
        rounded = lambda w, s: jnp.sum(learnt_step(w, s, jnp.int32(3)) * given)
        clipped = lambda x, limit: jnp.sum(
            ops.einsum("BI,OI->BO", x, leaves.Turned(jnp.asarray(weight), limit=limit[None, None]))
        )
        return (
            learnt_step(weight, step, jnp.int32(3)),
            jax.grad(rounded, (0, 1))(weight, step),
            jax.grad(clipped, (0, 1))(jnp.asarray(x), limit),
        )

    value, of_lsq, of_pact = run(weight, step, jnp.float32(1.5))
    ratio = weight / step[:, None]
    inside = np.abs(ratio) < 3
    np.testing.assert_allclose(value, np.round(np.clip(ratio, -3, 3)) * step[:, None], rtol=1e-6)
    np.testing.assert_allclose(of_lsq[0], given * inside, rtol=1e-5)
    slope = np.where(inside, np.round(ratio) - ratio, np.sign(ratio) * 3)
    want = (given * slope).sum(-1) / np.sqrt(20 * 3)
    np.testing.assert_allclose(of_lsq[1], want, rtol=1e-4, atol=1e-5)
    through = np.broadcast_to(weight.sum(0), x.shape)
    np.testing.assert_allclose(of_pact[0], through * (np.abs(x) <= 1.5), rtol=1e-4, atol=1e-5)
    want = (through * np.sign(x) * (np.abs(x) > 1.5)).sum()
    np.testing.assert_allclose(of_pact[1], want, rtol=1e-4, atol=1e-4)


def test_they_train_and_what_is_stored_computes_the_same():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(256, 16)).astype(np.float32)
    labels = (features @ rng.normal(size=(16, 4))).argmax(-1).astype(np.int32)
    plain = mlp.model(mlp.Config(16, (32,), 4))
    start = plain.init(jax.random.key(0))
    learnt = compress.quantize.Learnt(2, limit=4.0)
    rules = [(".*/dense|head", learnt), (".*", None)]
    model, params = compress.quantize.learn_ranges(plain, start, rules)
    stream = data.Stream({"features": features, "labels": labels}, 64, 0)
    config = train.TrainConfig(steps=100, learning_rate=1e-2)
    state, history = train.fit(model, stream, config, params=params, loss=losses.classification)
    found = tree.flatten(state.params)
    for name in ("step", "limit"):
        before = tree.flatten(params)[f"head_range/{name}"]
        assert np.all(np.asarray(found[f"head_range/{name}"]) != np.asarray(before))
    stored = compress.quantize.store_ranges(state.params)
    assert isinstance(stored["head"], leaves.QTensor) and stored["head"].bits == 2
    inputs = {"features": jnp.asarray(features)}
    trained = jax.jit(model.apply)(state.params, inputs).logits
    logits = jax.jit(plain.apply)(stored, inputs).logits
    # a value in the middle of two codes may fall to either side
    assert np.quantile(np.abs(logits - trained), 0.9) < 1e-3
    assert np.mean(np.asarray(logits).argmax(-1) == labels) > 0.9
    assert history[-1]["loss"] < 0.5


def test_what_is_no_matrix_has_no_range():
    model = mlp.model(mlp.SIZES["tiny"])
    params = model.init(jax.random.key(0))
    with pytest.raises(InputError, match="allowed: a Learnt for a plain matrix, or None"):
        compress.quantize.learn_ranges(model, params, [(".*", compress.quantize.Learnt())])
    with pytest.raises(InputError, match="bits is 9"):
        compress.quantize.Learnt(9)
