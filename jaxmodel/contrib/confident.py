"""Which labels are probably wrong, from predictions by a model that has not seen them: confident
learning.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from jaxmodel.brief import briefly
from jaxmodel.errors import InputError


@briefly
@dataclasses.dataclass(frozen=True, eq=False)
class LabelReport:
    """What `confident_learning` finds.

    Attributes:
      joint: `[C, C]`, the estimated share of rows by given label (first) and true class; sums to 1.
      thresholds: `[C]`, the mean probability of a class over the rows labelled so; infinite for a
        class that no row has.
      suspects: rows whose label is probably wrong, the surest first.
      suggested: the class that each of them probably is.
    """

    joint: Float[np.ndarray, "C C"]
    thresholds: Float[np.ndarray, " C"]
    suspects: Int[np.ndarray, " K"]
    suggested: Int[np.ndarray, " K"]

    @property
    def noise(self) -> float:
        """The estimated share of rows whose label is wrong: what the joint has off its diagonal."""
        return float(1 - np.trace(self.joint))


def confident_learning(
    probabilities: Float[np.ndarray, "N C"], labels: Int[np.ndarray, " N"]
) -> LabelReport:
    """Count the rows that are confidently of another class than their label says (Northcutt et al.,
    2021).

    A row is confidently of class j where its probability of j is at least the mean one of the rows
    labelled j; of several such classes, of the most probable. The counts by label and class, scaled
    so that each label has as many as there are rows with it, are the joint distribution; those off
    the diagonal are the suspects, ranked by how much less probable their label is.

    Args:
      probabilities: of each row, by a model that was not trained on it (as from the held-out parts
        of a `data.kfold`).
      labels: as given.

    Raises:
      InputError: shapes that do not fit, rows that are no distributions, labels that are no
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
            f"probabilities, labels: the shapes {given} given; needed are [N, C] and whole "
            f"numbers [N]"
        )
    rows, classes = p.shape
    if not (p >= 0).all() or not np.allclose(p.sum(axis=1), 1, atol=1e-3):
        raise InputError(
            "probabilities: rows that are no distributions given; needed are numbers from 0 on "
            "that sum to 1"
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise InputError(
            f"labels: from {labels.min()} to {labels.max()} given; allowed: 0 to {classes - 1}"
        )
    counts = np.bincount(labels, minlength=classes)
    own = p[np.arange(rows), labels]
    sums = np.bincount(labels, weights=own, minlength=classes)
    thresholds = np.divide(sums, counts, out=np.full(classes, np.inf), where=counts > 0)
    above = (
        p >= thresholds - 1e-12
    )  # a class whose rows all have one probability still reaches its mean
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
