"""`Codebook`: a weight as codes of 1 to 8 bits that point into a table of values."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Integer

from jaxmodel.leaves.leaf import AxisSizes, Compressed, expect, full_spec, register, shards, static
from jaxmodel.leaves.packing import codes_per_unit, pack, pad_last, unpack, unpacked_length


@register
class Codebook(Compressed):
    """A weight `[..., out, in]` whose element is `scale * table[code]`.

    Invariants (`check`):
      packed: uint8, the codes in [0, 2^bits) in the layout of `jaxmodel.leaves.packing`; the last
        axis holds `in + pad` codes in whole bytes.
      table: floating `[..., out or 1, 2^bits]`: the values of each row, or of the whole leaf.
      scale: None, or `[..., out, groups]`; the number of groups divides `in + pad`.
      pad: the number of unused codes at the end of each row.
    """

    packed: Any
    table: Any
    scale: Any = None
    bits: int = static(default=4)
    pad: int = static(default=0)

    @classmethod
    def from_codes(
        cls,
        codes: Integer[Array, "... out in"],
        table: Float[Array, "... o k"],
        scale: Float[Array, "... out g"] | None = None,
        *,
        bits: int,
        group: int | None = None,
    ) -> Codebook:
        """Pack codes.

        Args:
          codes: one integer in [0, 2^bits) for each weight.
          table: the values, `[..., out or 1, 2^bits]`.
          scale: `[..., out, groups]`, or None.
          bits: 1 to 8.
          group: the length of a group of `scale` along the last axis; None for whole rows.
        """
        stored, pad = pad_last(codes.astype(jnp.uint8), group or codes_per_unit(bits))
        more, extra = pad_last(stored, codes_per_unit(bits))
        leaf = cls(pack(more, bits), table, scale, bits=bits, pad=pad + extra)
        leaf.check()
        return leaf

    @property
    def _padded(self) -> int:
        return unpacked_length(self.packed.shape[-1], self.bits)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return (*self.packed.shape[:-1], self._padded - self.pad)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the decoded weight: float32, whatever the table is stored in."""
        return jnp.dtype(jnp.float32)

    @property
    def groups(self) -> int:
        """The number of scales along the last axis."""
        return 1 if self.scale is None else self.scale.shape[-1]

    def codes(self) -> Integer[Array, "... out in"]:
        """Return the codes without padding, as uint8."""
        return unpack(self.packed, self.bits)[..., : self.shape[-1]]

    def decode(self, dtype: Any = None) -> jax.Array:
        """Return the weight as a plain array."""
        codes = unpack(self.packed, self.bits).astype(jnp.int32)
        *lead, n = codes.shape
        table = jnp.broadcast_to(self.table.astype(jnp.float32), (*lead, self.table.shape[-1]))
        weight = jnp.take_along_axis(table, codes, axis=-1)
        if self.scale is not None:
            grouped = weight.reshape(*lead, self.groups, n // self.groups)
            weight = (grouped * self.scale[..., None].astype(jnp.float32)).reshape(*lead, n)
        return weight[..., : self.shape[-1]].astype(self.dtype if dtype is None else dtype)

    def specs(self, spec: PartitionSpec, sizes: AxisSizes) -> Codebook:
        """Return the leaf with a `PartitionSpec` in place of each array."""
        *lead, out, last = full_spec(spec, self.ndim)
        parts = shards(last, sizes)
        unit = max(self._padded // self.groups if self.groups > 1 else 1, codes_per_unit(self.bits))
        expect(
            parts == 1 or (self.pad == 0 and self._padded % (parts * unit) == 0),
            self,
            f"a spec {spec} cuts the last axis of {self.shape[-1]} codes into {parts} parts, which "
            f"splits a unit of {unit}; use an axis that leaves whole ones, or another axis",
        )
        table = PartitionSpec(*lead, out if self.table.shape[-2] > 1 else None, None)
        scale = PartitionSpec(*lead, out, last if self.groups > 1 and parts > 1 else None)
        return type(self)(
            PartitionSpec(*lead, out, last),  # pyright: ignore[reportArgumentType]
            table,  # pyright: ignore[reportArgumentType]
            None if self.scale is None else scale,  # pyright: ignore[reportArgumentType]
            bits=self.bits,
            pad=self.pad,
        )

    def check(self) -> None:
        """Check the invariants of the class."""
        p = self.packed
        t = self.table
        expect(self.bits in range(1, 9), self, f"bits is {self.bits}; allowed: 1 to 8")
        expect(
            p.dtype == jnp.uint8 and p.ndim >= 2,
            self,
            f"packed is {p.dtype} {p.shape}; uint8 [..., out, bytes] is needed",
        )
        expect(
            self._padded % codes_per_unit(self.bits) == 0 and 0 <= self.pad < self._padded,
            self,
            f"{self._padded} codes of {self.bits} bits with {self.pad} unused are no whole bytes",
        )
        expect(
            jnp.issubdtype(t.dtype, jnp.floating)
            and t.ndim == p.ndim
            and t.shape[:-2] == p.shape[:-2]
            and t.shape[-2] in (1, p.shape[-2])
            and t.shape[-1] == 2**self.bits,
            self,
            f"table is {t.dtype} {t.shape}; floating [..., out or 1, {2**self.bits}] of packed "
            f"{p.shape} is needed",
        )
        if self.scale is not None:
            s = self.scale
            expect(
                s.ndim == p.ndim
                and s.shape[:-1] == p.shape[:-1]
                and s.shape[-1] > 0
                and self._padded % s.shape[-1] == 0,
                self,
                f"scale has shape {s.shape}; [..., out, groups] of packed {p.shape} is needed",
            )
