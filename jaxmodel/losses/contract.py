"""What a loss is, and the weighted mean that each of them takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodel.data.augment.base import IGNORED

type Loss = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
"""`loss(model, params, batch, rng, *, train=True) -> (mean, metrics)`; see `jaxmodel.losses`."""


def row_weights(batch: Mapping[str, Array], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """The batch's `weights`, those of rows for all positions of each, or ones of this shape."""
    if "weights" not in batch:
        return jnp.ones(shape, jnp.float32)
    weights = batch["weights"].astype(jnp.float32)
    return jnp.broadcast_to(
        weights.reshape(*weights.shape, *[1] * (len(shape) - weights.ndim)), shape
    )


def counting(labels: Array, weights: Float[Array, "..."]) -> tuple[Array, Float[Array, "..."]]:
    """Labels, or targets, without those that do not count, and the weights: 0 where a whole number
    is `IGNORED`.

    What stands where the weight is 0 becomes 0, since even a factor of 0 leaves NaN, and the
    gradient of NaN, what they are.

    >>> labels, weights = counting(jnp.array([3, -100, -1]), jnp.array([1.0, 1.0, 0.0]))
    >>> labels.tolist(), weights.tolist()
    ([3, 0, 0], [1.0, 0.0, 0.0])
    """
    if jnp.issubdtype(labels.dtype, jnp.integer):
        weights = jnp.where(labels == IGNORED, 0.0, weights)
    return only(labels, weights), weights


def only(values: Array, weights: Float[Array, "..."]) -> Array:
    """What has weight of values `[B, ...]`; 0 in place of the rest."""
    counts = (weights > 0).reshape(*weights.shape, *[1] * (values.ndim - weights.ndim))
    return jnp.where(counts, values, jnp.zeros((), values.dtype))


def model_inputs(batch: Mapping[str, Array], *without: str) -> dict[str, Array]:
    """The fields of a batch that are a model's: all but these and `weights`, which tells it what
    rows count.
    """
    inputs = {name: a for name, a in batch.items() if name not in (*without, "weights")}
    weights = batch.get("weights")
    return inputs if weights is None or weights.ndim != 1 else {**inputs, "counts": weights > 0}


def weighted_mean(values: Float[Array, "..."], weights: Float[Array, "..."]) -> Float[Array, ""]:
    """`sum w x / sum w`, where a value without weight may be NaN; 0 where no weight is.

    >>> float(weighted_mean(jnp.array([1.0, 3.0, jnp.nan]), jnp.array([1.0, 1.0, 0.0])))
    2.0
    """
    total = jnp.sum(weights)
    return jnp.sum(only(values, weights) * weights) / jnp.where(
        total > 0, total, jnp.ones_like(total)
    )
