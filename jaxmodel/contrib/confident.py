"""Confident learning: find wrong labels by predictions of a model that has not seen them."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from jaxmodel.brief import briefly
from jaxmodel.errors import InputError


@briefly
@dataclasses.dataclass(frozen=True, eq=False)
class LabelReport:
    """The result of `confident_learning`.

    Attributes:
      joint: `[C, C]`, the estimated share of rows by given label (first axis) and true class; sums
        to 1.
      thresholds: `[C]`, the mean probability of each class over the rows with that label; infinite
        for a class without rows.
      suspects: indices of the rows whose label is probably wrong, the most certain first.
      suggested: the probable class of each suspect.
    """

    joint: Float[np.ndarray, "C C"]
    thresholds: Float[np.ndarray, " C"]
    suspects: Int[np.ndarray, " K"]
    suggested: Int[np.ndarray, " K"]

    @property
    def noise(self) -> float:
        """Return the estimated share of wrong labels: the sum of `joint` off its diagonal."""
        return float(1 - np.trace(self.joint))


def confident_learning(
    probabilities: Float[np.ndarray, "N C"], labels: Int[np.ndarray, " N"]
) -> LabelReport:
    """Find rows that are confidently of another class than their label (Northcutt et al., 2021).

    A row is confidently of class j if its probability of j is at least the mean probability of j
    over the rows labelled j; among several such classes the most probable counts. The counts by
    label and class, scaled so that each label keeps its number of rows, give the joint
    distribution. Rows off its diagonal are the suspects, ranked by how much less probable their
    label is than the other class.

    Args:
      probabilities: predictions for each row by a model that was not trained on it (such as those
        for the held-out parts of a `data.kfold`).
      labels: the given labels.

    Raises:
      InputError: shapes that do not fit, rows that are not distributions, or labels that are no
        classes.

    >>> p = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8], [0.1, 0.9]])
    >>> report = confident_learning(p, np.array([0, 0, 1, 1, 0]))
    >>> report.suspects.tolist(), report.suggested.tolist(), round(report.noise, 2)
    ([4], [1], 0.2)
    """
    p = np.asarray(probabilities, np.float64)
    labels = np.asarray(labels)
    if (
        p.ndim != 2
        or labels.shape != p.shape[:1]
        or labels.dtype.kind not in "iu"
        or not labels.size
    ):
        given = f"{list(p.shape)}, {labels.dtype} {list(labels.shape)}"
        raise InputError(
            f"probabilities, labels: the shapes {given} given; allowed: [N, C] and whole numbers "
            "[N]"
        )
    rows, classes = p.shape
    if not (p >= 0).all() or not np.allclose(p.sum(axis=1), 1, atol=1e-3):
        raise InputError(
            "probabilities: rows are not distributions; allowed: numbers of at least 0 that sum "
            "to 1"
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise InputError(
            f"labels: from {labels.min()} to {labels.max()} given; allowed: 0 to {classes - 1}"
        )
    counts = np.bincount(labels, minlength=classes)
    own = p[np.arange(rows), labels]
    sums = np.bincount(labels, weights=own, minlength=classes)
    thresholds = np.divide(sums, counts, out=np.full(classes, np.inf), where=counts > 0)
    # rows of a class that all have the same probability reach their mean despite rounding
    above = p >= thresholds - 1e-12
    sure = above.any(axis=1)
    seems = np.argmax(np.where(above, p, -1.0), axis=1)
    confident = np.zeros((classes, classes))
    np.add.at(confident, (labels[sure], seems[sure]), 1)
    scale = np.divide(counts, confident.sum(axis=1), out=np.zeros(classes), where=counts > 0)
    found = np.flatnonzero(sure & (seems != labels))
    order = np.argsort(own[found] - p[found, seems[found]], kind="stable")
    return LabelReport(
        confident * scale[:, None] / rows, thresholds, found[order], seems[found][order]
    )
