"""Dropout as a function of a key."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxmodel.rng import fold


def dropout(
    x: Float[Array, "..."], rate: float, rng: Key[Array, ""] | None, name: str = "dropout"
) -> Float[Array, "..."]:
    """Set each element to zero with probability `rate`, and divide the others by `1 - rate`.

    Source: Srivastava et al., 2014.

    Args:
      x: activations.
      rate: from 0 to below 1; 0 does nothing.
      rng: the key of a layer in a step; None (outside of training) does nothing.
      name: of the place in the layer, where several use its key.

    >>> x = jnp.ones((2, 100))
    >>> dropped = dropout(x, 0.5, jax.random.key(0))
    >>> sorted(set(dropped.ravel().tolist())), dropout(x, 0.5, None) is x
    ([0.0, 2.0], True)
    """
    if rng is None or rate == 0:
        return x
    keep = jax.random.bernoulli(fold(rng, name), 1 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))
