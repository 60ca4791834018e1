"""Images as rows of tokens."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodel import ops
from jaxmodel.layers.leaf import leaf
from jaxmodel.sharding import constrain


class Patches(nn.Module):
    """Each patch of an image by a linear map, a class token in front of them, and learnt positions (Dosovitskiy et al., 2020).

    Leaves patch `[D, C * patch * patch]`, patch_bias `[D]`, class `[D]`, positions `[T, D]`.

    Attributes:
      width: D of new leaves.
      patch: the side of a patch in pixels.
      class_token: whether there is one.
      bias: whether the map has one.
      init_scale: standard deviation of new weights.
      policy: dtypes and placement.
    """

    width: int
    patch: int
    class_token: bool
    bias: bool
    init_scale: float
    policy: ops.Policy

    @nn.compact
    def __call__(self, pixels: Float[Array, "B Y X C"]) -> Float[Array, "B T D"]:
        normal, side = nn.initializers.normal(self.init_scale), (self.patch, self.patch)
        batch, channels = pixels.shape[0], pixels.shape[-1]
        kernel = leaf(self, "patch", normal, (self.width, channels * self.patch**2))
        y = ops.conv(pixels, kernel, self.policy, kernel=side, stride=side, padding="VALID")
        y = y.reshape(batch, -1, y.shape[-1])
        if self.bias:
            y = y + ops.on_last(leaf(self, "patch_bias", nn.initializers.zeros, y.shape[-1:]).astype(y.dtype), y.ndim)
        if self.class_token:
            first = ops.on_last(leaf(self, "class", normal, y.shape[-1:]).astype(y.dtype), y.ndim)
            y = jnp.concatenate([jnp.broadcast_to(first, (batch, 1, y.shape[-1])), y], axis=1)
        places = jnp.broadcast_to(jnp.arange(y.shape[1], dtype=jnp.int32), y.shape[:2])
        table = leaf(self, "positions", normal, y.shape[1:])
        return constrain(y + ops.take(table, places, self.policy, "SD"), "BTD", self.policy.axes)
