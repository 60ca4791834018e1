"""Rows of weight 0 in the batch norms of others' modules: the loss, its gradient and what is kept
are those of the rest.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxmodel import data, losses, models, sharding, train, tree
from jaxmodel.errors import InputError
from jaxmodel.models.foreign import set_state
from jaxmodel.train.state import init_state
from jaxmodel.train.step import make_step

RANDOM = np.random.default_rng(11)
X = RANDOM.normal(2.0, 1.5, (6, 4, 4, 3)).astype(np.float32)
LABELS = np.array([0, 1, 2, 0, 1, 2], np.int32)
EXAMPLE = {"pixels": jax.ShapeDtypeStruct((1, 4, 4, 3), jnp.float32)}
PLACES = (1, 2, 4, 5, 6, 7)  # of the rows that count, in a batch of eight


class Scaled(nn.BatchNorm):
    """Somebody's own kind, which knows no mask."""

    def __call__(self, x, use_running_average: bool):
        return 0.5 * super().__call__(x, use_running_average)


class Linen(nn.Module):
    """Norms of images, of places one by one, inside of what is computed again, and of vectors."""

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x))
        x = nn.remat(Scaled, static_argnums=(2,))(name="scaled")(nn.relu(x), not train)
        x = nn.BatchNorm(use_running_average=not train)(x.reshape(-1, 4)).reshape(len(x), -1)
        return nn.Dense(3)(nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x)))


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.BatchNorm(3, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)])
        self.inner = nnx.Linear(48, 8, rngs=rngs)
        self.out = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.norms[1](self.inner(self.norms[0](x).reshape(len(x), -1))))


def made(name: str) -> models.Model:
    return models.from_linen(Linen(), EXAMPLE) if name == "linen" else models.from_nnx(Nnx, EXAMPLE)


def filled(x=X, labels=LABELS, places=PLACES, size=8) -> dict[str, jax.Array]:
    """The rows at some places of a larger batch, with numbers elsewhere that would change
    any mean.
    """
    out = {
        "pixels": np.full((size, *x.shape[1:]), 1e3, np.float32),
        "labels": np.full(size, 2, np.int32),
    }
    out |= {"weights": np.zeros(size, np.float32)}
    for name, a in {"pixels": x, "labels": labels, "weights": np.float32(1)}.items():
        out[name][list(places)] = a
    return jax.device_put(out)


ALONE = jax.device_put({"pixels": X, "labels": LABELS})


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_loss_gradient_and_state_are_those_of_the_rows_that_count(name):
    model = made(name)
    params = jax.jit(model.init)(jax.random.key(0))
    of = jax.jit(
        jax.value_and_grad(lambda params, batch: losses.classification(model, params, batch)[0])
    )
    (loss, grads), (want, wanted) = of(params, filled()), of(params, ALONE)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    for (path, a), b in zip(
        tree.flatten(grads).items(), tree.flatten(wanted).values(), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5, err_msg=path)
    seen = set_state(model, params, {"pixels": jnp.asarray(X)})["state"]
    run = jax.jit(
        lambda params, rows, counts: model.config.run(params, rows, None, True, counts)[1]
    )
    kept = run(params, {"pixels": filled()["pixels"]}, filled()["weights"] > 0)
    for (path, a), b in zip(tree.flatten(kept).items(), tree.flatten(seen).values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=path)


def test_the_loss_by_numpy():
    """A norm in front, whose moments can be taken by hand."""
    model = models.from_nnx(Nnx, EXAMPLE)
    params = jax.jit(model.init)(jax.random.key(0))

    def norm(x):
        axes = tuple(range(x.ndim - 1))
        return (x - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-5)

    weights = {path: np.asarray(leaf, np.float64) for path, leaf in tree.flatten(params).items()}
    inner = norm(X.astype(np.float64)).reshape(6, -1) @ weights["inner/kernel"]
    z = norm(inner) @ weights["out/kernel"]
    want = np.log(np.exp(z).sum(1)) - z[np.arange(6), LABELS]
    loss, metrics = jax.jit(lambda params, rows: losses.classification(model, params, rows))(
        params, filled()
    )
    np.testing.assert_allclose(loss, want.mean(), rtol=1e-4)
    assert float(metrics["weight"]) == 6


