"""What a loss is, and the weighted mean that each of them takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

type Loss = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
"""`loss(model, params, batch, rng, *, train=True) -> (mean, metrics)`; see `jaxmodel.train.losses`."""


def row_weights(batch: Mapping[str, Array], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """The batch's `weights`, or ones of this shape."""
    return batch["weights"].astype(jnp.float32) if "weights" in batch else jnp.ones(shape, jnp.float32)


def weighted_mean(values: Float[Array, "..."], weights: Float[Array, "..."]) -> Float[Array, ""]:
    """`sum w x / sum w`; 0 where no weight is.

    >>> float(weighted_mean(jnp.array([1.0, 3.0, 9.0]), jnp.array([1.0, 1.0, 0.0])))
    2.0
    """
    total = jnp.sum(weights)
    return jnp.sum(values * weights) / jnp.where(total > 0, total, jnp.ones_like(total))
