"""The cache of a decoder that reads a source.

It holds the decoder's own tokens, and the keys and values of the source.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmodel.leaves.leaf import register
from jaxmodel.ops.cache import KVCache, Rounded, alike, of_layer, room
from jaxmodel.ops.policy import Policy
from jaxmodel.ops.seen import AttentionMask


@register
class CrossAttentionCache:
    """A `KVCache` of the target, and the keys and values of the source.

    The source is written by the first call and read by all. Until then S is 0.

    Attributes:
      target: the cache of the decoder's own tokens.
      k: `[L, B, K, S, h]`, the keys of the source in each layer.
      v: the values of the source, of the same shape.
      valid: bool `[B, S]`, False for padding of the source.
    """

    target: KVCache
    k: jax.Array | Rounded
    v: jax.Array | Rounded
    valid: jax.Array

    @classmethod
    def zeros(
        cls, layers: int, batch: int, heads: int, capacity: int, width: int, policy: Policy
    ) -> CrossAttentionCache:
        """Make an empty cache for `capacity` tokens of the target and a source of any length."""
        target = KVCache.zeros(layers, batch, heads, capacity, width, policy)
        source = room((layers, batch, heads, 0, width), policy)
        return cls(target, source, source, jnp.zeros((batch, 0), jnp.bool_))

    def reading(
        self, valid: Bool[Array, "B S"], memory: Float[Array, "B S D"]
    ) -> CrossAttentionCache:
        """Return the cache with room for the keys and values of a source.

        `remember` writes those of each layer.
        """
        s = valid.shape[1]
        longer = jax.tree.map(lambda a: jnp.zeros((*a.shape[:3], s, a.shape[4]), a.dtype), self.k)
        return CrossAttentionCache(self.target, longer, longer, valid)

    def remember(
        self, layer: jax.Array | int, k: Float[Array, "B K S h"], v: Float[Array, "B K S h"]
    ) -> CrossAttentionCache:
        """Write the source's keys and values in one layer."""

        def write(store: Array | Rounded, new: Array) -> Array | Rounded:
            put = lambda store, new: jax.lax.dynamic_update_slice(
                store, new[None], (layer, 0, 0, 0, 0)
            )
            return jax.tree.map(put, store, alike(new, store))

        return dataclasses.replace(self, k=write(self.k, k), v=write(self.v, v))

    def recall(
        self, layer: jax.Array | int, heads: int
    ) -> tuple[Float[Array, "B K S h"], Float[Array, "B K S h"], AttentionMask]:
        """Return the source's keys and values in one layer, and what every query sees of them.

        Args:
          layer: the index of the layer.
          heads: the number of key heads of the layer.
        """
        return (
            of_layer(self.k, layer, heads),
            of_layer(self.v, layer, heads),
            AttentionMask(valid=self.valid, causal=False),
        )

    @property
    def length(self) -> Int[Array, " B"]:
        """The number of tokens of the target in each row."""
        return self.target.length

    @property
    def capacity(self) -> int:
        """The number of tokens of the target that a row can hold."""
        return self.target.capacity

    def positions(self, t: int) -> Int[Array, "B T"]:
        """Return the positions of the next `t` tokens of each row; see `KVCache`."""
        return self.target.positions(t)

    def checked(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Replace the activations of rows without room by NaN; see `KVCache`."""
        return self.target.checked(x)

    def update(
        self, layer: jax.Array | int, k: Float[Array, "B T K h"], v: Float[Array, "B T K h"]
    ) -> tuple[Array, Array, AttentionMask, CrossAttentionCache]:
        """Write the target's next keys and values into one layer; see `KVCache`."""
        keys, values, seen, target = self.target.update(layer, k, v)
        return keys, values, seen, dataclasses.replace(self, target=target)

    def advance(self, count: Int[Array, " B"] | int) -> CrossAttentionCache:
        """Return the cache with `count` more target tokens in each row; see `KVCache`."""
        return dataclasses.replace(self, target=self.target.advance(count))
