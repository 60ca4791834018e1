"""Labels as distributions, label smoothing, and class weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxmodel.errors import BELOW_ONE, SHARE, InputError, within


def distribution(labels: Array, classes: int) -> Float[Array, "... C"]:
    """Return labels as distributions over the classes.

    An integer that is not a class gives NaN, so that the loss shows it.

    Args:
      labels: classes `[...]`, or distributions `[..., C]`, which stay as they are.
      classes: C.

    Raises:
      InputError: the distributions have another number of classes, or the labels are not numbers.

    >>> distribution(jnp.array([2, 0]), 3).tolist()
    [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    if jnp.issubdtype(labels.dtype, jnp.floating):
        if labels.shape[-1:] != (classes,):
            raise InputError(
                f"labels: distributions of shape {list(labels.shape)} given; allowed: {classes} "
                "classes on the last axis"
            )
        return labels.astype(jnp.float32)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise InputError(
            f"labels: {labels.dtype} given; allowed: whole numbers from 0, such as "
            ".astype(np.int32) makes from True and False"
        )
    known = (labels >= 0) & (labels < classes)
    return jnp.where(
        known[..., None], jax.nn.one_hot(labels, classes, dtype=jnp.float32), jnp.float32(jnp.nan)
    )


def smooth(
    labels: Float[Array, "... C"], share: float, means: Float[Array, "_ _"] | None = None
) -> Float[Array, "... C"]:
    """Smooth labels: `(1 - s) t + s u`.

    Here u is uniform (Szegedy et al., 2015), or the mean prediction for the label's class.

    Args:
      labels: distributions t.
      share: the share s, from 0 to 1.
      means: a distribution for each class, as `online_label_smoothing` returns it, for online label
        smoothing (Zhang et al., 2020), where the hard label has the weight 1 - s. None for the
        uniform one.

    Raises:
      InputError: the share is outside of 0 to 1, or `means` has another number of classes.

    >>> smooth(jnp.array([1.0, 0.0, 0.0, 0.0]), 0.5).tolist()
    [0.625, 0.125, 0.125, 0.125]
    """
    classes = labels.shape[-1]
    within("smoothing", share, SHARE)
    if means is None:
        return optax.losses.smooth_labels(labels, share)
    if means.shape != (classes, classes):
        raise InputError(
            f"means: the shape {list(means.shape)} given; allowed: {[classes, classes]}"
        )
    towards = jnp.einsum("...c,cd->...d", labels, means.astype(jnp.float32), precision="highest")
    return (1 - share) * labels + share * towards


def class_sums(logits: Float[Array, "N C"], labels: Int[Array, " N"]) -> Float[Array, "C C"]:
    """Sum the predicted distributions of the rows of each class that are predicted correctly.

    The sums of batches can be added.

    Args:
      logits: the logits of N rows.
      labels: the classes of the rows; a row whose label is not a class does not count.

    Returns:
      The sums `[C, C]`, indexed by label, then by class. Each row sums to the number of rows
      counted.

    >>> logits = jnp.array([[9.0, -99.0], [8.0, -99.0]])
    >>> class_sums(logits, jnp.array([0, 1])).tolist()  # only the first row is correct
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


def online_label_smoothing(sums: Float[Array, "C C"]) -> Float[Array, "C C"]:
    """Compute the mean predicted distribution of each class, for `smooth`.

    It is a row of `class_sums` divided by its sum. A class without a correct prediction gets the
    uniform distribution, as all classes do before the first epoch (Zhang et al., 2020).

    Args:
      sums: `class_sums` of an epoch.

    >>> online_label_smoothing(jnp.array([[1.5, 0.5], [0.0, 0.0]])).tolist()
    [[0.75, 0.25], [0.5, 0.5]]
    """
    counted = jnp.sum(sums, axis=-1, keepdims=True)
    return jnp.where(counted > 0, sums / jnp.where(counted > 0, counted, 1.0), 1 / sums.shape[-1])


def balanced_weights(counts: Int[np.ndarray, " C"]) -> Float[np.ndarray, " C"]:
    """Compute class weights `N / (C n_c)`, which give every class the same total weight.

    Their average over the rows is 1 (King & Zeng, 2001).

    Args:
      counts: the number of rows n_c of each class, such as `np.bincount(labels)`.

    Raises:
      InputError: a class has no rows.

    >>> balanced_weights(np.array([30, 10])).tolist()
    [0.6666666865348816, 2.0]
    """
    counts = _counts(counts)
    return (counts.sum() / (len(counts) * counts)).astype(np.float32)


def effective_weights(
    counts: Int[np.ndarray, " C"], beta: float = 0.999
) -> Float[np.ndarray, " C"]:
    """Compute class weights in proportion to `(1 - beta) / (1 - beta^n_c)`.

    Their average over the classes is 1 (Cui et al., 2019).

    Args:
      counts: the number of rows n_c of each class.
      beta: from 0, where all weights are equal, to below 1; near 1 they are inverse to the counts.

    Raises:
      InputError: a class has no rows, or beta is outside of [0, 1).

    >>> effective_weights(np.array([10, 10_000])).round(2).tolist()
    [1.9800000190734863, 0.019999999552965164]
    """
    within("beta", beta, BELOW_ONE)
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
