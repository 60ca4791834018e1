"""Statistics of batch norms while a model trains:

`fit` sets them, of own and of foreign modules, the same in every run.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmodel import (
    checkpoint,
    data,
    distributed,
    losses,
    models,
    ops,
    optim,
    sharding,
    train,
    tree,
)
from jaxmodel.errors import InputError
from jaxmodel.models import resnet
from jaxmodel.train import statistics
from jaxmodel.train.state import init_state

N = 96
D = 5
RANDOM = np.random.default_rng(3)
LABELS = RANDOM.integers(0, 3, N).astype(np.int32)
FEATURES = (4.0 + LABELS[:, None] + RANDOM.normal(size=(N, D)) * np.arange(1, D + 1)).astype(
    np.float32
)
ROWS = {"features": FEATURES, "labels": LABELS}


class Linen(nn.Module):
    """Norms first, so that what they see is the data, whatever the weights are."""

    momentum: float = 0.97

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.BatchNorm(use_running_average=not train, momentum=self.momentum)(x)
        x = nn.Dropout(0.1, deterministic=not train)(nn.Dense(8)(x))
        return nn.Dense(3)(x)


class Counting(nn.Module):
    """Keeps averages under names of its own, in a collection of its own, and what is none: a number
    of calls, the last batch.
    """

    @nn.compact
    def __call__(self, x, train: bool):
        mean = self.variable("kept", "running_mean", jnp.ones, x.shape[-1:])
        var = self.variable("kept", "running_var", jnp.ones, x.shape[-1:])
        calls = self.variable("kept", "calls", lambda: jnp.float32(7))
        if train:
            mean.value = 0.8 * mean.value + 0.2 * jnp.mean(x, axis=0)
            var.value = 0.8 * var.value + 0.2 * jnp.var(x, axis=0)
            calls.value = calls.value + 1
        return nn.Dense(3)((x - mean.value[None]) / jnp.sqrt(var.value[None] + 1e-5))


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.BatchNorm(D, rngs=rngs)
        self.out = nnx.Linear(D, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.norm(x))


EXAMPLE = {"features": jax.ShapeDtypeStruct((1, D), jnp.float32)}
FOREIGN = {
    "linen": (
        models.from_linen(Linen(), EXAMPLE),
        "state/batch_stats/BatchNorm_0/mean",
        "state/batch_stats/BatchNorm_0/var",
    ),
    "names": (
        models.from_linen(Counting(), EXAMPLE),
        "state/kept/running_mean",
        "state/kept/running_var",
    ),
    "nnx": (models.from_nnx(Nnx, EXAMPLE), "state/norm/mean", "state/norm/var"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_fit_leaves_a_foreign_norm_with_the_moments_of_the_data(name):
    model, mean, var = FOREIGN[name]
    config = train.TrainConfig(steps=3, eval_every=2, ema_decay=0.5)
    state, rows = train.fit(
        model,
        data.Stream(ROWS, 32),
        config,
        heldout=data.Stream(ROWS, 40),
        loss=losses.classification,
    )
    leaves = tree.flatten(state.params)
    np.testing.assert_allclose(leaves[mean], FEATURES.mean(0), rtol=1e-4)
    np.testing.assert_allclose(leaves[var], FEATURES.var(0), rtol=1e-4)
    assert leaves.get("state/kept/calls", 7) == 7
    logits = np.asarray(jax.jit(model.apply)(train.averaged(state), jnp.asarray(FEATURES)).logits)
    assert rows[-1]["heldout_accuracy"] == pytest.approx((logits.argmax(1) == LABELS).mean())


def test_batches_of_unequal_size_and_rows_without_weight():
    model, mean, var = FOREIGN["linen"]
    params = tree.map_leaves(
        lambda path, a: a + 3, jax.jit(model.init)(jax.random.key(0))
    )  # whatever stood there
    filled = {
        "features": np.concatenate([FEATURES[50:], 1e3 * FEATURES[:4]]),
        "weights": np.repeat([1, 0], [N - 50, 4]),
    }
    found = tree.flatten(
        train.recalibrate_batch_norm(model, params, [{"features": FEATURES[:50]}, filled])
    )
    np.testing.assert_allclose(found[mean], FEATURES.mean(0), rtol=1e-4)
    np.testing.assert_allclose(found[var], FEATURES.var(0), rtol=1e-4)
    with pytest.raises(
        InputError,
        match="passes: 2 given; allowed: 1, because a foreign module normalises by each batch",
    ):
        train.recalibrate_batch_norm(model, params, [filled], passes=2)
    with pytest.raises(InputError, match="batches: none in pass 1"):
        train.recalibrate_batch_norm(model, params, [])


PIXELS = RANDOM.normal(2.0, 1.5, (N, 6, 6, 1)).astype(np.float32)
IMAGES = {"pixels": PIXELS + 2 * LABELS[:, None, None, None].astype(np.float32), "labels": LABELS}
MODEL = resnet.model(resnet.Config((1,), 4, classes=3, size=6, channels=1, small=True))
CONFIG = train.TrainConfig(steps=6, eval_every=2, save_every=3, log_every=1, learning_rate=3e-3)


def fit(config=CONFIG, rows=IMAGES, batch=24, stop=None, **more):
    supervisor = distributed.RunMonitor(stop=lambda i: i == stop)
    heldout = data.Stream(IMAGES, 40)
    more = {"heldout": heldout, "loss": losses.classification, **more}
    return train.fit(MODEL, data.Stream(rows, batch), config, supervisor=supervisor, **more)


def by_hand(params, rows=IMAGES, batch=24):
    """Of all rows, in the batches of the first epoch."""
    stream = data.Stream(rows, batch)
    return train.recalibrate_batch_norm(MODEL, params, [stream.batch(i) for i in range(N // batch)])


def close(got, want):
    for (path, a), b in zip(tree.flatten(got).items(), tree.flatten(want).values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("average", [0.0, 0.6])
def test_the_weights_are_judged_as_they_are_used(average):
    state, rows = fit(dataclasses.replace(CONFIG, ema_decay=average))
    judged = train.averaged(state)
    close(judged, by_hand(judged))
    logits = np.asarray(
        jax.jit(MODEL.apply)(judged, jnp.asarray(IMAGES["pixels"])).logits, np.float64
    )
    loss = np.log(np.exp(logits).sum(1)) - logits[np.arange(N), LABELS]
    assert rows[-1]["heldout_loss"] == pytest.approx(loss.mean(), rel=1e-4)
    assert sum("heldout_loss" in row for row in rows) == 3


def test_early_stopping_returns_the_statistics_of_its_best_weights():
    config = dataclasses.replace(CONFIG, patience=1, learning_rate=0.3, eval_every=1)
    state, _ = fit(config)
    close(state.params, by_hand(state.params))


def test_a_run_that_was_killed_goes_on_to_the_same_bits(tmp_path):
    whole, rows = fit()
    for stop in (3, 5):
        with checkpoint.Checkpoints(tmp_path / str(stop)) as checkpoints:
            fit(stop=stop, checkpoints=checkpoints)
        with checkpoint.Checkpoints(tmp_path / str(stop)) as checkpoints:
            again, after = fit(checkpoints=checkpoints)
        assert checkpoint.fingerprint(again) == checkpoint.fingerprint(whole)
        assert [row["heldout_loss"] for row in after if "heldout_loss" in row][-1] == rows[-1][
            "heldout_loss"
        ]
    steady = dataclasses.replace(CONFIG, schedule="constant", warmup_steps=0)
    shorter, _ = fit(dataclasses.replace(steady, steps=3))
    longer, _ = fit(steady, state=shorter)
    straight, _ = fit(steady)
    assert checkpoint.fingerprint(longer) == checkpoint.fingerprint(
        straight
    )  # what was set at step 3 leaves no trace


def test_fewer_rows_than_a_batch_count_once():
    few = {name: a[:10] for name, a in IMAGES.items()}
    state, _ = fit(dataclasses.replace(CONFIG, steps=1), rows=few, batch=24)
    close(state.params, train.recalibrate_batch_norm(MODEL, state.params, [few]))


def test_models_without_norms_cost_nothing():
    state = init_state({"w": jnp.ones(2)}, optim.optimizer("sgd", 0.1))
    model = models.from_linen(nn.Dense(2), EXAMPLE)
    settled = statistics.of_run(
        model, losses.classification, data.Stream(ROWS, 4), None, {"w": jnp.ones(2)}
    )
    assert settled(state) is state


def check_fit_on_a_mesh() -> None:
    config = resnet.Config((1,), 8, classes=4, size=6, channels=1, small=True)
    alone = resnet.model(config)
    placed = resnet.model(config, ops.Policy(axes=ops.MESH_AXES))
    run = functools.partial(
        train.fit, config=CONFIG, heldout=data.Stream(IMAGES, 40), loss=losses.classification
    )
    one, rows = run(alone, data.Stream(IMAGES, 24))
    mesh = sharding.make_mesh("fsdp=4,tensor=2")
    many, found = run(placed, data.Stream(IMAGES, 24), mesh=mesh)
    for (path, a), b in zip(
        tree.flatten(many.params).items(), tree.flatten(one.params).values(), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4, err_msg=path)
    np.testing.assert_allclose(found[-1]["heldout_loss"], rows[-1]["heldout_loss"], rtol=1e-3)
    again, _ = run(placed, data.Stream(IMAGES, 24), mesh=mesh)
    assert checkpoint.fingerprint(many) == checkpoint.fingerprint(again)


def check_a_foreign_norm_on_a_mesh() -> None:
    model, mean, var = FOREIGN["linen"]
    config = train.TrainConfig(steps=2)
    mesh = sharding.make_mesh("data=8")
    state, _ = train.fit(
        model, data.Stream(ROWS, 32), config, mesh=mesh, loss=losses.classification
    )
    found = tree.flatten(state.params)
    np.testing.assert_allclose(found[mean], FEATURES.mean(0), rtol=1e-4)
    np.testing.assert_allclose(found[var], FEATURES.var(0), rtol=1e-4)


def test_on_eight_devices(outcomes8):
    checks = ["check_fit_on_a_mesh", "check_a_foreign_norm_on_a_mesh"]
    assert outcomes8(__file__, checks) == dict.fromkeys(checks, "")
