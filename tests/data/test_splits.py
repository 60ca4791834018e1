"""Splits: every row once, classes in proportion to within one row, groups whole, the same for the
same seed.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from jaxmodel.data import Stream
from jaxmodel.data.splits import kfold, split, subset
from jaxmodel.errors import InputError

SHARES = st.lists(st.integers(1, 20), min_size=2, max_size=5).map(
    lambda n: tuple(x / sum(n) for x in n)
)
LABELS = st.lists(st.integers(-2, 6), min_size=80, max_size=200).map(
    lambda values: np.array(values)
)


@given(SHARES, LABELS, st.integers(0, 2**64 - 1), st.booleans())
def test_every_row_once_and_classes_in_proportion(shares, labels, seed, stratify):
    found = split(len(labels), shares, seed=seed, labels=labels if stratify else None)
    assert sorted(np.concatenate(found).tolist()) == list(range(len(labels)))
    for share, rows in zip(shares, found, strict=True):
        assert np.all(np.diff(rows) > 0)
        assert abs(len(rows) - share * len(labels)) < 1
        for label in np.unique(labels) if stratify else ():
            assert abs(np.sum(labels[rows] == label) - share * np.sum(labels == label)) < 1 - 1e-9


@given(st.integers(2, 9), LABELS, st.integers(0, 99))
def test_folds_hold_out_every_row_once_and_classes_in_proportion(folds, labels, seed):
    found = kfold(len(labels), folds, seed=seed, labels=labels)
    assert sorted(np.concatenate([held for _, held in found]).tolist()) == list(range(len(labels)))
    sizes = [len(held) for _, held in found]
    assert max(sizes) - min(sizes) <= 1
    for rows, held in found:
        assert sorted([*rows.tolist(), *held.tolist()]) == list(range(len(labels)))
        for label in np.unique(labels):
            assert np.sum(labels[held] == label) - np.sum(labels == label) // folds in (0, 1)


@given(st.lists(st.integers(0, 30), min_size=60, max_size=150), st.integers(0, 99), st.booleans())
def test_groups_stay_whole(groups, seed, stratify):
    named = np.array([f"group {g}" for g in [*groups, *range(8)]])
    labels = np.random.default_rng(seed).integers(0, 3, len(named)) if stratify else None
    parts = split(len(named), (0.5, 0.5), seed=seed, groups=named, labels=labels)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(named)))
    assert not set(named[parts[0]]) & set(named[parts[1]])
    largest = np.unique(named, return_counts=True)[1].max()
    if not stratify:
        assert abs(len(parts[0]) - len(parts[1])) <= largest
    for rows, held in kfold(len(named), 4, seed=seed, groups=named, labels=labels):
        assert not set(named[rows]) & set(named[held]) and len(held) > 0


def test_groups_are_stratified():
    """Groups of ten, each of one class: with labels every part gets its share of both."""
    groups = np.repeat(np.arange(40), 10)
    labels = np.repeat((np.arange(40) % 4 == 0).astype(int), 10)
    for part in split(400, (0.5, 0.3, 0.2), groups=groups, labels=labels):
        assert abs(labels[part].mean() - 0.25) < 0.1
    for _, held in kfold(400, 5, groups=groups, labels=labels):
        assert labels[held].sum() == 20 and len(held) == 80


def test_a_seed_decides_and_never_changes():
    drawn = [[rows.tolist() for rows in split(10, (0.5, 0.5), seed=seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    # Written down once: another NumPy must not move rows from training to test.
    assert drawn[0] == [[0, 5, 7, 8, 9], [1, 2, 3, 4, 6]]
    assert set(split(8, (0.5, 0.5))[0].tolist()) != set(
        Stream(np.zeros((8, 2), int), 4).rows(0).tolist()
    )


def test_rows_taken_from_a_split_make_a_stream():
    arrays = {"x": np.arange(20) * 10, "labels": np.arange(20) % 2}
    rows, held = split(20, (0.75, 0.25), labels=arrays["labels"])
    stream = Stream(subset(arrays, rows), batch_size=15)
    batch = stream.batch(0)
    assert sorted(batch["x"].tolist()) == (rows * 10).tolist()
    assert np.all(batch["x"] // 10 % 2 == batch["labels"])
    assert not set(subset(arrays, held)["x"].tolist()) & set(batch["x"].tolist())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: split(0), "count: 0 given; allowed: a whole number of at least 1"),
        (
            lambda: split(9, (0.8, 0.1)),
            "parts: [0.8, 0.1] given; allowed: shares above 0 that sum to 1",
        ),
        (lambda: split(9, (1.1, -0.1)), "parts: [1.1, -0.1] given"),
        (lambda: split(3), "parts: a share of 0.1 gets none of 3 rows"),
        (lambda: split(4, (0.5, 0.5), seed=-1), "seed: -1 given; allowed: 0 to 2^64 - 1"),
        (
            lambda: split(4, (0.5, 0.5), labels=np.arange(3)),
            "labels: the shape [3] given for 4 rows",
        ),
        (
            lambda: split(4, (0.5, 0.5), groups=np.array(["a", "b"])),
            "groups: the shape [2] given for 4 rows",
        ),
        (lambda: kfold(4, 1), "folds: 1 given; allowed: a whole number of at least 2"),
        (lambda: kfold(4, 5), "folds: 5 given; allowed: at most 4, the number of rows"),
        (
            lambda: kfold(4, 3, groups=np.array([0, 0, 1, 1])),
            "folds: 3 given; allowed: at most 2, the number of groups",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError) as error:
        call()
    assert message in str(error.value)
