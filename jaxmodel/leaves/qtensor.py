"""`QTensor`: a weight as integer codes of 1 to 8 bits with scales."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Shaped

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
from jaxmodel.leaves.packing import (
    codes_per_unit,
    pack,
    pack_trits,
    pad_last,
    unpack,
    unpack_trits,
    unpacked_length,
)

FLOATS = {"e4m3": jnp.dtype("float8_e4m3fn"), "e5m2": jnp.dtype("float8_e5m2")}
"""The forms of a code of 8 bits that is a floating-point number itself."""

TERNARY = "ternary"
"""The form of codes in {-1, 0, 1}, five of which are stored in a byte."""


@register
class QTensor(Compressed):
    """A weight `[..., out, in]` as integer codes with a scale for each tensor, channel or group.

    Symmetric (no `minimum`): `w = scale * q` with q in [-2^(bits-1), 2^(bits-1) - 1], at one bit in
    {-1, +1}. Affine: `w = scale * code + minimum` with code in [0, 2^bits - 1].

    Invariants (`check`):
      packed: int8 q itself if the leaf is symmetric and has 8 bits; else uint8, the unsigned codes
        (q + 2^(bits-1) if symmetric) in the layout of `jaxmodel.leaves.packing`. The last axis
        holds `in + pad` codes in whole bytes.
      scale: floating, with as many axes as the weight. The last axis is 1 or the number of groups,
        which divides `in + pad`; the axis before it is `out` or 1. Length 1 on both means a scale
        per tensor; with groups, every row has its own scales.
      minimum: None, or an array with the shape and dtype of `scale`.
      pad: the number of unused codes at the end of each row: fewer than one of several groups (or a
        byte) holds; where a row has one scale, fewer than all.
      activations: None (the contraction runs in floating point), or what its input is rounded to,
        with a scale for each row: "int8", "e4m3" or "e5m2".
      limit: None, or floating `[..., 1, 1]`: the input is clipped at it, and rounded with this one
        scale in place of one for each row.
      form: None for integers of `bits`; "ternary" for q in {-1, 0, 1} (2 bits), five in a byte;
        "e4m3" or "e5m2" for numbers of 8 bits with a fraction, whose bits `packed` holds.
    """

    packed: Any  # the buffers are Any because specs() and tree maps replace them by other things
    scale: Any
    minimum: Any = None
    bits: int = static(default=8)
    pad: int = static(default=0)
    activations: str | None = static(default=None)
    limit: Any = later(default=None)
    form: str | None = later(default=None, fixed=True)

    @classmethod
    def from_codes(
        cls,
        codes: Shaped[Array, "... out in"],
        scale: Float[Array, "... o g"],
        minimum: Float[Array, "... o g"] | None = None,
        *,
        bits: int,
        group: int | None = None,
        activations: str | None = None,
        limit: Float[Array, "... 1 1"] | None = None,
        form: str | None = None,
    ) -> QTensor:
        """Pack codes: signed q if symmetric (no `minimum`), else unsigned; or numbers of 8 bits.

        Args:
          codes: one integer for each weight; of the forms "e4m3" and "e5m2" the number, or its
            bits as an integer.
          scale: `[..., out or 1, groups or 1]`.
          minimum: of the same shape as `scale`, for an affine leaf.
          bits: 1 to 8.
          group: length of a group along the last axis; None for one scale per row or tensor.
          activations: see the class.
          limit: see the class.
          form: see the class.
        """
        unit = group or 1
        if minimum is not None or bits < 8:
            unit = math.lcm(unit, unit_of(bits, form))
        pad = -codes.shape[-1] % unit
        stored = _store(codes, bits, unit, minimum is None, form)
        leaf = cls(
            stored,
            scale,
            minimum,
            bits=bits,
            pad=pad,
            activations=activations,
            limit=limit,
            form=form,
        )
        leaf.check()
        expect(
            group is None or leaf.groups * group == leaf._padded,
            leaf,
            f"{leaf.groups} scales per row do not fit groups of {group} in rows of "
            f"{leaf.shape[-1]} codes and whole bytes",
        )
        return leaf

    @property
    def _in(self) -> int:
        return self._padded - self.pad

    @property
    def _padded(self) -> int:
        n = self.packed.shape[-1]
        if self.form == TERNARY:
            return 5 * n
        return n if self.packed.dtype == jnp.int8 else unpacked_length(n, self.bits)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return (*self.packed.shape[:-1], self._in)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the scale."""
        return jnp.dtype(jnp.float32)

    @property
    def groups(self) -> int:
        """The number of scales along the last axis."""
        return self.scale.shape[-1]

    def codes(self) -> Shaped[Array, "... out in"]:
        """Return the codes without padding.

        They are int8 q of a symmetric leaf, uint8 of an affine one, or numbers of 8 bits.
        """
        return _codes(self)

    def _padded_codes(self) -> Shaped[Array, "... out n"]:
        if self.packed.dtype == jnp.int8:
            return self.packed
        if self.form in FLOATS:
            return jax.lax.bitcast_convert_type(self.packed, FLOATS[self.form])
        if self.form == TERNARY:
            return unpack_trits(self.packed).astype(jnp.int8) - jnp.int8(1)
        codes = unpack(self.packed, self.bits)
        if self.minimum is not None:
            return codes
        q = codes.astype(jnp.int8)
        return 2 * q - 1 if self.bits == 1 else q - jnp.int8(2 ** (self.bits - 1))

    def decode(self, dtype: Any = None) -> jax.Array:
        """Return the weight as a plain array."""
        return _decode(self, self.dtype if dtype is None else jnp.dtype(dtype))

    def specs(self, spec: PartitionSpec, sizes: AxisSizes) -> QTensor:
        """Return the leaf with a `PartitionSpec` in place of each array."""
        *lead, out, last = full_spec(spec, self.ndim)
        parts = shards(last, sizes)
        unit = math.lcm(
            self._padded // self.groups if self.groups > 1 else 1, unit_of(self.bits, self.form)
        )
        expect(
            parts == 1 or (self.pad == 0 and self._in % (parts * unit) == 0),
            self,
            f"a spec {spec} cuts the last axis of {self._in} codes into {parts} parts, which "
            f"splits a "
            f"{'group' if self.groups > 1 else 'byte'} of {unit}; use a mesh axis that keeps them "
            "whole, or shard another axis",
        )
        scale = PartitionSpec(
            *lead,
            out if self.scale.shape[-2] > 1 else None,
            last if self.groups > 1 and parts > 1 else None,
        )
        return type(self)(
            PartitionSpec(*lead, out, last),  # pyright: ignore[reportArgumentType]
            scale,  # pyright: ignore[reportArgumentType]
            None if self.minimum is None else scale,  # pyright: ignore[reportArgumentType]
            bits=self.bits,
            pad=self.pad,
            activations=self.activations,
            limit=None if self.limit is None else PartitionSpec(*lead, None, None),
            form=self.form,
        )

    def check(self) -> None:
        """Check the invariants of the class."""
        p = self.packed
        s = self.scale
        expect(self.bits in range(1, 9), self, f"bits is {self.bits}; allowed: 1 to 8")
        forms = {None: None, TERNARY: 2, **dict.fromkeys(FLOATS, 8)}
        expect(
            self.form in forms
            and forms[self.form] in (None, self.bits)
            and (self.form is None or self.minimum is None),
            self,
            f"form is {self.form!r} at {self.bits} bits; allowed: None, 'ternary' at 2 bits, "
            "'e4m3' and 'e5m2' at 8, without a minimum",
        )
        signed = self.bits == 8 and self.minimum is None and self.form is None
        want = jnp.int8 if signed else jnp.uint8
        expect(
            p.dtype == want,
            self,
            f"packed has dtype {p.dtype}; {jnp.dtype(want)} is needed at {self.bits} bits",
        )
        expect(p.ndim >= 2, self, f"packed has shape {p.shape}; allowed: at least [out, in]")
        unit = unit_of(self.bits, self.form)
        expect(
            signed or self._padded % unit == 0,
            self,
            f"{self._padded} codes of {self.bits} bits are not whole bytes",
        )
        expect(
            jnp.issubdtype(s.dtype, jnp.floating),
            self,
            f"scale has dtype {s.dtype}; allowed: a floating-point dtype",
        )
        expect(
            s.ndim == p.ndim and s.shape[:-2] == p.shape[:-2] and s.shape[-2] in (1, p.shape[-2]),
            self,
            f"scale has shape {s.shape}; [..., out or 1, groups or 1] of packed {p.shape} is "
            f"needed",
        )
        expect(
            s.shape[-1] > 0 and self._padded % s.shape[-1] == 0,
            self,
            f"{s.shape[-1]} groups do not divide {self._padded} codes",
        )
        expect(
            s.shape[-1] == 1 or s.shape[-2] == p.shape[-2],
            self,
            "groups need a scale for every row",
        )
        limit = max(self._padded // s.shape[-1], unit) if s.shape[-1] > 1 else self._padded
        expect(
            0 <= self.pad < limit,
            self,
            f"pad is {self.pad}; it must be less than a group",
        )
        check_beside_codes(self)


def unit_of(bits: int, form: str | None) -> int:
    """Return the number of codes in a unit of whole bytes."""
    return 5 if form == TERNARY else codes_per_unit(bits)


# Called outside of jit, each of these is one program in place of one for every operation.


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4), inline=True)
def _store(codes: jax.Array, bits: int, unit: int, symmetric: bool, form: str | None) -> jax.Array:
    """Return the packed codes of rows filled up to a multiple of `unit`."""
    if form in FLOATS:
        if jnp.issubdtype(codes.dtype, jnp.floating):
            codes = jax.lax.bitcast_convert_type(codes.astype(FLOATS[form]), jnp.uint8)
        return pad_last(codes.astype(jnp.uint8), unit)[0]
    if form == TERNARY:
        return pack_trits(pad_last((codes + 1).astype(jnp.uint8), unit)[0])
    if symmetric and bits == 8:
        return pad_last(codes.astype(jnp.int8), unit)[0]
    if symmetric:
        codes = (codes + 1) // 2 if bits == 1 else codes + 2 ** (bits - 1)
    return pack(pad_last(codes.astype(jnp.uint8), unit)[0], bits)


