"""Splits of rows: training, validation and test parts, or folds; by seed, class and group.

>>> labels = np.array([0] * 10 + [1] * 5)
>>> train, held = split(15, (0.8, 0.2), labels=labels)
>>> np.bincount(labels[train]).tolist(), np.bincount(labels[held]).tolist()
([8, 4], [2, 1])
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int, Shaped

from jaxmodel.errors import InputError, at_least

# in the place of a stream's epoch in the key, so that no stream draws its order from these words
_KEY = 2**64 - 1


def split(
    count: int,
    parts: Sequence[float] = (0.8, 0.1, 0.1),
    *,
    seed: int = 0,
    labels: Int[np.ndarray, " N"] | None = None,
    groups: Shaped[np.ndarray, " N"] | None = None,
) -> tuple[Int[np.ndarray, " _"], ...]:
    """Split rows into parts at random, each row into exactly one.

    With labels, each part gets its share of every class, rounded up or down. With groups, all rows
    of a group are in one part; the shares, also those of the classes, are then approximate: groups
    are placed greedily, the largest first.

    Args:
      count: number of rows N.
      parts: shares above 0 that sum to 1.
      seed: 0 to 2^64 - 1.
      labels: `[N]`, to stratify by.
      groups: `[N]`, such as the patient, the speaker or the document of each row.

    Returns:
      Indices of rows, ascending, for each part.

    Raises:
      InputError: shares that do not sum to 1, labels or groups of another length, or a part without
        rows.
    """
    shares = np.asarray(parts, np.float64)
    if shares.ndim != 1 or not shares.size or shares.min() <= 0 or abs(shares.sum() - 1) > 1e-6:
        raise InputError(f"parts: {list(parts)} given; allowed: shares above 0 that sum to 1")
    where = _parts(count, shares, seed, labels, groups)
    found = tuple(np.flatnonzero(where == part) for part in range(len(shares)))
    if empty := [share for share, rows in zip(parts, found, strict=True) if not rows.size]:
        raise InputError(
            f"parts: a share of {empty[0]} gets none of {count} rows; give more rows or groups, or "
            "larger shares"
        )
    return found


def kfold(
    count: int,
    folds: int = 5,
    *,
    seed: int = 0,
    labels: Int[np.ndarray, " N"] | None = None,
    groups: Shaped[np.ndarray, " N"] | None = None,
) -> list[tuple[Int[np.ndarray, " _"], Int[np.ndarray, " _"]]]:
    """Return for each fold the rows outside of it, for training, and those in it, held out.

    Every row is held out once.

    Args:
      count: number of rows N.
      folds: number of folds, from 2 to the number of rows (or groups).
      seed: see `split`.
      labels: see `split`.
      groups: see `split`.

    Raises:
      InputError: as for `split`, or a number of folds out of range.

    >>> [(train.tolist(), held.tolist()) for train, held in kfold(4, 2)]
    [([1, 3], [0, 2]), ([0, 2], [1, 3])]
    """
    at_least("folds", folds, 2)
    most = count if groups is None else len(np.unique(groups))
    if folds > most:
        raise InputError(
            f"folds: {folds} given; allowed: at most {most}, the number of "
            f"{'rows' if groups is None else 'groups'}"
        )
    where = _parts(count, np.full(folds, 1 / folds), seed, labels, groups)
    return [(np.flatnonzero(where != fold), np.flatnonzero(where == fold)) for fold in range(folds)]


def subset(arrays: Mapping[str, np.ndarray], rows: Int[np.ndarray, " _"]) -> dict[str, np.ndarray]:
    """Select these rows of each array, as a dict for `Stream`.

    >>> subset({"x": np.arange(4) * 10, "labels": np.arange(4)}, np.array([3, 1]))
    {'x': array([30, 10]), 'labels': array([3, 1])}
    """
    return {name: array[rows] for name, array in arrays.items()}


def _parts(
    count: int, shares: np.ndarray, seed: int, labels: np.ndarray | None, groups: np.ndarray | None
) -> np.ndarray:
    """Return the part of each row."""
    at_least("count", count)
    if not 0 <= seed < 2**64:
        raise InputError(f"seed: {seed} given; allowed: 0 to 2^64 - 1")
    for name, given in (("labels", labels), ("groups", groups)):
        if given is not None and given.shape != (count,):
            raise InputError(
                f"{name}: the shape {list(given.shape)} given for {count} rows; allowed: one for "
                "each row"
            )
    classes = (
        np.zeros(count, np.int64) if labels is None else np.unique(labels, return_inverse=True)[1]
    )
    # Raw words, since only these are the same in all versions of NumPy.
    words = np.random.Philox(key=np.array([seed, _KEY], np.uint64)).random_raw(count)
    if groups is not None:
        return _by_group(shares, classes, np.unique(groups, return_inverse=True)[1], words)
    where = np.empty(count, np.int64)
    # rows of the classes so far that each part lacks
    behind = np.zeros(len(shares))
    for label in range(classes.max() + 1):
        rows = np.flatnonzero(classes == label)
        rows = rows[np.argsort(words[rows], kind="stable")]
        wanted = np.round(len(rows) * shares, 9)  # 0.1 * 30 is 3
        sizes = np.floor(wanted).astype(np.int64)
        behind += wanted - sizes
        # no part may go beyond its share rounded up
        open_ = np.where(wanted > sizes, behind, -math.inf)
        extra = np.argsort(-open_, kind="stable")[: len(rows) - sizes.sum()]
        sizes[extra] += 1
        behind[extra] -= 1
        where[rows] = np.repeat(np.arange(len(shares)), sizes)
    return where


def _by_group(
    shares: np.ndarray, classes: np.ndarray, groups: np.ndarray, words: np.ndarray
) -> np.ndarray:
    """Put each group, the largest first, where it brings the classes nearest to their shares."""
    table = np.zeros((groups.max() + 1, classes.max() + 1))
    np.add.at(table, (groups, classes), 1)
    missing = shares[:, None] * table.sum(axis=0)  # [parts, classes]
    weight = 1 / table.sum(axis=0)  # a rare class counts as much as a common one
    chosen = np.zeros(len(table), np.int64)
    for group in np.lexsort((words[: len(table)], -table.sum(axis=1))):
        before, after = (
            np.sum(gap**2 * weight, axis=1) for gap in (missing, missing - table[group])
        )
        chosen[group] = np.argmin(np.round(after - before, 9))
        missing[chosen[group]] -= table[group]
    return chosen[groups]
