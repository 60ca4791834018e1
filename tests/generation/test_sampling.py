from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st

from jaxmodel.errors import InputError
from jaxmodel.generation.sampling import GREEDY, SamplingParams, filter_logits, sample


def reference(logits, sampling, seen):
    """The probabilities that HF transformers' processors leave, one row, in float64; those equal to
    a kept one stay.
    """
    x = logits.astype(np.float64)
    x = np.where(
        seen, np.where(x < 0, x * sampling.repetition_penalty, x / sampling.repetition_penalty), x
    )
    x = x / sampling.temperature
    if 0 < sampling.top_k < len(x):
        x = np.where(x < np.sort(x)[-sampling.top_k], -np.inf, x)
    if sampling.top_p < 1:
        order = np.argsort(x, kind="stable")
        mass = np.cumsum(softmax(x)[order])
        assume(np.all(np.abs(mass - (1 - sampling.top_p)) > 1e-5))  # float32 may decide either way
        drop = mass <= 1 - sampling.top_p
        drop[-1] = False
        x = np.where(x < x[order][~drop].min(), -np.inf, x)
    if sampling.min_p > 0:
        share = softmax(x) / softmax(x).max()
        assume(np.all(np.abs(share - sampling.min_p) > 1e-6) or sampling.min_p == 1)
        x = np.where(share < sampling.min_p, -np.inf, x)
    return softmax(x)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


SAMPLINGS = [
    SamplingParams(temperature, top_k, top_p, min_p, penalty)
    for temperature, top_k, top_p, min_p, penalty in [
        (1.0, 0, 1.0, 0.0, 1.0),
        (0.7, 0, 1.0, 0.0, 1.3),
        (2.0, 1, 1.0, 0.0, 0.5),
        (0.7, 3, 1.0, 0.0, 1.0),
        (1.0, 9, 0.01, 0.0, 1.0),
        (1.0, 0, 0.5, 0.0, 1.0),
        (2.0, 0, 0.9, 0.0, 1.3),
        (0.3, 0, 0.999, 0.0, 1.0),
        (2.0, 4, 0.8, 0.0, 1.0),
        (1.0, 0, 1.0, 0.1, 1.0),
        (1.0, 0, 1.0, 1.0, 1.3),
        (2.0, 6, 0.95, 0.02, 1.3),
    ]
]
jitted_filter = jax.jit(filter_logits, static_argnames="sampling")


@pytest.mark.parametrize("sampling", SAMPLINGS)
@settings(deadline=None, max_examples=60)
@given(
    logits=st.lists(st.integers(-40, 40), min_size=8, max_size=8),
    seen=st.lists(st.booleans(), min_size=8, max_size=8),
)
def test_filters_as_the_reference(sampling, logits, seen):
    x, marks = (
        np.array(logits, np.float32) / 8,
        np.array(seen),
    )  # few values, so that many are equal
    expected = reference(x, sampling, marks)
    got = jitted_filter(jnp.asarray(x)[None], sampling, jnp.asarray(marks)[None])[0]
    np.testing.assert_array_equal(np.isfinite(got), expected > 0)
    np.testing.assert_allclose(jax.nn.softmax(got, axis=-1), expected, rtol=1e-4, atol=1e-7)


def test_greedy_is_argmax_and_ties_go_to_the_lowest_id():
    logits = jnp.array([[0.0, 3.0, 3.0], [-1.0, -1.0, -2.0], [-jnp.inf, -jnp.inf, -5.0]])
    assert sample(logits, None, GREEDY).tolist() == [1, 0, 2]
    x = jax.random.normal(jax.random.key(0), (16, 1000))
    np.testing.assert_array_equal(sample(x, None, GREEDY), np.argmax(np.asarray(x), axis=-1))


def test_greedy_heeds_the_repetition_penalty():
    seen = jnp.array([[True, True, False]])
    sampling = SamplingParams(temperature=0.0, repetition_penalty=2.0)
    assert sample(jnp.array([[4.0, 1.0, 2.5]]), None, sampling, seen).tolist() == [2]
    assert sample(jnp.array([[-1.0, -1.1, -1.9]]), None, sampling, seen).tolist() == [2]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_softmax(temperature):
    n = 20_000
    logits = np.array([2.0, 0.0, 1.0, -1.0, 0.5], np.float32)
    keys = jax.random.split(jax.random.key(7), n)
    ids = sample(jnp.broadcast_to(jnp.asarray(logits), (n, 5)), keys, SamplingParams(temperature))
    share = np.bincount(np.asarray(ids), minlength=5) / n
    assert np.abs(share - softmax(logits / temperature)).sum() < 0.02


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(0.9),
        SamplingParams(0.9, top_k=20),
        SamplingParams(2.0, top_p=0.7, min_p=0.01),
    ],
)
def test_a_row_does_not_see_the_others(sampling):
    logits = 2 * jax.random.normal(jax.random.key(0), (6, 500))
    keys = jax.random.split(jax.random.key(1), 6)
    together = sample(logits, keys, sampling).tolist()
    assert together == [
        int(sample(logits[i : i + 1], keys[i : i + 1], sampling)[0]) for i in range(6)
    ]
    assert together == jax.jit(sample, static_argnames="sampling")(logits, keys, sampling).tolist()


@pytest.mark.parametrize(
    "logits", [[3e38, -3e38, 0.0], [-jnp.inf, 0.0, -jnp.inf], [-3e38, -3e38, -jnp.inf]]
)
def test_extreme_logits_give_a_token_that_is_allowed(logits):
    x = jnp.array([logits] * 4)
    keys = jax.random.split(jax.random.key(0), 4)
    ids = sample(x, keys, SamplingParams(1e-5, top_k=2, top_p=1e-9, min_p=1.0))
    assert all(logits[i] == max(logits) for i in ids.tolist())


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("temperature", -0.1, "0 (greedy) or above"),
        ("temperature", float("nan"), "0 (greedy) or above"),
        ("temperature", float("inf"), "0 (greedy) or above"),
        ("top_k", -1, "0 (off)"),
        ("top_p", 0.0, "above 0, at most 1"),
        ("top_p", 1.5, "above 0, at most 1"),
        ("min_p", -0.1, "0 (off) to 1"),
        ("min_p", 1.1, "0 (off) to 1"),
        ("repetition_penalty", 0.0, "above 0"),
    ],
)
def test_refuses_bad_values(name, value, allowed):
    with pytest.raises(InputError) as error:
        SamplingParams(**{name: value})
    assert (
        name in str(error.value) and repr(value) in str(error.value) and allowed in str(error.value)
    )
