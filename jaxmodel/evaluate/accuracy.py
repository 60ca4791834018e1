"""Accuracy of a classifier, with a confidence interval."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxmodel import tree
from jaxmodel.brief import briefly
from jaxmodel.errors import InputError, at_least
from jaxmodel.progress import progress


@briefly
@dataclasses.dataclass(frozen=True)
class Accuracy:
    """The accuracy of a classifier.

    Attributes:
      value: the share of rows that it classifies correctly.
      right: number of those rows.
      rows: number of all rows.
      interval: 95 % confidence interval of the share (Wilson, 1927), also valid near 0 and 1.
    """

    value: float
    right: int
    rows: int
    interval: tuple[float, float]


def accuracy(
    predict: Callable[[tree.Params, Float[np.ndarray, "N ..."]], jax.Array],
    params: tree.Params,
    x: Float[np.ndarray, "N ..."],
    labels: Int[np.ndarray, " M"],
    *,
    top: int = 1,
    batch: int = 500,
) -> Accuracy:
    """Compute the share of rows whose label is among the classes with the `top` largest scores.

    Args:
      predict: `(params, x) -> [B, C]`: logits or probabilities; jit it for speed.
      params: the first argument of `predict`.
      x: the inputs, rows along the first axis.
      labels: the class of each row.
      top: number of classes that count as a hit.
      batch: number of rows per call; the last batch is filled up, so that nothing is compiled
        twice.

    Raises:
      InputError: no rows, another number of labels than rows, a label that is not a class, or a
        size below 1.

    >>> scores = np.asarray([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]], np.float32)
    >>> found = accuracy(lambda params, x: x, {}, scores, np.asarray([1, 0, 1, 1]))
    >>> found.value, found.right, found.rows
    (0.75, 3, 4)
    """
    at_least("top", top)
    at_least("batch", batch)
    if len(x) < 1 or labels.shape != (len(x),):
        raise InputError(
            f"labels: shape {labels.shape} given for {len(x)} rows; allowed: one label for each "
            "row, and at least one row"
        )
    tree.check(params)
    right = 0
    for start in progress(range(0, len(x), batch), "accuracy"):
        rows = x[start : start + batch]
        wanted = labels[start : start + batch]
        filled = (
            np.concatenate([rows, np.repeat(rows[-1:], batch - len(rows), axis=0)])
            if len(x) > batch
            else rows
        )
        scores = np.asarray(predict(params, filled))[: len(rows)]
        if wanted.min() < 0 or wanted.max() >= scores.shape[-1]:
            raise InputError(
                f"labels: {wanted.min()} to {wanted.max()} given; allowed: 0 to "
                f"{scores.shape[-1] - 1}"
            )
        mine = np.take_along_axis(scores, wanted[:, None].astype(np.int64), axis=-1)
        # An equal score of another class counts against the label, and so does NaN: equal scores
        # for all classes tell nothing.
        right += int(np.sum(np.sum(~(scores < mine), axis=-1) <= top))
    return Accuracy(right / len(x), right, len(x), _wilson(right, len(x)))


def _wilson(right: int, rows: int, z: float = 1.959964) -> tuple[float, float]:
    share = right / rows
    middle = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = (
        z / (1 + z * z / rows) * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    )
    return middle - half, middle + half
