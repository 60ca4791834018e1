"""The cache of keys and values for decoding."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmodel.errors import InputError
from jaxmodel.leaves.hadamard import turn
from jaxmodel.leaves.leaf import register, static
from jaxmodel.ops.policy import Policy
from jaxmodel.ops.seen import AttentionMask

UNROLLED = 16
"""Up to this many rows are written by unrolled code; more are written in a loop, which XLA compiles
in seconds instead of minutes.
"""


@register
class Rounded:
    """Keys or values as integer codes, with a scale for each head of each token.

    8 bits: `x = scale * code` with code in [-127, 127]. 4 bits: `x H = scale * code + minimum` with
    code in [0, 15]. `H`, a Hadamard matrix over the largest power of two that divides the width,
    spreads the few large elements that every key has (QuaRot: Ashkboos et al., 2024); the range is
    the one of `RANGES` with the least squared error.

    Attributes:
      codes: int8 `[..., S, h]`, or uint8 `[..., S, h / 2]`, where a byte holds element i in its low
        and element `i + h / 2` in its high bits.
      scale: float16 `[..., S, 1]`.
      minimum: None, or float16 `[..., S, 1]`.
      bits: 8 or 4.
    """

    codes: Any
    scale: Any
    minimum: Any = None
    bits: int = static(default=8)

    @classmethod
    def of(cls, x: Float[Array, "... h"], bits: int) -> Rounded:
        """Round each last axis with its own scale; what is read back differs by half a step."""
        x = x.astype(jnp.float32)
        if bits == 8:
            scale = _half(jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127)
            codes = jnp.clip(jnp.round(x / _step(scale)), -127, 127)
            return cls(codes.astype(jnp.int8), scale, None, bits=8)
        x = turn(x, _block(x.shape[-1]))
        first = jnp.min(x, axis=-1, keepdims=True)
        span = jnp.max(x, axis=-1, keepdims=True) - first
        best = None
        for share in RANGES:
            low = (first + span * ((1 - share) / 2)).astype(jnp.float16)
            scale = _half(span * (share / 15))
            codes = jnp.clip(jnp.round((x - low.astype(jnp.float32)) / _step(scale)), 0, 15)
            made = codes, scale, low
            back = codes * scale.astype(jnp.float32) + low.astype(jnp.float32)
            error = jnp.sum((back - x) ** 2, axis=-1, keepdims=True)
            if best is None:
                best = made, error
            else:
                less = error < best[1]
                kept = tuple(jnp.where(less, a, b) for a, b in zip(made, best[0], strict=True))
                best = kept, jnp.minimum(error, best[1])
        assert best is not None
        codes, scale, low = best[0]
        left, right = jnp.split(codes.astype(jnp.uint8), 2, axis=-1)
        return cls(left | (right << 4), scale, low, bits=4)

    def decode(self) -> Float[Array, "... h"]:
        """Return the rounded numbers in float32."""
        if self.bits == 8:
            return self.codes.astype(jnp.float32) * self.scale.astype(jnp.float32)
        # two long runs, not neighbours: shifts of whole vectors
        codes = jnp.concatenate([self.codes & 15, self.codes >> 4], axis=-1)
        x = codes.astype(jnp.float32) * self.scale.astype(jnp.float32)
        x = x + self.minimum.astype(jnp.float32)
        return turn(x, _block(x.shape[-1]), back=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what it stands for."""
        return (*self.codes.shape[:-1], self.codes.shape[-1] * 8 // self.bits)


RANGES = (1.0, 0.92, 0.84, 0.76)
"""The shares of the full range that a row of four bits tries."""


def _block(width: int) -> int:
    """Return the largest power of two that divides a width."""
    return width & -width


def _half(scale: Array) -> Array:
    """Return the scale in float16, rounded up: so no element is beyond the last code."""
    half = scale.astype(jnp.float16)
    less = half.astype(jnp.float32) < scale
    return jnp.where(less, jnp.nextafter(half, jnp.full_like(half, jnp.inf)), half)


def _step(scale: Array) -> Array:
    """Return a scale by which numbers can be divided: 1 where all are zero."""
    wide = scale.astype(jnp.float32)
    return jnp.where(wide > 0, wide, jnp.ones_like(wide))


def room(shape: tuple[int, ...], policy: Policy) -> Array | Rounded:
    """Return zeros of this shape in the form in which the policy keeps keys and values."""
    bits = policy.bits_of_cache
    if bits is None:
        return jnp.zeros(shape, policy.dtype_of_cache)
    if shape[-1] % 2:
        raise InputError(
            f"policy.cache_dtype: {policy.cache_dtype!r} with heads of width {shape[-1]}; allowed: "
            f"an even width"
        )
    like = jax.eval_shape(lambda x: Rounded.of(x, bits), jax.ShapeDtypeStruct(shape, jnp.float32))
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)


def alike(new: Float[Array, "..."], store: Array | Rounded) -> Array | Rounded:
    """Return new keys or values in the form of a store."""
    return Rounded.of(new, store.bits) if isinstance(store, Rounded) else new.astype(store.dtype)


def of_layer(store: Array | Rounded, layer: jax.Array | int, heads: int) -> Float[Array, "B K S h"]:
    """Return the keys or values of the first heads of one layer as numbers."""
    kept = jax.tree.map(lambda a: a[layer][:, :heads], store)
    return kept.decode() if isinstance(kept, Rounded) else kept


@register
class KVCache:
    """The keys and values of all tokens so far, for all layers.

    The tokens of a row are at positions 0 to `length - 1`. Later positions are undefined and
    masked, so rows of unequal length (padded on the right) can share a batch.

    Attributes:
      k: `[L, B, K, S, h]`, where S is the capacity: an array, or `Rounded` if the policy's
        `cache_dtype` is "int8" or "int4".
      v: of the same shape as k.
      length: int32 `[B]`, the number of tokens in each row.
    """

    k: jax.Array | Rounded
    v: jax.Array | Rounded
    length: jax.Array

    @classmethod
    def zeros(
        cls, layers: int, batch: int, heads: int, capacity: int, width: int, policy: Policy
    ) -> KVCache:
        """Make an empty cache."""
        shape = (layers, batch, heads, capacity, width)
        return cls(
            room(shape, policy),
            room(shape, policy),
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
            of_layer(keys, layer, heads),
            of_layer(values, layer, heads),
            seen,
            KVCache(keys, values, self.length),
        )

    def _write(
        self, store: Array | Rounded, layer: jax.Array | int, new: Float[Array, "B T K h"]
    ) -> Any:
        rows = alike(new.transpose(0, 2, 1, 3), store)

        def put(b: jax.Array | int, store: Any) -> Any:
            def one(rows: Array, store: Array) -> Array:
                row = jax.lax.dynamic_slice_in_dim(rows, b, 1)
                place = (layer, b, 0, self.length[b], 0)
                return jax.lax.dynamic_update_slice(store, row[None], place)

            return jax.tree.map(one, rows, store)

        # a slice for each row: XLA updates slices in place, while a scatter is slow
        if new.shape[0] > UNROLLED:
            return jax.lax.fori_loop(0, new.shape[0], put, store)
        for b in range(new.shape[0]):
            store = put(b, store)
        return store

    def advance(self, count: Int[Array, " B"] | int) -> KVCache:
        """Return the cache with `count` more tokens in each row."""
        return KVCache(self.k, self.v, self.length + count)
