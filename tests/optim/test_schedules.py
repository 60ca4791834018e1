"""Learning rates at every step against optax and their closed forms; a plateau lowers what stalls,
and only that.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st

from jaxmodel import losses
from jaxmodel.errors import InputError
from jaxmodel.models import mlp
from jaxmodel.optim.schedules import reduce_on_plateau, schedule
from jaxmodel.train.state import init_state
from jaxmodel.train.step import make_step

NAMES = ("constant", "step", "cosine", "wsd", "one_cycle", "plateau")
STEPS = 50
WARMUP = 10
PEAK = 0.3
EVERY = jnp.arange(201, dtype=jnp.int32)  # of one length, so that operations are compiled once


def rates(name: str, **options) -> np.ndarray:
    of = schedule(name, PEAK, STEPS, **{"warmup_steps": WARMUP, **options})
    return np.asarray(jax.jit(jax.vmap(of))(jnp.arange(STEPS + 5, dtype=jnp.int32)))


def of_optax(of: optax.Schedule) -> np.ndarray:
    with jax.numpy_dtype_promotion("standard"):
        return np.asarray(jax.jit(jax.vmap(of))(jnp.arange(STEPS + 5)))


def by_hand(
    name: str, i: int, end: float = 0.1, stable: float = 0.8, every: int = 13, gamma: float = 0.1
) -> float:
    rest = STEPS - WARMUP
    if i < WARMUP:
        up = (1 - np.cos(np.pi * i / WARMUP)) / 2
        return PEAK * (1 / 25 + 24 / 25 * up) if name == "one_cycle" else PEAK * i / WARMUP
    t = min((i - WARMUP) / rest, 1)
    if name == "step":
        return PEAK * gamma ** ((i - WARMUP) // every)
    if name in ("cosine", "one_cycle"):
        return PEAK * (end + (1 - end) * (1 + np.cos(np.pi * t)) / 2)
    if name == "wsd":
        return PEAK * (1 - (1 - end) * max(0, t - stable) / (1 - stable))
    return PEAK


@pytest.mark.parametrize("name", NAMES)
def test_every_step_by_hand(name):
    np.testing.assert_allclose(
        rates(name), [by_hand(name, i) for i in range(STEPS + 5)], rtol=1e-5, atol=1e-8
    )


def test_cosine_and_one_cycle_equal_optax():
    cosine = optax.warmup_cosine_decay_schedule(0.0, PEAK, WARMUP, STEPS, PEAK / 10)
    np.testing.assert_allclose(rates("cosine"), of_optax(cosine), rtol=1e-6)
    cycle = optax.cosine_onecycle_schedule(
        STEPS, PEAK, WARMUP / STEPS, div_factor=25, final_div_factor=1e3
    )
    np.testing.assert_allclose(
        rates("one_cycle", final_lr_fraction=1 / 25e3), of_optax(cycle), rtol=1e-4, atol=1e-8
    )


def test_options():
    halves = [by_hand("step", i, every=7, gamma=0.5) for i in range(55)]
    np.testing.assert_allclose(rates("step", step_size=7, gamma=0.5), halves, rtol=1e-5)
    np.testing.assert_allclose(
        rates("wsd", stable_fraction=0.0, final_lr_fraction=0.0)[WARMUP:51],
        PEAK * np.linspace(1, 0, 41),
        atol=1e-7,
    )
    np.testing.assert_allclose(rates("wsd", stable_fraction=1.0)[WARMUP:50], PEAK, rtol=1e-6)
    assert (
        rates("one_cycle", warmup_steps=0)[0]
        == np.float32(PEAK)
        == rates("cosine", warmup_steps=0)[0]
    )


@given(
    st.sampled_from(NAMES), st.integers(2, 200), st.floats(0, 0.9), st.floats(0, 1), st.floats(0, 1)
)
def test_laws(name, steps, rising, end, stable):
    warmup = int(rising * steps)
    of = schedule(
        name, 2.0, steps, warmup_steps=warmup, final_lr_fraction=end, stable_fraction=stable
    )
    found = np.asarray(jax.vmap(of)(EVERY))[: steps + 1]
    assert found.dtype == np.float32 and found.min() >= -1e-6 and found.max() <= 2 * (1 + 1e-6)
    assert np.all(np.diff(found[: warmup + 1]) > 0) and np.all(np.diff(found[warmup:]) <= 1e-6)
    np.testing.assert_allclose(found[warmup], 2, rtol=1e-6)
    if name in ("cosine", "one_cycle") or (
        name == "wsd" and round(stable * (steps - warmup)) < steps - warmup
    ):
        np.testing.assert_allclose(found[-1], 2 * end, rtol=1e-4, atol=1e-6)


def test_a_schedule_drives_an_optimiser():
    of = schedule("wsd", PEAK, STEPS, warmup_steps=WARMUP)
    optimizer = optax.sgd(of)
    update = jax.jit(optimizer.update)
    state = optimizer.init(jnp.zeros(()))
    taken = []
    for _ in range(STEPS):
        step, state = update(jnp.ones(()), state)
        taken.append(-float(step))
    np.testing.assert_allclose(taken, rates("wsd")[:STEPS], rtol=1e-6)


# ------------------------------------------------------------------------------------------ plateau


def scales(values, **options) -> list[float]:
    optimizer = optax.chain(optax.sgd(1.0), reduce_on_plateau(**options))
    params = jnp.zeros(())
    state = optimizer.init(params)
    found = []
    update = jax.jit(
        lambda state, value: optimizer.update(jnp.ones(()), state, params, value=value)
    )
    for value in values:
        step, state = update(state, jnp.float32(value))
        found.append(-float(step))
    return found


def test_a_value_that_stalls_lowers_the_rate_and_one_that_falls_does_not():
    assert scales(np.linspace(9, 1, 12), factor=0.5, patience=2) == [1.0] * 12
    assert scales([5.0] * 7, factor=0.5, patience=2) == [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125]
    assert scales([5.0, 5, 4, 4, 4, 4], factor=0.5, patience=2) == [1, 1, 1, 1, 0.5, 0.5]
    assert scales([5.0] * 9, factor=0.1, patience=1, least=0.05)[-1] == pytest.approx(0.05)
    assert scales([5.0] * 7, factor=0.5, patience=1, cooldown=2) == [
        1,
        0.5,
        0.5,
        0.5,
        0.25,
        0.25,
        0.25,
    ]


def test_a_window_averages_noise():
    noisy = [5.0, 3.0] * 8  # 4 on average: nothing new after the first window
    assert (
        scales(noisy, factor=0.5, patience=2, window=2)
        == [1.0] * 5 + [0.5] * 4 + [0.25] * 4 + [0.125] * 3
    )


def test_a_step_gives_the_plateau_its_loss():
    model = mlp.model(mlp.Config(4, (3,), 2))
    optimizer = optax.chain(
        optax.sgd(0.0), reduce_on_plateau(0.5, patience=2)
    )  # a loss that never changes
    step = jax.jit(make_step(model, losses.classification, optimizer))
    state = init_state(jax.jit(model.init)(jax.random.key(0)), optimizer)
    for _ in range(5):
        state, _ = step(
            state, {"features": np.ones((2, 4), np.float32), "labels": np.arange(2, dtype=np.int32)}
        )
    assert float(optax.tree.get(state.opt_state, "scale")) == 0.25


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: schedule("cosin", 1.0, 10),
            "schedule: 'cosin' is not known; allowed: constant, cosine, one_cycle",
        ),
        (
            lambda: schedule("cosine", 1.0, 0),
            "steps: 0 given; allowed: a whole number of at least 1",
        ),
        (
            lambda: schedule("cosine", 1.0, 10, warmup_steps=10),
            "warmup_steps: 10 given for 10 steps; allowed: 0 to 9",
        ),
        (
            lambda: schedule("wsd", 1.0, 10, stable_fraction=1.5),
            "stable_fraction: 1.5 given; allowed: 0 to 1",
        ),
        (lambda: schedule("step", 1.0, 10, gamma=0.0), "gamma: 0.0 given"),
        (
            lambda: schedule("step", 1.0, 10, step_size=0),
            "step_size: 0 given; allowed: a whole number of at least 1",
        ),
        (
            lambda: reduce_on_plateau(1.0),
            "factor, least, rtol: 1.0, 0.01, 0.0001 given; allowed: between 0 and 1",
        ),
        (
            lambda: reduce_on_plateau(patience=0),
            "patience: 0 given; allowed: a whole number of at least 1",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError) as error:
        call()
    assert message in str(error.value)
