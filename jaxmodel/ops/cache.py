"""The cache of keys and values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmodel.errors import InputError
from jaxmodel.leaves.leaf import register
from jaxmodel.ops.policy import Policy
from jaxmodel.ops.seen import Seen

UNROLLED = 16
"""Rows that are written by code of their own; more are written in a loop, because XLA would compile
for minutes.
"""


@register
class KVCache:
    """Keys and values of the tokens so far, for all layers.

    A row's tokens stand at the positions from 0 to `length - 1`; what lies behind them is not
    defined and is masked, so rows of unequal length (padded on the right) share a batch.

    Attributes:
      k: `[L, B, K, S, h]`, S the capacity.
      v: as k.
      length: int32 `[B]`, tokens held in each row.
    """

    k: jax.Array
    v: jax.Array
    length: jax.Array

    @classmethod
    def zeros(
        cls, layers: int, batch: int, heads: int, capacity: int, width: int, policy: Policy
    ) -> KVCache:
        """An empty cache."""
        shape = (layers, batch, heads, capacity, width)
        return cls(
            jnp.zeros(shape, policy.cache_dtype),
            jnp.zeros(shape, policy.cache_dtype),
            jnp.zeros(batch, jnp.int32),
        )

    @property
    def capacity(self) -> int:
        """The number of tokens that a row can hold."""
        return self.k.shape[-2]

    def positions(self, t: int) -> Int[Array, "B T"]:
        """Where the next `t` tokens of each row stand."""
        return self.length[:, None] + jnp.arange(t, dtype=jnp.int32)[None]

    def checked(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Activations of the next tokens, as NaN in rows for which there is no room:

        `update` would write over older tokens.
        """
        full = self.length + x.shape[1] > self.capacity
        return jnp.where(full[:, None, None], jnp.asarray(jnp.nan, x.dtype), x)

    def update(
        self, layer: jax.Array | int, k: Float[Array, "B T K h"], v: Float[Array, "B T K h"]
    ) -> tuple[Array, Array, Seen, KVCache]:
        """Write the keys and values of the next tokens into one layer.

        Returns:
          All keys and values `[B, K, S, h]` of the layer, what each new token sees, and the new
          cache. A layer with fewer key heads than the cache uses the first of its heads. `advance`
          moves on when all layers are written.
        """
        if k.shape[0] != self.k.shape[1]:
            raise InputError(f"cache: made for {self.k.shape[1]} rows; {k.shape[0]} given")
        keys, values = (self._write(store, layer, new) for store, new in ((self.k, k), (self.v, v)))
        heads = k.shape[2]
        seen = Seen(query=self.positions(k.shape[1]))
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

        # a slice for each row: XLA writes slices in place, and scatters slowly
        if rows.shape[0] > UNROLLED:
            return jax.lax.fori_loop(0, rows.shape[0], put, store)
        for b in range(rows.shape[0]):
            store = put(b, store)
        return store

    def advance(self, count: Int[Array, " B"] | int) -> KVCache:
        """The cache after `count` tokens more in each row."""
        return KVCache(self.k, self.v, self.length + count)
