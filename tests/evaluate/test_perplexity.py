"""Perplexity against its definition in NumPy, and the bootstrap interval against its meaning."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import evaluate
from jaxmodel.errors import InputError
from jaxmodel.models import llama

MODEL = llama.model(llama.SIZES["tiny"])


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


@pytest.mark.parametrize("chunk", [128, 7, 1])
def test_token_nll_is_its_definition(chunk, params):
    windows = np.random.default_rng(0).integers(0, 256, (3, 20))
    nll = evaluate.token_nll(MODEL, params, windows, chunk=chunk)
    logits = np.asarray(jax.jit(MODEL.apply)(params, jnp.asarray(windows)).logits, np.float64)[
        :, :-1
    ]
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(
        nll, -np.take_along_axis(log_probs, windows[:, 1:, None], -1)[..., 0], atol=1e-5
    )


def test_summary(params):
    windows = np.random.default_rng(0).integers(0, 256, (2, 20))
    nll = evaluate.token_nll(MODEL, params, windows)
    score = evaluate.perplexity(MODEL, params, windows)
    assert score.nll == pytest.approx(nll.mean()) and score.predictions == 38
    assert score.perplexity == pytest.approx(np.exp(score.nll))
    assert score.interval[0] < score.nll < score.interval[1]


def test_bootstrap_of_independent_values_has_the_width_of_theory():
    values = np.random.default_rng(0).normal(size=(8, 512))
    low, high = evaluate.bootstrap(values, block=1)
    assert (high - low) / 2 == pytest.approx(1.96 / np.sqrt(values.size), rel=0.1)


def test_bootstrap_of_blocks_is_wider_where_neighbours_agree():
    values = np.repeat(np.random.default_rng(0).normal(size=(8, 16)), 32, axis=1)
    widths = [np.diff(evaluate.bootstrap(values, block=block))[0] for block in (1, 32)]
    assert widths[1] > 4 * widths[0]


def test_bootstrap_repeats():
    values = np.random.default_rng(0).normal(size=(2, 64))
    assert (
        evaluate.bootstrap(values, seed=3)
        == evaluate.bootstrap(values, seed=3)
        != evaluate.bootstrap(values, seed=4)
    )


@pytest.mark.parametrize(
    ("shape", "says"),
    [((0, 9), "nothing to predict"), ((2, 1), "nothing to predict"), ((1, 200), "context of 128")],
)
def test_windows_that_cannot_be_scored(shape, says, params):
    with pytest.raises(InputError, match=says):
        evaluate.token_nll(MODEL, params, np.zeros(shape, np.int32))


def test_a_chunk_of_nothing(params):
    with pytest.raises(InputError, match="chunk: 0 given; allowed: a whole number of at least 1"):
        evaluate.token_nll(MODEL, params, np.zeros((1, 9), np.int32), chunk=0)


def test_a_result_prints_as_one_short_line():
    from jaxmodel.evaluate.perplexity import Perplexity

    shown = repr(
        Perplexity(
            3.22247227453718, 25.090073116352055, 1020, (2.92109312373293, 3.566567221158673)
        )
    )
    assert shown == "Perplexity(25.09: nll 3.2225 [2.921, 3.567], 1,020 predictions)"
