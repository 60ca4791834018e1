"""Stochastic depth as a function of a key."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxmodel.rng import fold


def stochastic_depth(
    x: Float[Array, "B ..."],
    y: Float[Array, "B ..."],
    rate: float | Float[Array, ""],
    rng: Key[Array, ""] | None,
    name: str = "stochastic depth",
) -> Float[Array, "B ..."]:
    """Skip a block for a row with probability `rate`: `x + keep / (1 - rate) (y - x)`.

    keep is 0 with probability `rate`, else 1 (Huang et al., 2016). The mean over many draws is y,
    which is also the result outside of training.

    Args:
      x: the input of a block.
      y: its output, of the same shape.
      rate: from 0 to below 1; it may be traced, as it is in a scan over layers.
      rng: the key of a layer in a step; None (outside of training) returns y.
      name: of the place in the layer, where several use its key.

    >>> x, y = jnp.zeros((200, 3)), jnp.ones((200, 3))
    >>> out = stochastic_depth(x, y, 0.5, jax.random.key(0))
    >>> sorted(set(out.ravel().tolist())), stochastic_depth(x, y, 0.5, None) is y
    ([0.0, 2.0], True)
    """
    if rng is None:
        return y
    keep = jax.random.bernoulli(fold(rng, name), 1 - jnp.asarray(rate, jnp.float32), x.shape[:1])
    scale = keep.astype(jnp.float32) / (1 - jnp.asarray(rate, jnp.float32))
    return x + scale.astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1)) * (y - x)