@pytest.mark.parametrize("name", ["linen", "nnx"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_of_a_batch_that_is_filled_up(name, accumulate):
    """In two micro-batches, of rows 0, 2, ... and 1, 3, ...; the one that holds no row that counts
    changes nothing.
    """
    model = made(name)
    optimizer = optax.sgd(0.1)
    places = range(0, 12, accumulate) if accumulate > 1 else PLACES
    batch = filled(places=places, size=12) if accumulate > 1 else filled()
    start = lambda: init_state(jax.jit(model.init)(jax.random.key(0)), optimizer)
    step = lambda n: jax.jit(make_step(model, losses.classification, optimizer, accumulate=n))
    got, _ = step(accumulate)(start(), batch)
    want, _ = step(1)(start(), ALONE)
    for (path, a), b in zip(
        tree.flatten(got.params).items(), tree.flatten(want.params).values(), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=path)


def check_fit(mesh=None) -> None:
    """A list whose last batch is short:

    `fit` fills it up, and trains as a loop of my own does on what was given.
    """
    model = made("linen")
    params = jax.jit(model.init)(jax.random.key(0))
    rows = RANDOM.normal(1.0, 2.0, (8, 4, 4, 3)).astype(np.float32)
    batches = [{"pixels": rows, "labels": np.arange(8, dtype=np.int32) % 3}, ALONE]
    config = train.TrainConfig(
        steps=2,
        optimizer="sgd",
        weight_decay=0.0,
        warmup_steps=0,
        schedule="constant",
        max_grad_norm=0.0,
    )
    state, _ = train.fit(model, batches, config, params=params, mesh=mesh)
    optimizer = train.make_optimizer(config)
    own = init_state(params, optimizer)
    for batch in jax.device_put(batches):
        own, _ = jax.jit(make_step(model, losses.classification, optimizer))(own, batch)
    got, want = (
        {p: a for p, a in tree.flatten(s.params).items() if "state" not in p} for s in (state, own)
    )
    for path in want:
        np.testing.assert_allclose(got[path], want[path], rtol=1e-4, atol=1e-5, err_msg=path)


def check_fit_on_a_mesh() -> None:
    check_fit(sharding.make_mesh("data=8"))


def test_fit_fills_up_a_short_batch():
    check_fit()


def test_on_eight_devices(outcomes8):
    assert outcomes8(__file__, ["check_fit_on_a_mesh"]) == {"check_fit_on_a_mesh": ""}


def test_a_norm_that_cannot_tell_its_rows_is_named():
    class Turned(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool):
            x = nn.BatchNorm(use_running_average=not train, name="odd")(jnp.moveaxis(x, 0, 1)[:3])
            return nn.Dense(3)(jnp.moveaxis(x, 1, 0).reshape(x.shape[1], -1))

    model = models.from_linen(Turned(), EXAMPLE)
    params = jax.jit(model.init)(jax.random.key(0))
    with pytest.raises(
        InputError, match="weights: the batch norm 'odd' reads 3 rows of a batch of 8"
    ):
        losses.classification(model, params, filled())


def test_data_with_weights_of_rows():
    """Any data whose rows have weights, not only what `fit` fills up."""
    stream = data.Stream(jax.tree.map(np.asarray, filled()), 8)
    state, rows = train.fit(
        made("nnx"), stream, train.TrainConfig(steps=5, log_every=1, learning_rate=0.02)
    )
    assert rows[-1]["loss"] < rows[0]["loss"]
    np.testing.assert_allclose(
        state.params["state"]["norms"]["0"]["mean"], X.mean((0, 1, 2)), rtol=1e-4
    )
