"""Attention to a memory: the encoded source."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from jaxmodel import ops
from jaxmodel.layers.leaf import leaf
from jaxmodel.layers.linear import Initializer, linear
from jaxmodel.ops.norms import on_last
from jaxmodel.sharding import constrain


class CrossAttention(nn.Module):
    """Attention from a target to a memory.

    Leaves: q `[H*h, D]`, memory_k and memory_v `[H*h, M]`, o `[D, H*h]`, and a bias of each if
    `bias`. Keys and values have other names than in self-attention because their input is not that
    of q, so the three must never be fused.

    Attributes:
      heads: the number of heads H of new leaves; existing leaves have their own.
      width: the width h of a head.
      bias: whether the maps have biases.
      initializer: the initialiser of q, memory_k and memory_v.
      out_initializer: the initialiser of o.
      policy: dtypes and placement.
      scale: the factor of the scores; None for `1 / sqrt(h)`.
    """

    heads: int
    width: int
    bias: bool
    initializer: Initializer
    out_initializer: Initializer
    policy: ops.Policy
    scale: float | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], context: dict[str, Any], cache: Any, layer: jax.Array | int
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Return the mixed activations and the cache.

        Args:
          x: the normalised activations.
          context: `memory` `[B, S, M]` and `memory_mask` `[B, S]` in a call that reads the source;
            without them, keys and values come from the cache.
          cache: see `ops.memory.CrossAttentionCache`, or None.
          layer: the index of the layer.
        """
        size = self.heads * self.width
        (q,) = self._heads(linear(self, x, {"q": size}, self.initializer, self.bias, self.policy))
        if "memory" in context:
            maps = {"memory_k": size, "memory_v": size}
            flat = linear(self, context["memory"], maps, self.initializer, self.bias, self.policy)
            k, v = (y.transpose(0, 2, 1, 3) for y in self._heads(flat))
            seen = ops.AttentionMask(valid=context["memory_mask"], causal=False)
            cache = None if cache is None else cache.remember(layer, k, v)
        else:
            k, v, seen = cache.recall(layer, q.shape[2])
        mixed = ops.attention(q, k, v, seen, self.policy, scale=self.scale)
        o = leaf(self, "o", self.out_initializer, (x.shape[-1], mixed.shape[2] * self.width))
        y = ops.einsum("BTHh,D(Hh)->BTD", mixed, o, self.policy)
        if self.bias:
            y = y + on_last(
                leaf(self, "o_bias", nn.initializers.zeros, y.shape[-1:]).astype(y.dtype), y.ndim
            )
        return y, cache

    def _heads(self, flat: list[Array]) -> list[Array]:
        return [
            constrain(y.reshape(*y.shape[:2], -1, self.width), "BTHh", self.policy.axes)
            for y in flat
        ]
