"""The search for a learning rate: its rates, where it stops, what it suggests, and that it touches
nothing of the caller's.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodel import data, train, tree
from jaxmodel.errors import InputError
from jaxmodel.losses import classification
from jaxmodel.models import mlp
from jaxmodel.train.rate_search import find_lr, steepest

MODEL = mlp.model(mlp.Config(6, (8,), 3))
LABELS = np.arange(60, dtype=np.int32) % 3
X = (
    np.eye(3)[LABELS] @ np.ones((3, 6)) * LABELS[:, None]
    + np.random.default_rng(0).normal(0, 0.1, (60, 6))
).astype(np.float32)
STREAM = data.Stream({"features": X, "labels": LABELS}, 20)


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


def test_it_suggests_a_rate_that_learns_and_leaves_the_params(params):
    before = tree.fingerprint(params)
    found = find_lr(MODEL, STREAM, classification, params=params, low=1e-5, high=10.0, steps=60)
    assert tree.fingerprint(params) == before
    n = len(found.rates)
    assert found.losses.shape == found.smoothed.shape == (n,) and n <= 60
    np.testing.assert_allclose(found.rates, 1e-5 * 1e6 ** (np.arange(n) / 59), rtol=1e-9)
    assert found.suggestion in found.rates and 1e-4 < found.suggestion < 1
    again = find_lr(MODEL, STREAM, classification, params=params, low=1e-5, high=10.0, steps=60)
    assert again.losses.tolist() == found.losses.tolist()
    assert found.plot().startswith(b"<?xml") and found.plot("png").startswith(b"\x89PNG")

    def trained(rate):
        config = train.TrainConfig(steps=20, log_every=20)
        return train.fit(
            MODEL, STREAM, config, params=params, loss=classification, optimizer=optax.adam(rate)
        )[1][-1]["loss"]

    assert trained(found.suggestion) < min(trained(1e-5), found.losses[0]) - 0.1


def test_the_steps_are_those_of_the_optimiser_at_these_rates(params):
    options = {"optimizer": optax.sgd, "low": 1e-3, "high": 1e-1, "steps": 8, "smoothing": 0.5}
    found = find_lr(MODEL, STREAM, classification, params=params, **options)
    grad = jax.jit(
        jax.value_and_grad(lambda p, batch: classification(MODEL, p, batch, train=False)[0])
    )
    losses = []
    for i in range(8):
        value, slopes = grad(params, STREAM.batch(i))
        losses.append(float(value))
        params = jax.tree.map(lambda p, g, i=i: p - jnp.float32(found.rates[i]) * g, params, slopes)
    np.testing.assert_allclose(found.losses, losses, rtol=1e-4)
    smoothed = [np.average(losses, weights=0.5 ** np.abs(np.arange(8.0) - i)) for i in range(8)]
    np.testing.assert_allclose(found.smoothed, smoothed, rtol=1e-4)


def test_it_stops_where_the_loss_diverges():
    def loss(model, params, batch, rng=None, *, train=True):
        value, metrics = classification(model, params, batch, rng, train=train)
        return jnp.where(value > 1e3, jnp.nan, value), metrics

    found = find_lr(MODEL, STREAM, loss, optimizer=optax.sgd, low=1e-3, high=1e6, steps=40)
    assert 5 < len(found.rates) < 40 and np.isfinite(found.losses).all()
    assert found.smoothed.max() <= 4 * found.smoothed.min()


def test_a_mesh_changes_nothing(devices8):
    program = """
        import numpy as np
        from jaxmodel import data, losses, sharding, train
        from jaxmodel.models import mlp

        rng = np.random.default_rng(0)
        stream = data.Stream(
            {"features": rng.normal(size=(32, 8)).astype(np.float32), "labels": np.arange(32) % 4},
            8,
        )
        model = mlp.model(mlp.Config(8, (16,), 4))
        mesh = sharding.make_mesh("data=2,fsdp=4")
        one, more = (
            train.find_lr(model, stream, losses.classification, steps=8, low=1e-3, mesh=m)
            for m in (None, mesh)
        )
        np.testing.assert_allclose(one.losses, more.losses, rtol=1e-5)
        print(len(one.losses))
    """
    assert int(devices8(program)) > 2


def test_the_steepest_place():
    rates = np.geomspace(1e-4, 1, 5)
    assert steepest(rates, np.array([5, 4.5, 3, 2.9, 9.0])) == pytest.approx(1e-3)
    assert steepest(rates, np.array([1.0, 2, 3, 4, 5])) is None
    assert steepest(rates, np.array([5.0, 4, 9, 0.5, 8])) == pytest.approx(
        1e-2
    )  # not behind the least


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 1.0, "high": 0.1}, "low, high: 1.0, 0.1 given; allowed: 0 < low < high"),
        ({"steps": 3}, "steps: 3 given; allowed: a whole number of at least 8"),
        ({"smoothing": 1.0}, "smoothing, diverged: 1.0, 4.0 given"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(InputError) as error:
        find_lr(MODEL, STREAM, classification, **options)
    assert message in str(error.value)
