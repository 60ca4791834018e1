"""Causal self-attention with grouped heads."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from jaxmodel import ops
from jaxmodel.layers.leaf import leaf
from jaxmodel.layers.linear import Initializer, linear
from jaxmodel.sharding import constrain


class Attention(nn.Module):
    """Leaves q `[H*h, D]`, k and v `[K*h, D]`, o `[D, H*h]`, and biases of all four if `bias`.

    Attributes:
      heads: query heads H of new leaves; leaves that exist have their own number.
      kv_heads: key heads K.
      width: of a head, h.
      bias: whether the four maps have biases.
      initializer: of q, k and v.
      out_initializer: of o.
      policy: dtypes and placement.
    """

    heads: int
    kv_heads: int
    width: int
    bias: bool
    initializer: Initializer
    out_initializer: Initializer
    policy: ops.Policy

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], context: dict[str, Any], cache: Any, layer: jax.Array | int
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Returns the mixed activations and the cache with this layer written.

        Args:
          x: normed activations.
          context: what a step computes once: `mask` `[B, T, S]` where there is no cache, `rope` tables where the model has
            them.
          cache: see `ops.KVCache`, or None.
          layer: where in the cache to write.
        """
        outputs = {"q": self.heads * self.width, "k": self.kv_heads * self.width, "v": self.kv_heads * self.width}
        flat = linear(self, x, outputs, self.initializer, self.bias, self.policy)
        q, k, v = (y.reshape(*y.shape[:2], -1, self.width) for y in flat)
        q, k, v = (constrain(y, f"BT{n}h", self.policy.axes) for y, n in ((q, "H"), (k, "K"), (v, "K")))
        if "rope" in context:
            q, k = ops.rotate(q, context["rope"]), ops.rotate(k, context["rope"])
        if cache is None:
            mask, k, v = context["mask"], k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        else:
            k, v, mask, cache = cache.update(layer, k, v)
        mixed = ops.attention(q, k, v, mask, self.policy, causal=True)
        o = leaf(self, "o", self.out_initializer, (x.shape[-1], mixed.shape[2] * self.width))
        y = ops.einsum("BTHh,D(Hh)->BTD", mixed, o, self.policy)
        if self.bias:
            y = y + ops.on_last(leaf(self, "o_bias", nn.initializers.zeros, y.shape[-1:]).astype(y.dtype), y.ndim)
        return y, cache
