"""Attention and its cache of keys and values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmodel.leaves.leaf import register
from jaxmodel.ops.policy import Policy

CAUSAL_PARTS = 8  # queries of a causal square are run in so many parts, each with the keys it can see
CAUSAL_FROM = 256  # positions from which that is worth its overhead


def attention(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B K S h"],
    v: Float[Array, "B K S h"],
    mask: Bool[Array, "#B T S"],
    policy: Policy,
    causal: bool = False,
) -> Float[Array, "B T H h"]:
    """`softmax(q k^T / sqrt(h)) v`, heads in groups that share a key head (Ainslie et al., 2023); softmax in float32.

    Args:
      q: queries; H is a multiple of K.
      k: keys, a key head's positions in a row (so that the cache is read in order).
      v: values.
      mask: true where a query sees a key.
      policy: its `compute` is the dtype of the operands.
      causal: whether query t sees no key behind t where T equals S. Nearly half of the work is then left out.
    """
    t = q.shape[1]
    if not (causal and t == k.shape[2] and t >= CAUSAL_FROM and t % CAUSAL_PARTS == 0):
        return _attention(q, k, v, mask, policy)
    size = t // CAUSAL_PARTS
    parts = []
    for start in range(0, t, size):
        stop = start + size
        seen = mask[:, start:stop, :stop]
        parts.append(_attention(q[:, start:stop], k[:, :, :stop], v[:, :, :stop], seen, policy))
    return jnp.concatenate(parts, axis=1)


def _attention(q: Array, k: Array, v: Array, mask: Array, policy: Policy) -> Array:
    b, t, heads, width = q.shape
    groups = heads // k.shape[1]
    compute = jnp.dtype(policy.compute)
    # all query heads of one key head, and all positions, are the rows of one product
    q = q.reshape(b, t, k.shape[1], groups, width).transpose(0, 2, 3, 1, 4).reshape(b, k.shape[1], groups * t, width)
    scores = _batched(q.astype(compute), k.astype(compute), "bknh,bksh->bkns") * (width**-0.5)
    scores = scores.reshape(b, k.shape[1], groups, t, -1)
    scores = jnp.where(mask[:, None, None], scores, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).reshape(b, k.shape[1], groups * t, -1)
    out = _batched(weights.astype(compute), v.astype(compute), "bkns,bksh->bknh")
    out = out.reshape(b, k.shape[1], groups, t, width).transpose(0, 3, 1, 2, 4)
    return out.reshape(b, t, heads, width).astype(policy.stream)


def _batched(x: Array, y: Array, equation: str) -> Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=jnp.float32)


def causal_mask(
    t: int, segments: Int[Array, "B T"] | None = None, valid: Bool[Array, "B T"] | None = None
) -> Bool[Array, "#B T T"]:
    """Each position sees itself and what came before: in its own segment, and only valid keys.

    Args:
      t: the number of positions.
      segments: documents packed into a row; 0 is padding.
      valid: true for tokens, false for padding.
    """
    mask = jnp.tril(jnp.ones((1, t, t), jnp.bool_))
    if segments is not None:
        mask = mask & (segments[:, :, None] == segments[:, None, :])
    if valid is not None:
        mask = mask & valid[:, None, :]
    return mask


@register
class KVCache:
    """Keys and values of the tokens so far, for all layers.

    A row's tokens stand at the positions from 0 to `length - 1`; what lies behind them is not defined and is masked, so rows
    of unequal length (padded on the right) share a batch.

    Attributes:
      k: `[L, B, K, S, h]`, S the capacity.
      v: as k.
      length: int32 `[B]`, tokens held in each row.
    """

    k: jax.Array
    v: jax.Array
    length: jax.Array

    @classmethod
    def zeros(cls, layers: int, batch: int, heads: int, capacity: int, width: int, policy: Policy) -> KVCache:
        """An empty cache."""
        shape = (layers, batch, heads, capacity, width)
        return cls(jnp.zeros(shape, policy.cache_dtype), jnp.zeros(shape, policy.cache_dtype), jnp.zeros(batch, jnp.int32))

    @property
    def capacity(self) -> int:
        """The number of tokens that a row can hold."""
        return self.k.shape[-2]

    def positions(self, t: int) -> Int[Array, "B T"]:
        """Where the next `t` tokens of each row stand."""
        return self.length[:, None] + jnp.arange(t, dtype=jnp.int32)[None]

    def update(
        self, layer: jax.Array | int, k: Float[Array, "B T K h"], v: Float[Array, "B T K h"]
    ) -> tuple[Array, Array, Bool[Array, "B T S"], KVCache]:
        """Write the keys and values of the next tokens into one layer.

        Returns:
          All keys and values `[B, K, S, h]` of the layer, the mask of what each new token sees, and the new cache. A layer
          with fewer key heads than the cache uses the first of its heads. `advance` moves on when all layers are written.
        """
        keys, values = (self._write(store, layer, new) for store, new in ((self.k, k), (self.v, v)))
        seen = jnp.arange(self.capacity, dtype=jnp.int32)[None, None] <= self.positions(k.shape[1])[..., None]
        heads = k.shape[2]
        cache = KVCache(keys, values, self.length)
        return keys[layer][:, :heads], values[layer][:, :heads], seen, cache

    def _write(self, store: Array, layer: jax.Array | int, new: Float[Array, "B T K h"]) -> Array:
        rows = new.transpose(0, 2, 1, 3).astype(store.dtype)
        for b in range(rows.shape[0]):  # a slice for each row: XLA writes slices in place, and scatters slowly
            store = jax.lax.dynamic_update_slice(store, rows[None, b : b + 1], (layer, b, 0, self.length[b], 0))
        return store

    def advance(self, count: Int[Array, " B"] | int) -> KVCache:
        """The cache after `count` tokens more in each row."""
        return KVCache(self.k, self.v, self.length + count)