@functools.partial(jax.jit, inline=True)
def _codes(leaf: QTensor) -> jax.Array:
    codes = leaf._padded_codes()
    return codes[..., : leaf._in] if leaf.pad else codes


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _decode(leaf: QTensor, dtype: jnp.dtype) -> jax.Array:
    codes = leaf._padded_codes()
    *lead, n = codes.shape
    # always in float32, so that a scale is not rounded before its weights are
    grouped = codes.reshape(*lead, leaf.groups, n // leaf.groups).astype(jnp.float32)
    weight = grouped * leaf.scale[..., None].astype(jnp.float32)
    if leaf.minimum is not None:
        weight = weight + leaf.minimum[..., None].astype(jnp.float32)
    return weight.astype(dtype).reshape(*lead, n)[..., : leaf._in]


def check_beside_codes(leaf: Any) -> None:
    """Check what a leaf of codes has beside them: minimum, activations and limit.

    Raises:
      InputError: one that does not fit.
    """
    if leaf.minimum is not None:
        same = leaf.minimum.shape == leaf.scale.shape and leaf.minimum.dtype == leaf.scale.dtype
        expect(same, leaf, "minimum differs from scale in shape or dtype")
    expect(
        leaf.activations in (None, "int8", *FLOATS),
        leaf,
        f"activations is {leaf.activations!r}; allowed: None, 'int8', 'e4m3', 'e5m2'",
    )
    if leaf.limit is not None:
        needed = (*leaf.packed.shape[:-2], 1, 1)
        expect(
            leaf.activations is not None and leaf.limit.shape == needed,
            leaf,
            f"limit has shape {leaf.limit.shape}; {needed} is needed, and activations",
        )
