"""The cache of a decoder that reads a source: what it said so far, and the keys and values of what
it reads.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmodel.leaves.leaf import register
from jaxmodel.ops.cache import KVCache
from jaxmodel.ops.policy import Policy
from jaxmodel.ops.seen import Seen


@register
class MemoryCache:
    """A `KVCache` of the target, and beside it the source, which is written by the first call and
    read by all.

    As long as no source is there, S is 0: what an empty cache holds nothing of belongs to the
    source.

    Attributes:
      target: of the decoder's own tokens.
      k: `[L, B, K, S, h]`, keys of the source in each layer.
      v: as k.
      valid: bool `[B, S]`, false for padding of the source.
    """

    target: KVCache
    k: jax.Array
    v: jax.Array
    valid: jax.Array

    @classmethod
    def zeros(
        cls, layers: int, batch: int, heads: int, capacity: int, width: int, policy: Policy
    ) -> MemoryCache:
        """An empty cache, for `capacity` tokens of the target and a source of any length."""
        target = KVCache.zeros(layers, batch, heads, capacity, width, policy)
        source = jnp.zeros((layers, batch, heads, 0, width), policy.cache_dtype)
        return cls(target, source, source, jnp.zeros((batch, 0), jnp.bool_))

    def reading(self, valid: Bool[Array, "B S"], memory: Float[Array, "B S D"]) -> MemoryCache:
        """The cache with room for the keys and values of a memory; `remember` writes those of each
        layer.
        """
        layers, batch, heads, _, width = self.k.shape
        room = jnp.zeros((layers, batch, heads, valid.shape[1], width), self.k.dtype)
        return MemoryCache(self.target, room, room, valid)

    def remember(
        self, layer: jax.Array | int, k: Float[Array, "B K S h"], v: Float[Array, "B K S h"]
    ) -> MemoryCache:
        """Write the source's keys and values in one layer."""

        def write(store: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice(
                store, new[None].astype(store.dtype), (layer, 0, 0, 0, 0)
            )

        return dataclasses.replace(self, k=write(self.k, k), v=write(self.v, v))

    def recall(
        self, layer: jax.Array | int, heads: int
    ) -> tuple[Float[Array, "B K S h"], Float[Array, "B K S h"], Seen]:
        """The source's keys and values in one layer that has so many heads, and what every query
        sees of them.
        """
        return (
            self.k[layer][:, :heads],
            self.v[layer][:, :heads],
            Seen(valid=self.valid, causal=False),
        )

    @property
    def length(self) -> Int[Array, " B"]:
        """Tokens of the target held in each row."""
        return self.target.length

    @property
    def capacity(self) -> int:
        """The number of tokens of the target that a row can hold."""
        return self.target.capacity

    def positions(self, t: int) -> Int[Array, "B T"]:
        """See `KVCache`."""
        return self.target.positions(t)

    def checked(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """See `KVCache`."""
        return self.target.checked(x)

    def update(
        self, layer: jax.Array | int, k: Float[Array, "B T K h"], v: Float[Array, "B T K h"]
    ) -> tuple[Array, Array, Seen, MemoryCache]:
        """See `KVCache`: of the target."""
        keys, values, seen, target = self.target.update(layer, k, v)
        return keys, values, seen, dataclasses.replace(self, target=target)

    def advance(self, count: Int[Array, " B"] | int) -> MemoryCache:
        """See `KVCache`."""
        return dataclasses.replace(self, target=self.target.advance(count))
