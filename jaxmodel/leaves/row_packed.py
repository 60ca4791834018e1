"""`RowPacked`: codes of 1, 2 or 4 bits in the layout in which they run."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Integer, UInt8

from jaxmodel.leaves.leaf import (
    AxisSizes,
    Compressed,
    expect,
    full_spec,
    later,
    register,
    shards,
    static,
)
from jaxmodel.leaves.qtensor import QTensor, check_beside_codes

WIDTHS = (1, 2, 4)


@register
class RowPacked(Compressed):
    """A weight `[..., out, in]` like a `QTensor`, with codes of distant rows in one byte.

    A byte of `QTensor` holds neighbours of one row, so unpacking interleaves, which a processor
    does element by element. Here byte `[o, i]` holds the codes of the rows `o`, `o + out / n`, ...,
    the first in the lowest bits, `n = 8 / bits`: unpacking is a shift and a multiply over a whole
    row. The bytes are as many. It is a form for running; `for_inference` makes it.

    Invariants (`check`):
      packed: uint8 `[..., out / n, in + pad]`, unsigned codes (q + 2^(bits-1) if symmetric).
      scale, minimum, activations, limit: as in `QTensor`.
      bits: 1, 2 or 4.
      pad: the number of unused codes at the end of each row, less than a group.
    """

    packed: Any
    scale: Any
    minimum: Any = None
    bits: int = static(default=4)
    pad: int = static(default=0)
    activations: str | None = static(default=None)
    limit: Any = later(default=None)

    @classmethod
    def of(cls, leaf: QTensor) -> RowPacked | None:
        """Return a leaf in this layout.

        None if it has more bits, or another number of rows than that of whole bytes. Three bits
        take the room of four, ternary codes that of two.
        """
        bits = 4 if leaf.bits == 3 else leaf.bits
        if bits not in WIDTHS or leaf.shape[-2] % (8 // bits):
            return None
        pad = leaf.pad if leaf.groups > 1 else 0
        return cls(
            _repack(leaf, bits),
            leaf.scale,
            leaf.minimum,
            bits=bits,
            pad=pad,
            activations=leaf.activations,
            limit=leaf.limit,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        *lead, rows, n = self.packed.shape
        return (*lead, rows * (8 // self.bits), n - self.pad)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the decoded weight."""
        return jnp.dtype(jnp.float32)

    @property
    def groups(self) -> int:
        """The number of scales along the last axis."""
        return self.scale.shape[-1]

    def decode(self, dtype: Any = None) -> jax.Array:
        """Return the weight as a plain array: bit for bit that of the `QTensor`."""
        return _decode(self, self.dtype if dtype is None else jnp.dtype(dtype))

    def rows(self, ids: Integer[Array, "..."]) -> Float[Array, "... in"]:
        """Decode only the rows that are looked up; the leaf has no leading axes."""
        per = self.shape[-2] // (8 // self.bits)
        ids = jnp.clip(ids, 0, self.shape[-2] - 1)
        shift = (ids // per * self.bits).astype(jnp.uint8)[..., None]
        codes = (self.packed[ids % per] >> shift) & jnp.uint8(2**self.bits - 1)
        of_row = lambda a: a[ids if a.shape[-2] > 1 else jnp.zeros_like(ids)]
        minimum = None if self.minimum is None else of_row(self.minimum)
        return _scaled(codes, of_row(self.scale), minimum, self.bits)[..., : self.shape[-1]]

    def specs(self, spec: PartitionSpec, sizes: AxisSizes) -> RowPacked:
        """Return the leaf with a `PartitionSpec` in place of each array."""
        *lead, out, last = full_spec(spec, self.ndim)
        expect(
            shards(out, sizes) == 1,
            self,
            f"a spec {spec} cuts the rows, of which distant ones share a byte; place the stored "
            f"leaf, and call for_inference afterwards",
        )
        parts = shards(last, sizes)
        unit = self.packed.shape[-1] // self.groups if self.groups > 1 else 1
        expect(
            parts == 1 or (self.pad == 0 and self.shape[-1] % (parts * unit) == 0),
            self,
            f"a spec {spec} cuts the last axis of {self.shape[-1]} codes into {parts} parts, which "
            f"splits a group of {unit}",
        )
        scale = PartitionSpec(*lead, None, last if self.groups > 1 and parts > 1 else None)
        return type(self)(
            PartitionSpec(*lead, None, last),  # pyright: ignore[reportArgumentType]
            scale,  # pyright: ignore[reportArgumentType]
            None if self.minimum is None else scale,  # pyright: ignore[reportArgumentType]
            bits=self.bits,
            pad=self.pad,
            activations=self.activations,
            limit=None if self.limit is None else PartitionSpec(*lead, None, None),
        )

    def check(self) -> None:
        """Check the invariants of the class."""
        p = self.packed
        s = self.scale
        expect(self.bits in WIDTHS, self, f"bits is {self.bits}; allowed: 1, 2, 4")
        expect(
            p.dtype == jnp.uint8 and p.ndim >= 2,
            self,
            f"packed is {p.dtype} {p.shape}; uint8 [..., rows, in] is needed",
        )
        expect(
            jnp.issubdtype(s.dtype, jnp.floating)
            and s.ndim == p.ndim
            and s.shape[:-2] == p.shape[:-2]
            and s.shape[-2] in (1, self.shape[-2])
            and s.shape[-1] > 0
            and p.shape[-1] % s.shape[-1] == 0,
            self,
            f"scale is {s.dtype} {s.shape}; floating [..., out or 1, groups or 1] of a weight "
            f"{self.shape} is needed",
        )
        expect(
            0 <= self.pad < p.shape[-1] // s.shape[-1],
            self,
            f"pad is {self.pad}; it must be less than a group",
        )
        check_beside_codes(self)


@functools.partial(jax.jit, static_argnums=1)
def _repack(leaf: QTensor, bits: int) -> UInt8[Array, "... rows n"]:
    codes = leaf._padded_codes() if leaf.groups > 1 else leaf.codes()
    if leaf.minimum is None:
        codes = (codes + 1) // 2 if bits == 1 else codes + jnp.int8(2 ** (bits - 1))
    parts = jnp.split(codes.astype(jnp.uint8), 8 // bits, axis=-2)
    return functools.reduce(
        jnp.bitwise_or, [part << jnp.uint8(i * bits) for i, part in enumerate(parts)]
    )


def _scaled(codes: Array, scale: Array, minimum: Array | None, bits: int) -> Array:
    """Return the float32 weights of unsigned codes `[..., n]` with scales `[..., groups]`."""
    *lead, n = codes.shape
    groups = scale.shape[-1]
    # a code below 256 is exact in float32, and so is q
    q = codes.reshape(*lead, groups, n // groups).astype(jnp.float32)
    if minimum is None:
        q = 2 * q - 1 if bits == 1 else q - 2 ** (bits - 1)
    weight = q * scale[..., None].astype(jnp.float32)
    if minimum is not None:
        weight = weight + minimum[..., None].astype(jnp.float32)
    return weight.reshape(*lead, n)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _decode(leaf: RowPacked, dtype: jnp.dtype) -> jax.Array:
    mask = jnp.uint8(2**leaf.bits - 1)
    codes = jnp.concatenate(
        [(leaf.packed >> jnp.uint8(shift)) & mask for shift in range(0, 8, leaf.bits)], axis=-2
    )
    weight = _scaled(codes, leaf.scale, leaf.minimum, leaf.bits)
    return weight.astype(dtype)[..., : leaf.shape[-1]]
