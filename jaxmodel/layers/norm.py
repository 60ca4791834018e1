"""Norms with their weights."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodel import ops
from jaxmodel.layers.leaf import leaf


class RMSNorm(nn.Module):
    """Root mean square norm with a weight `[D]`.

    `offset` is added to the weight (Gemma stores weights around zero).
    """

    eps: float
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalise the last axis."""
        weight = leaf(self, "weight", nn.initializers.constant(1 - self.offset), x.shape[-1:])
        return ops.rms_norm(x, weight + self.offset if self.offset else weight, self.eps)


class LayerNorm(nn.Module):
    """Layer norm with a weight `[D]` and, unless `bias` is False, a bias `[D]`."""

    eps: float
    bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalise the last axis."""
        weight = leaf(self, "weight", nn.initializers.ones, x.shape[-1:])
        bias = (
            leaf(self, "bias", nn.initializers.zeros, x.shape[-1:])
            if self.bias
            else jnp.zeros_like(weight)
        )
        return ops.layer_norm(x, weight, bias, self.eps)
