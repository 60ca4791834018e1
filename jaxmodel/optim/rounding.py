"""Stochastic rounding to few bits, exact on average.

It has a cheap dither, codes on a curved grid, and weights whose scales change slowly.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from jaxmodel.errors import InputError
from jaxmodel.leaves import QTensor
from jaxmodel.leaves.packing import pad_last
from jaxmodel.leaves.qtensor import FLOATS

HEADROOM = 1.25
"""The headroom of a new scale above the largest weight of its group.

With it, the next updates need no other scale.
"""
SHRINK = 0.4
"""A scale is reduced if the largest weight of its group uses less than this share of it."""
GROUPS = (128, 64, 32)
"""Lengths of a block of values that share a scale; the first that divides a row is used."""


def dither(key: jax.Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Return uniform random numbers in [0, 1), one for each element.

    The key is used once, and the index of each element is hashed with it (two rounds of a 32-bit
    mixer, Wellons, 2018). This is thirty times cheaper than `jax.random.uniform` on a CPU, the same
    however the array is sharded, and good enough for rounding.

    >>> u = dither(jax.random.key(0), (1000, 1000))
    >>> bool(jnp.abs(u.mean() - 0.5) < 1e-3), bool(u.min() >= 0), bool(u.max() < 1)
    (True, True, True)
    """
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    place = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        place = place + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(
            stride % 2**32
        )
        stride *= shape[axis]
    word = _mixed(_mixed(place ^ first) ^ second)
    return (word >> 8).astype(jnp.float32) * jnp.float32(2**-24)


def _mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def group_of(length: int, groups: tuple[int, ...] = GROUPS) -> int | None:
    """Return the longest of these block lengths that divides a row, or None.

    >>> group_of(768), group_of(96), group_of(65)
    (128, 32, None)
    """
    return next((group for group in groups if length % group == 0), None)


# ------------------------------------------------------------------------------------------ weights


@functools.partial(jax.jit, static_argnames=("group", "bits"), inline=True)
def rounded(weight: Float[Array, "... out in"], group: int | None = None, bits: int = 8) -> QTensor:
    """Quantise a weight to the nearest codes, to begin training with.

    The scale of a group is `1.25 max |w| / (2^(bits-1) - 1)`.

    Args:
      weight: a matrix, or a stack of matrices.
      group: the number of weights of a row that share a scale; None for the longest of `GROUPS`
        that divides a row, or one scale per row.
      bits: 2 to 8.
    """
    weight = weight.astype(jnp.float32)
    group = group_of(weight.shape[-1]) if group is None else group
    padded, _ = pad_last(weight, group or 1)
    grouped = padded.reshape(*padded.shape[:-1], -1, group or weight.shape[-1])
    top = 2 ** (bits - 1) - 1
    scale = jnp.maximum(
        jnp.max(jnp.abs(grouped), axis=-1) * (HEADROOM / top), jnp.finfo(jnp.float32).tiny
    )
    codes = jnp.round(grouped / scale[..., None]).reshape(padded.shape)[..., : weight.shape[-1]]
    return QTensor.from_codes(codes.astype(jnp.int32), scale, bits=bits, group=group)


