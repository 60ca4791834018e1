"""The step: micro-batches give the whole batch's gradient, averages their formula, bad steps are as
if they had not been.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodel import losses, train, tree
from jaxmodel.errors import InputError
from jaxmodel.models import gpt2, mlp
from jaxmodel.optim.guard import Guard
from jaxmodel.train.state import init_state
from jaxmodel.train.step import make_step

MODEL = mlp.model(dataclasses.replace(mlp.SIZES["tiny"], dropout=0.0))
FEATURES = MODEL.inputs(1, 1)["features"].shape[-1]
CLASSES = MODEL.config.classes


@dataclasses.dataclass(frozen=True)
class Rows:
    """Batches of a tiny classifier; those of the steps in `broken` hold a value that is not
    finite.
    """

    batch_size: int = 12
    broken: tuple[int, ...] = ()
    skipped: tuple[int, ...] = ()

    @property
    def fingerprint(self) -> str:
        return str(self)

    def batch(self, step, rows=slice(None)):
        random = np.random.default_rng(int(step))
        features = random.normal(size=(self.batch_size, FEATURES)).astype(np.float32)
        labels = (features[:, 0] > 0).astype(np.int32)
        if int(step) in self.broken:
            features[0, 0] = np.nan
        weights = (random.random(self.batch_size) < 0.7).astype(np.float32)
        return {"features": features[rows], "labels": labels[rows], "weights": weights[rows]}


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def whole_step(params):
    """A state, and what a step without micro-batches makes of it."""
    state = init_state(params, optax.sgd(1.0))
    return state, *jax.jit(make_step(MODEL, losses.classification, optax.sgd(1.0)))(
        state, Rows().batch(0)
    )


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_micro_batches_of_unequal_weight_give_the_gradient_of_the_whole_batch(parts, whole_step):
    (state, whole, metrics), batch, optimizer = (
        whole_step,
        jax.device_put(Rows().batch(0)),
        optax.sgd(1.0),
    )
    step = make_step(MODEL, losses.classification, optimizer, accumulate=parts)
    cut, metrics_cut = jax.jit(step)(state, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), cut.params, whole.params)
    for name in ("loss", "grad_norm", "accuracy", "weight"):
        np.testing.assert_allclose(metrics_cut[name], metrics[name], rtol=1e-5)


def test_micro_batches_need_a_divisor(params):
    state = init_state(params, optax.sgd(1.0))
    step = make_step(MODEL, losses.classification, optax.sgd(1.0), accumulate=5)
    with pytest.raises(
        InputError, match="accumulate: 5 micro-batches do not divide a batch of 12 rows"
    ):
        step(state, Rows().batch(0))


def test_micro_batches_hold_less_memory():
    model = gpt2.model(gpt2.Config(vocab=512, width=32, depth=2, heads=2, context=32))
    optimizer = optax.sgd(0.1)
    state = jax.eval_shape(lambda key: init_state(model.init(key), optimizer), jax.random.key(0))
    batch = {name: jax.ShapeDtypeStruct((16, 32), jnp.int32) for name in ("tokens", "targets")}
    used = {}
    for parts in (1, 8):
        step = make_step(model, losses.next_token, optimizer, accumulate=parts)
        used[parts] = (
            jax.jit(step, donate_argnums=0)
            .lower(state, batch)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )
    assert used[8] < 0.4 * used[1]


def test_the_average_follows_its_formula(params):
    optimizer = optax.sgd(0.5)
    state = init_state(params, optimizer, average=True)
    step = jax.jit(make_step(MODEL, losses.classification, optimizer, average=0.6))
    want = jax.tree.map(np.asarray, params)
    for i in range(8):
        state, _ = step(state, jax.device_put(Rows().batch(i)))
        d = min(0.6, (1 + i) / (10 + i))
        want = jax.tree.map(lambda a, p, d=d: d * a + (1 - d) * np.asarray(p), want, state.params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), train.averaged(state), want
    )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_not_finite_is_as_if_its_batch_had_not_come(accumulate):
    config = train.TrainConfig(
        steps=6, ema_decay=0.9, gradient_accumulation_steps=accumulate, log_every=1
    )
    broken, history = train.fit(MODEL, Rows(broken=(3,)), config, loss=losses.classification)
    guard = config.guard()
    optimizer = train.make_optimizer(config)
    step = jax.jit(
        make_step(
            MODEL,
            losses.classification,
            optimizer,
            average=0.9,
            accumulate=accumulate,
            guard=guard,
            seed=config.seed,
        )
    )
    state = init_state(jax.jit(MODEL.init)(jax.random.key(0)), optimizer, average=True, guard=guard)
    for i in (0, 1, 2, 4, 5):
        state = dataclasses.replace(state, step=jnp.int32(i), data_step=jnp.int32(i))
        state, _ = step(state, jax.device_put(Rows().batch(i)))
    assert tree.fingerprint(broken.params) == tree.fingerprint(state.params)
    assert tree.fingerprint(broken.extra["average"]) == tree.fingerprint(state.extra["average"])
    assert [row["bad"] for row in history] == [0, 0, 0, 1, 0, 0]
    assert (int(broken.extra["guard"]["good"]), int(broken.extra["guard"]["bad"])) == (5, 1)


def test_a_spike_is_left_out_and_a_falling_loss_is_not():
    guard = Guard(sigmas=4.0, window=8)
    memory = guard.init()
    found = []
    judge = jax.jit(guard.judge)
    for i in range(40):
        loss = 5.0 - 0.05 * i + 0.1 * np.sin(i) + (6.0 if i == 30 else 0.0)
        ok, memory = judge(memory, np.float32(loss), np.float32(1.0))
        found.append(bool(ok))
    assert [i for i, ok in enumerate(found) if not ok] == [30]


def test_a_norm_can_be_the_spike():
    guard = Guard(sigmas=4.0, window=4)
    memory = Guard(sigmas=4.0, window=4).init()
    for _ in range(4):
        _, memory = guard.judge(memory, jnp.float32(1.0), jnp.float32(1.0))
    assert not guard.judge(memory, jnp.float32(1.0), jnp.float32(50.0))[0]
    assert guard.judge(memory, jnp.float32(0.5), jnp.float32(0.5))[0]


def test_to_stop_at_a_bad_step_names_it():
    config = train.TrainConfig(steps=8, on_bad_step="stop", log_every=1)
    with pytest.raises(
        InputError,
        match=r"the loss or the gradient of step 6 is not finite or a spike .features hold nan in "
        r"row 0 of batch 5.; allowed",
    ):
        train.fit(MODEL, Rows(broken=(5,)), config, loss=losses.classification)


def test_an_endless_row_of_bad_steps_gives_up():
    config = train.TrainConfig(steps=80, log_every=1)
    with pytest.raises(InputError, match="as were the 49 before"):
        train.fit(MODEL, Rows(broken=tuple(range(80))), config, loss=losses.classification)


def test_augmentation_is_a_function_of_the_data_step(params):
    seen = []

    def augment(key, batch):
        noise = jax.random.normal(key, batch["features"].shape)
        return {**batch, "features": batch["features"] + noise}

    optimizer = optax.sgd(0.0)
    step = jax.jit(make_step(MODEL, losses.classification, optimizer, augment=augment))
    for place in (0, 1, 0):
        state = dataclasses.replace(init_state(params, optimizer), data_step=jnp.int32(place))
        seen.append(float(step(state, jax.device_put(Rows().batch(0)))[1]["loss"]))
    assert seen[0] == seen[2] != seen[1]
