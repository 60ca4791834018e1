"""The loss of classes: its definition, smoothing, labels that are none; a run learns."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodel import data
from jaxmodel.losses import classification
from jaxmodel.models import mlp
from jaxmodel.train.state import init_state
from jaxmodel.train.step import make_step

MODEL = mlp.model(mlp.Config(16, (32,), 4))


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


def batch(labels) -> dict[str, jax.Array]:
    x = np.random.default_rng(0).normal(size=(len(labels), 16))
    return {"features": jnp.asarray(x, jnp.float32), "labels": jnp.asarray(labels, jnp.int32)}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_it_is_the_cross_entropy_of_the_smoothed_label(smoothing, params):
    rows = batch([0, 3, 1, 2, 2])
    loss, metrics = classification(MODEL, params, rows, smoothing=smoothing)
    logits = np.asarray(jax.jit(MODEL.apply)(params, rows["features"]).logits, np.float64)
    wanted = (1 - smoothing) * np.eye(4)[np.asarray(rows["labels"])] + smoothing / 4
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(loss, -np.mean(np.sum(wanted * log_probs, -1)), rtol=1e-5)
    np.testing.assert_allclose(
        metrics["accuracy"], np.mean(logits.argmax(-1) == np.asarray(rows["labels"]))
    )


def test_a_label_that_is_no_class_is_loud(params):
    assert np.isnan(classification(MODEL, params, batch([0, 4]))[0])


def test_steps_learn_from_a_stream_of_arrays(params):
    rows = {name: np.asarray(a) for name, a in batch(np.arange(40) % 4).items()}
    stream = data.Stream(rows, 10, seed=0)
    optimizer = optax.adam(1e-2)
    step = jax.jit(make_step(MODEL, classification, optimizer))
    state = init_state(params, optimizer)
    losses = []
    for i in range(60):
        state, metrics = step(state, stream.batch(i))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.2 * losses[0]
