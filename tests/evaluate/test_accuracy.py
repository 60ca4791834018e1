"""Accuracy counts what is right, whatever the batches; its interval is Wilson's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from jaxmodel import evaluate
from jaxmodel.errors import InputError

SCORES = np.random.default_rng(0).normal(size=(103, 5)).astype(np.float32)
LABELS = np.random.default_rng(1).integers(0, 5, 103)


def predict(params, x):
    return x


@pytest.mark.parametrize("batch", [1, 10, 103, 1000])
@pytest.mark.parametrize("top", [1, 3])
def test_share_of_the_rows_that_are_right(batch, top):
    shapes = []

    def seen(params, x):
        shapes.append(x.shape)
        return x

    found = evaluate.accuracy(seen, {}, SCORES, LABELS, top=top, batch=batch)
    best = np.argsort(-SCORES, axis=1)[:, :top]
    right = np.sum(np.any(best == LABELS[:, None], axis=1))
    assert (found.right, found.rows, found.value) == (right, 103, right / 103)
    assert len(set(shapes)) == 1  # one program for all batches


@pytest.mark.parametrize("right", [0, 1, 60, 103])
def test_the_interval_is_wilsons(right):
    scores = np.eye(2, dtype=np.float32)[np.arange(103) % 2]
    labels = np.where(np.arange(103) < right, np.arange(103) % 2, 1 - np.arange(103) % 2)
    found = evaluate.accuracy(predict, {}, scores, labels)
    want = stats.binomtest(right, 103).proportion_ci(method="wilson")
    np.testing.assert_allclose(found.interval, (want.low, want.high), atol=1e-6)


def test_equal_scores_and_nan_are_wrong():
    """A model that gives every class the same is no model of class 0."""
    zeros = np.zeros((4, 3), np.float32)
    labels = np.array([0, 1, 2, 0])
    assert evaluate.accuracy(predict, {}, zeros, labels).right == 0
    assert evaluate.accuracy(predict, {}, zeros, labels, top=3).right == 4
    assert evaluate.accuracy(predict, {}, np.full((4, 3), np.nan, np.float32), labels).right == 0


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (LABELS[:-1], {}, r"labels: shape \(102,\) given for 103 rows"),
        (LABELS + 1, {}, "labels: 1 to 5 given; allowed: 0 to 4"),
        (LABELS, {"top": 0}, "top: 0 given"),
        (LABELS, {"batch": 0}, "batch: 0 given"),
    ],
)
def test_what_is_refused(labels, options, message):
    with pytest.raises(InputError, match=message):
        evaluate.accuracy(predict, {}, SCORES, labels, **options)
