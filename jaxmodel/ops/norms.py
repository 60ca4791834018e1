"""Normalisation in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "... D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "... D"]:
    """`x / sqrt(mean(x^2) + eps) * weight` (Zhang & Sennrich, 2019), in x's dtype."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * on_last(weight.astype(jnp.float32), x.ndim)).astype(x.dtype)


def layer_norm(
    x: Float[Array, "... D"], weight: Float[Array, " D"], bias: Float[Array, " D"] | None, eps: float
) -> Float[Array, "... D"]:
    """`(x - mean) / sqrt(var + eps) * weight + bias` (Ba et al., 2016), in x's dtype."""
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    wide = wide * on_last(weight.astype(jnp.float32), x.ndim)
    return (wide if bias is None else wide + on_last(bias.astype(jnp.float32), x.ndim)).astype(x.dtype)


def on_last(vector: Array, ndim: int) -> Array:
    """The vector as the last of `ndim` axes, so that nothing is promoted in rank silently."""
    return vector.reshape((1,) * (ndim - 1) + vector.shape)
