"""Labels as distributions: from whole numbers, smoothed; and how much each class counts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmodel.errors import InputError


def distribution(labels: Array, classes: int) -> Float[Array, "... C"]:
    """Labels as distributions over the classes; a number that is no class gives NaN, so that the
    loss shows it.

    Args:
      labels: classes `[...]`, or distributions `[..., C]`, which stay as they are.
      classes: C.

    Raises:
      InputError: distributions over another number of classes, or labels that are no numbers.

    >>> distribution(jnp.array([2, 0]), 3).tolist()
    [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    if jnp.issubdtype(labels.dtype, jnp.floating):
        if labels.shape[-1:] != (classes,):
            raise InputError(
                f"labels: distributions of shape {list(labels.shape)} given; needed are {classes} "
                f"classes at last"
            )
        return labels.astype(jnp.float32)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise InputError(
            f"labels: {labels.dtype} given; allowed: whole numbers from 0, as .astype(np.int32) "
            f"makes of True and False"
        )
    known = (labels >= 0) & (labels < classes)
    return jnp.where(
        known[..., None], jax.nn.one_hot(labels, classes, dtype=jnp.float32), jnp.float32(jnp.nan)
    )


def smooth(
    labels: Float[Array, "... C"], share: float, means: Float[Array, "_ _"] | None = None
) -> Float[Array, "... C"]:
    """`(1 - s) t + s u`, where u is uniform (Szegedy et al., 2015), or the mean prediction of the
    label's class.

    Args:
      labels: t, distributions.
      share: s, from 0 to 1.
      means: a distribution for each class, as `class_means` gives it: online label smoothing (Zhang
        et al., 2020), whose weight of the hard label is 1 - s. None for the uniform one.

    Raises:
      InputError: a share outside of 0 to 1, or means of another number of classes.

    >>> smooth(jnp.array([1.0, 0.0, 0.0, 0.0]), 0.5).tolist()
    [0.625, 0.125, 0.125, 0.125]
    """
    classes = labels.shape[-1]
    if not 0 <= share <= 1:
        raise InputError(f"smoothing: {share} given; allowed: 0 to 1")
    if means is None:
        return (1 - share) * labels + share / classes
    if means.shape != (classes, classes):
        raise InputError(
            f"means: the shape {list(means.shape)} given; needed is {[classes, classes]}"
        )
    towards = jnp.einsum("...c,cd->...d", labels, means.astype(jnp.float32), precision="highest")
    return (1 - share) * labels + share * towards


def class_sums(logits: Float[Array, "N C"], labels: Int[Array, " N"]) -> Float[Array, "C C"]:
    """Of each class, the sum of the predicted distributions of its rows that are predicted right;
    sums of batches add up.

    Args:
      logits: of N rows.
      labels: their classes; a row whose label is no class does not count.

    Returns:
      `[C, C]`, the label first. A row of it sums to the number of rows counted.

    >>> class_sums(jnp.array([[9.0, -99.0], [8.0, -99.0]]), jnp.array([0, 1])).tolist()  # only the first is right
    [[1.0, 0.0], [0.0, 0.0]]
    """
    right = jnp.argmax(logits, axis=-1) == labels.astype(jnp.int32)
    chosen = jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.float32) * right[:, None].astype(
        jnp.float32
    )
    return jnp.einsum(
        "nc,nd->cd",
        chosen,
        jax.nn.softmax(logits.astype(jnp.float32), axis=-1),
        precision="highest",
    )


def class_means(sums: Float[Array, "C C"]) -> Float[Array, "C C"]:
    """The mean predicted distribution of each class, for `smooth`: rows of `class_sums` divided by
    their sums.

    A class without a row predicted right has the uniform distribution, as all have before an epoch
    (Zhang et al., 2020).

    Args:
      sums: of an epoch.

    >>> class_means(jnp.array([[1.5, 0.5], [0.0, 0.0]])).tolist()
    [[0.75, 0.25], [0.5, 0.5]]
    """
    counted = jnp.sum(sums, axis=-1, keepdims=True)
    return jnp.where(counted > 0, sums / jnp.where(counted > 0, counted, 1.0), 1 / sums.shape[-1])


def balanced_weights(counts: Int[np.ndarray, " C"]) -> Float[np.ndarray, " C"]:
    """Class weights `N / (C n_c)`: every class counts as much in all, a row 1 on average (King &
    Zeng, 2001).

    Args:
      counts: n_c, the rows of each class, such as `np.bincount(labels)`.

    Raises:
      InputError: a class without rows.

    >>> balanced_weights(np.array([30, 10])).tolist()
    [0.6666666865348816, 2.0]
    """
    counts = _counts(counts)
    return (counts.sum() / (len(counts) * counts)).astype(np.float32)


def effective_weights(
    counts: Int[np.ndarray, " C"], beta: float = 0.999
) -> Float[np.ndarray, " C"]:
    """Class weights in proportion to `(1 - beta) / (1 - beta^n_c)`, 1 on average over the classes
    (Cui et al., 2019).

    Args:
      counts: n_c, the rows of each class.
      beta: from 0, where all are equal, to below 1, where they are as the inverse of the counts.

    Raises:
      InputError: a class without rows, or a beta outside of [0, 1).

    >>> effective_weights(np.array([10, 10_000])).round(2).tolist()
    [1.9800000190734863, 0.019999999552965164]
    """
    if not 0 <= beta < 1:
        raise InputError(f"beta: {beta} given; allowed: from 0 to below 1")
    counts = _counts(counts)
    raw = (1 - beta) / -np.expm1(counts * np.log(beta)) if beta else np.ones(len(counts))
    return (raw * len(raw) / raw.sum()).astype(np.float32)


def _counts(counts: np.ndarray) -> np.ndarray:
    counts = np.asarray(counts, np.float64)
    if counts.ndim != 1 or not counts.size or counts.min() < 1:
        raise InputError(
            f"counts: {counts.tolist()} given; allowed: at least one row of each class"
        )
    return counts