@functools.partial(jax.jit, inline=True)
def moved(leaf: QTensor, update: Float[Array, "..."], key: jax.Array) -> QTensor:
    """Add an update with stochastic rounding: `E[decode(moved(w, u))] = decode(w) + u`.

    A group keeps its scale while its largest weight fits and uses it, because with another scale
    every weight of the group would lie between two codes and be rounded, not only those that move.

    Args:
      leaf: a symmetric leaf of 2 to 8 bits.
      update: an array of the leaf's shape.
      key: the random key of this leaf and step.

    Raises:
      InputError: the leaf is of another kind.
    """
    if leaf.minimum is not None or leaf.bits < 2 or leaf.form in FLOATS:
        kind = "an affine QTensor" if leaf.minimum is not None else "a QTensor of 1 bit"
        kind = f"a QTensor of the form {leaf.form!r}" if leaf.form in FLOATS else kind
        raise InputError(
            f"trainable: {kind} cannot be rounded stochastically; allowed: symmetric QTensors of 2 "
            "to 8 bits"
        )
    top = 2 ** (leaf.bits - 1) - 1
    n = leaf.shape[-1]
    groups = leaf.groups
    width = (n + leaf.pad) // groups

    def grouped(a: Array) -> Array:
        a = jnp.pad(a.astype(jnp.float32), [(0, 0)] * (a.ndim - 1) + [(0, leaf.pad)])
        return a.reshape(*a.shape[:-1], groups, width)

    codes = grouped(leaf.codes())
    step = grouped(update)
    scale = leaf.scale.astype(jnp.float32)
    peak = jnp.max(jnp.abs(codes * scale[..., None] + step), axis=-1)
    if scale.shape[-2] < peak.shape[-2]:  # one scale for all rows
        peak = jnp.max(peak, axis=-2, keepdims=True)
    fits = (peak <= top * scale) & (peak >= (SHRINK * top) * scale)
    new = jnp.maximum(peak * jnp.float32(HEADROOM / top), jnp.finfo(leaf.scale.dtype).tiny)
    new = jnp.where(fits, leaf.scale, new.astype(leaf.scale.dtype))
    wide = new.astype(jnp.float32)
    # equal to the codes if the scale stays
    place = codes * (scale / wide)[..., None] + step / wide[..., None]
    place = jnp.clip(jnp.floor(place + dither(key, place.shape)), -top, top)
    place = place.reshape(*place.shape[:-2], groups * width)[..., :n].astype(jnp.int32)
    group = width if groups > 1 or leaf.pad else None
    return QTensor.from_codes(
        place,
        new,
        bits=leaf.bits,
        group=group,
        activations=leaf.activations,
        limit=leaf.limit,
        form=leaf.form,
    )


# ------------------------------------------------------------------------------------------ moments


def curved(x: Float[Array, "..."], group: int, power: int, signed: bool, key: jax.Array) -> QTensor:
    """Quantise values to 8-bit codes on a grid that is finer near zero.

    `|x| = r^power` with r on an even grid, and a scale for each block. A value is rounded to one of
    its two neighbours at random so that its mean is exact; so a running mean that moves by less
    than a grid step still moves. (Block-wise 8-bit states: Dettmers et al., 2022.)

    Args:
      x: an array with two or more axes.
      group: the length of a block of the last axis, which it divides.
      power: 2 or 4; 2 spans a range of 1 to 127^2 below the largest value of a block, 4 a range of
        1 to 255^4.
      signed: False for values of at least 0, whose grid then begins at the smallest of the block.
      key: the random key of this array and step.
    """
    blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, group)
    size = jnp.abs(blocks)
    root = jnp.sqrt(size) if power == 2 else jnp.sqrt(jnp.sqrt(size))
    top = 127 if signed else 255
    low = jnp.zeros_like(root[..., 0]) if signed else jnp.min(root, axis=-1)
    scale = jnp.maximum((jnp.max(root, axis=-1) - low) / top, jnp.finfo(jnp.float32).tiny)
    at = lambda k: (low[..., None] + k * scale[..., None]) ** power
    below = jnp.clip(jnp.floor((root - low[..., None]) / scale[..., None]), 0, top - 1)
    gap = jnp.maximum(at(below + 1) - at(below), jnp.finfo(jnp.float32).tiny)
    codes = below + (dither(key, size.shape) < (size - at(below)) / gap).astype(jnp.float32)
    codes = jnp.where(blocks < 0, -codes, codes).reshape(x.shape).astype(jnp.int32)
    return QTensor.from_codes(codes, scale, None if signed else low, bits=8, group=group)


def straight(leaf: QTensor, power: int) -> Float[Array, "..."]:
    """Return the values of codes that `curved` made."""
    root = leaf.decode(jnp.float32)
    return jnp.sign(root) * jnp.abs(root) ** power
