"""The cache of keys and values for decoding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmodel.errors import InputError
from jaxmodel.leaves.leaf import register
from jaxmodel.ops.policy import Policy
from jaxmodel.ops.seen import AttentionMask

UNROLLED = 16
"""Up to this many rows are written by unrolled code; more are written in a loop, which XLA compiles
in seconds instead of minutes.
"""


@register
class KVCache:
    """The keys and values of all tokens so far, for all layers.

    The tokens of a row are at positions 0 to `length - 1`. Later positions are undefined and
    masked, so rows of unequal length (padded on the right) can share a batch.

    Attributes:
      k: `[L, B, K, S, h]`, where S is the capacity.
      v: of the same shape as k.
      length: int32 `[B]`, the number of tokens in each row.
    """

    k: jax.Array
    v: jax.Array
    length: jax.Array

    @classmethod
    def zeros(
        cls, layers: int, batch: int, heads: int, capacity: int, width: int, policy: Policy
    ) -> KVCache:
        """Make an empty cache."""
        shape = (layers, batch, heads, capacity, width)
        return cls(
            jnp.zeros(shape, policy.dtype_of_cache),
            jnp.zeros(shape, policy.dtype_of_cache),
            jnp.zeros(batch, jnp.int32),
        )

    @property
    def capacity(self) -> int:
        """The number of tokens that a row can hold."""
        return self.k.shape[-2]

    def positions(self, t: int) -> Int[Array, "B T"]:
        """Return the positions of the next `t` tokens of each row."""
        return self.length[:, None] + jnp.arange(t, dtype=jnp.int32)[None]

    def checked(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Replace the activations of rows without room for the next tokens by NaN.

        `update` would overwrite older tokens there.
        """
        full = self.length + x.shape[1] > self.capacity
        return jnp.where(full[:, None, None], jnp.asarray(jnp.nan, x.dtype), x)

    def update(
        self, layer: jax.Array | int, k: Float[Array, "B T K h"], v: Float[Array, "B T K h"]
    ) -> tuple[Array, Array, AttentionMask, KVCache]:
        """Write the keys and values of the next tokens into one layer.

        Returns:
          All keys and values `[B, K, S, h]` of the layer, what each new token sees, and the new
          cache. A layer with fewer key heads than the cache uses the first heads. Call `advance`
          after all layers are written.
        """
        if k.shape[0] != self.k.shape[1]:
            raise InputError(f"cache: made for {self.k.shape[1]} rows; {k.shape[0]} given")
        keys, values = (self._write(store, layer, new) for store, new in ((self.k, k), (self.v, v)))
        heads = k.shape[2]
        seen = AttentionMask(query=self.positions(k.shape[1]))
        return (
            keys[layer][:, :heads],
            values[layer][:, :heads],
            seen,
            KVCache(keys, values, self.length),
        )

    def _write(self, store: Array, layer: jax.Array | int, new: Float[Array, "B T K h"]) -> Array:
        rows = new.transpose(0, 2, 1, 3).astype(store.dtype)

        def put(b: jax.Array | int, store: Array) -> Array:
            row = jax.lax.dynamic_slice_in_dim(rows, b, 1)
            return jax.lax.dynamic_update_slice(store, row[None], (layer, b, 0, self.length[b], 0))

        # a slice for each row: XLA updates slices in place, while a scatter is slow
        if rows.shape[0] > UNROLLED:
            return jax.lax.fori_loop(0, rows.shape[0], put, store)
        for b in range(rows.shape[0]):
            store = put(b, store)
        return store

    def advance(self, count: Int[Array, " B"] | int) -> KVCache:
        """Return the cache with `count` more tokens in each row."""
        return KVCache(self.k, self.v, self.length + count)
