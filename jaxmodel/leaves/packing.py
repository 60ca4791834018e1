"""Packing of unsigned codes of 1 to 8 bits along the last axis, without waste.

Widths that divide a byte put neighbouring codes into one byte, the first in the lowest bits. The
other widths (3, 5, 6, 7) put eight codes into `bits` bytes, where byte j holds bit j of all eight.
Either way, `codes_per_unit(bits)` codes take a whole number of bytes, so the packed axis can be cut
(by a mesh, say) at any multiple of that.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Integer, UInt8


def codes_per_unit(bits: int) -> int:
    """Return the number of codes in a unit of the layout, which is a whole number of bytes."""
    return 8 // bits if bits in (1, 2, 4, 8) else 8


def packed_length(n: int, bits: int) -> int:
    """Return the bytes that `n` codes take; `n` is a multiple of `codes_per_unit(bits)`."""
    return n * bits // 8


def unpacked_length(n_bytes: int, bits: int) -> int:
    """Return the number of codes that `n_bytes` bytes hold: the inverse of `packed_length`."""
    return n_bytes * 8 // bits


def pack(codes: Integer[Array, "... n"], bits: int) -> UInt8[Array, "... m"]:
    """Pack codes in [0, 2^bits) along the last axis.

    The axis' length must be a multiple of `codes_per_unit(bits)`.

    >>> pack(jnp.array([1, 2, 3, 4]), 4)
    Array([33, 67], dtype=uint8)
    """
    codes = codes.astype(jnp.uint8)
    if bits == 8:
        return codes
    lead = codes.shape[:-1]
    n = codes.shape[-1]
    if bits in (1, 2, 4):
        groups = codes.reshape(*lead, n * bits // 8, 8 // bits)
        return jnp.sum(groups << _count(8, bits, groups.ndim, -1), axis=-1, dtype=jnp.uint8)
    groups = codes.reshape(*lead, n // 8, 1, 8)
    planes = (groups >> _count(bits, 1, groups.ndim, -2)) & jnp.uint8(1)
    units = jnp.sum(planes << _count(8, 1, groups.ndim, -1), axis=-1, dtype=jnp.uint8)
    return units.reshape(*lead, n // 8 * bits)


def unpack(packed: UInt8[Array, "... m"], bits: int) -> UInt8[Array, "... n"]:
    """Unpack what `pack` packed: one code in each uint8.

    >>> unpack(jnp.array([33, 67], jnp.uint8), 4)
    Array([1, 2, 3, 4], dtype=uint8)
    """
    if bits == 8:
        return packed
    lead = packed.shape[:-1]
    m = packed.shape[-1]
    if bits in (1, 2, 4):
        codes = (packed[..., None] >> _count(8, bits, packed.ndim + 1, -1)) & jnp.uint8(2**bits - 1)
        return codes.reshape(*lead, m * 8 // bits)
    units = packed.reshape(*lead, m // bits, bits, 1)
    planes = (units >> _count(8, 1, units.ndim, -1)) & jnp.uint8(1)
    codes = jnp.sum(planes << _count(bits, 1, units.ndim, -2), axis=-2, dtype=jnp.uint8)
    return codes.reshape(*lead, m // bits * 8)


def pack_trits(codes: Integer[Array, "... n"]) -> UInt8[Array, "... m"]:
    """Pack codes in {0, 1, 2} along the last axis, whose length is a multiple of 5: 5 in a byte.

    >>> pack_trits(jnp.array([2, 0, 1, 0, 2]))
    Array([173], dtype=uint8)
    """
    groups = codes.astype(jnp.uint8).reshape(*codes.shape[:-1], codes.shape[-1] // 5, 5)
    total = groups[..., 4]
    for i in (3, 2, 1, 0):
        total = total * jnp.uint8(3) + groups[..., i]
    return total


def unpack_trits(packed: UInt8[Array, "... m"]) -> UInt8[Array, "... n"]:
    """Unpack what `pack_trits` packed.

    >>> unpack_trits(jnp.array([173], jnp.uint8))
    Array([2, 0, 1, 0, 2], dtype=uint8)
    """
    rest = packed.astype(jnp.uint16)
    trits = []
    for _ in range(5):
        third = (rest * jnp.uint16(171)) >> 9  # floor(rest / 3) below 256, without a division
        trits.append((rest - 3 * third).astype(jnp.uint8))
        rest = third
    return jnp.stack(trits, axis=-1).reshape(*packed.shape[:-1], packed.shape[-1] * 5)


def _count(stop: int, step: int, ndim: int, axis: int) -> jax.Array:
    """Return 0, step, 2 step, ... below stop, along one of `ndim` axes."""
    shape = [1] * ndim
    shape[axis] = -1
    return jnp.arange(0, stop, step, dtype=jnp.uint8).reshape(shape)


def pad_last(array: jax.Array, multiple: int) -> tuple[jax.Array, int]:
    """Pad the last axis with zeros to a multiple.

    Returns:
      The array, and the number of elements added to each row.
    """
    extra = -array.shape[-1] % multiple
    if extra:
        array = jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, extra)])
    return array, extra
