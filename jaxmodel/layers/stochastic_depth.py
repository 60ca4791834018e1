"""Stochastic depth as a function of a key."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


def stochastic_depth(
    x: Float[Array, "B ..."],
    y: Float[Array, "B ..."],
    rate: float | Float[Array, ""],
    rng: Key[Array, ""] | None,
    site: int = 0,
) -> Float[Array, "B ..."]:
    """`x + keep / (1 - rate) (y - x)`, keep being 0 for a row with the probability `rate`, else 1
    (Huang et al., 2016).

    The mean over many draws is y, what stands without training.

    Args:
      x: what a block read.
      y: what it made of it, of the same shape.
      rate: 0 to below 1; may be traced, as it is under a scan over layers.
      rng: the key of a layer in a step; None, as outside of training, gives y.
      site: tells apart the places of one layer that use its key.

    >>> x, y = jnp.zeros((200, 3)), jnp.ones((200, 3))
    >>> out = stochastic_depth(x, y, 0.5, jax.random.key(0))
    >>> sorted(set(out.ravel().tolist())), stochastic_depth(x, y, 0.5, None) is y
    ([0.0, 2.0], True)
    """
    if rng is None:
        return y
    keep = jax.random.bernoulli(
        jax.random.fold_in(rng, site), 1 - jnp.asarray(rate, jnp.float32), x.shape[:1]
    )
    scale = keep.astype(jnp.float32) / (1 - jnp.asarray(rate, jnp.float32))
    return x + scale.astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1)) * (y - x)
