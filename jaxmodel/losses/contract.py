"""The type of a loss, and the weighted mean that every loss computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodel import tree
from jaxmodel.data.augment.base import IGNORED
from jaxmodel.models import Model


@runtime_checkable
class Loss(Protocol):
    """The type of a loss; see `jaxmodel.losses`."""

    def __call__(
        self,
        model: Model,
        params: tree.Params,
        batch: Mapping[str, Array],
        rng: Array | None = None,
        *,
        train: bool = True,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Return the mean over the rows or tokens of a batch, and metrics.

        Args:
          model: the model.
          params: its parameters.
          batch: the arrays of a batch by name, each `[B, ...]`.
          rng: the key of this step, or None for no randomness.
          train: False for evaluation.

        Returns:
          The mean, a float32 scalar, and named scalars. `weight` among them is what the mean is
          over: the number of rows or tokens, or the sum of their weights.
        """
        ...


def row_weights(batch: Mapping[str, Array], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Return the batch's `weights`, broadcast over positions if they are per row, or ones."""
    if "weights" not in batch:
        return jnp.ones(shape, jnp.float32)
    weights = batch["weights"].astype(jnp.float32)
    return jnp.broadcast_to(
        weights.reshape(*weights.shape, *[1] * (len(shape) - weights.ndim)), shape
    )


def counting(labels: Array, weights: Float[Array, "..."]) -> tuple[Array, Float[Array, "..."]]:
    """Return labels (or targets) and weights, where rows that do not count are 0 in both.

    A row does not count if its weight is 0 or its integer label is `IGNORED`. Its label is replaced
    by 0, since a factor of 0 alone would leave NaN, in the gradient too, if the label is NaN.

    >>> labels, weights = counting(jnp.array([3, -100, -1]), jnp.array([1.0, 1.0, 0.0]))
    >>> labels.tolist(), weights.tolist()
    ([3, 0, 0], [1.0, 0.0, 0.0])
    """
    if jnp.issubdtype(labels.dtype, jnp.integer):
        weights = jnp.where(labels == IGNORED, 0.0, weights)
    return only(labels, weights), weights


def only(values: Array, weights: Float[Array, "..."]) -> Array:
    """Return values `[B, ...]` where the weight is above 0, and 0 elsewhere."""
    counts = (weights > 0).reshape(*weights.shape, *[1] * (values.ndim - weights.ndim))
    return jnp.where(counts, values, jnp.zeros((), values.dtype))


def model_inputs(batch: Mapping[str, Array], *without: str) -> dict[str, Array]:
    """Return the fields of a batch that the model reads.

    These are all but those in `without` and `weights`; from row weights the model gets `counts`,
    which rows count.
    """
    inputs = {name: a for name, a in batch.items() if name not in (*without, "weights")}
    weights = batch.get("weights")
    return inputs if weights is None or weights.ndim != 1 else {**inputs, "counts": weights > 0}


def weighted_mean(values: Float[Array, "..."], weights: Float[Array, "..."]) -> Float[Array, ""]:
    """Compute `sum w x / sum w`; 0 where all weights are 0.

    A value with weight 0 may be NaN.

    >>> float(weighted_mean(jnp.array([1.0, 3.0, jnp.nan]), jnp.array([1.0, 1.0, 0.0])))
    2.0
    """
    total = jnp.sum(weights)
    return jnp.sum(only(values, weights) * weights) / jnp.where(
        total > 0, total, jnp.ones_like(total)
    )
