"""Confident learning against a count row by row, and on labels that were flipped on purpose."""

from __future__ import annotations

import numpy as np
import pytest

from jaxmodel.contrib import confident_learning
from jaxmodel.errors import InputError

RNG = np.random.default_rng(0)


def by_hand(p, labels):
    rows, classes = p.shape
    thresholds = [
        p[labels == c, c].mean() if (labels == c).any() else np.inf for c in range(classes)
    ]
    counted = np.zeros((classes, classes))
    suspects = []
    for i in range(rows):
        sure = [c for c in range(classes) if p[i, c] >= thresholds[c]]
        if sure:
            seems = max(sure, key=lambda c: p[i, c])
            counted[labels[i], seems] += 1
            if seems != labels[i]:
                suspects.append((p[i, labels[i]] - p[i, seems], i, seems))
    for c in range(classes):
        if counted[c].sum():
            counted[c] *= (labels == c).sum() / counted[c].sum()
    return thresholds, counted / rows, [(i, seems) for _, i, seems in sorted(suspects)]


@pytest.mark.parametrize("classes", [2, 5])
def test_it_equals_a_count_row_by_row(classes):
    p = RNG.dirichlet(np.ones(classes), 60)
    labels = RNG.integers(0, classes - (classes > 2), 60)  # of five classes the last has no row
    report = confident_learning(p, labels)
    thresholds, joint, suspects = by_hand(p, labels)
    np.testing.assert_allclose(report.thresholds, thresholds)
    np.testing.assert_allclose(report.joint, joint)
    assert list(zip(report.suspects.tolist(), report.suggested.tolist(), strict=True)) == suspects
    assert report.joint.sum() == pytest.approx(1)
    assert report.noise == pytest.approx(1 - np.trace(joint))


def test_flipped_labels_are_found():
    true = RNG.integers(0, 4, 400)
    labels = np.where(RNG.random(400) < 0.2, (true + 1) % 4, true)
    z = 4 * np.eye(4)[true] + RNG.normal(0, 0.5, (400, 4))
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    report = confident_learning(p, labels)
    flipped = set(np.flatnonzero(labels != true).tolist())
    found = set(report.suspects.tolist())
    assert len(found & flipped) > 0.9 * len(flipped) and len(found - flipped) < 0.1 * len(flipped)
    assert (report.suggested == true[report.suspects]).mean() > 0.95
    assert report.noise == pytest.approx(len(flipped) / 400, abs=0.03)


def test_a_prediction_that_is_equal_for_all_accuses_nobody():
    report = confident_learning(np.full((6, 2), 0.5), np.array([0, 0, 0, 0, 0, 0]))
    assert report.suspects.size == 0 and report.noise == 0


@pytest.mark.parametrize(
    ("p", "labels", "message"),
    [
        (np.ones((0, 2)), np.zeros(0, int), "the shapes [0, 2], int64 [0] given"),
        (np.ones((3, 2)), np.zeros(3, int), "rows are not distributions"),
        (np.ones((3, 2)) / 2, np.array([0, 1, 2]), "labels: from 0 to 2 given; allowed: 0 to 1"),
    ],
)
def test_bad_input(p, labels, message):
    with pytest.raises(InputError) as error:
        confident_learning(p, labels)
    assert message in str(error.value)
