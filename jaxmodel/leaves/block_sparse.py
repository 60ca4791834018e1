"""`BlockSparse`: a block-sparse weight, as a bitmask of blocks and the blocks that it keeps."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxmodel.errors import InputError
from jaxmodel.leaves.largest import largest, most_kept
from jaxmodel.leaves.leaf import AxisSizes, Compressed, expect, full_spec, register, shards, static
from jaxmodel.leaves.packing import pack, pad_last, unpack


@register
class BlockSparse(Compressed):
    """A block-sparse weight `[..., out, in]`.

    It is cut into blocks `[height, width]`, of which each block row keeps at most `n`.

    Blocks are large enough for matrix kernels, so they need not be decoded first as the elements of
    a `Sparse` must be: a product reads only the blocks that are kept (see
    `jaxmodel.ops.block_sparse`).

    Invariants (`check`, `check_values`):
      mask: uint8 `[..., out / height, (in / width + pad) / 8]`; block i of a row is bit `i % 8` of
        byte `i // 8`. The bits of the padding are zero.
      values: an array `[..., out / height, n, height, width]`, where n is the largest number of
        kept blocks in any block row. The kept blocks of a row come first, in order; zeros fill the
        rest.
      pad: the number of bits that fill up the last byte of each row, fewer than 8.
    """

    mask: Any
    values: Any
    pad: int = static(default=0)

    @classmethod
    def from_dense(
        cls,
        weight: jax.Array,
        keep: Bool[Array, "... rows columns"] | None = None,
        *,
        block: tuple[int, int],
    ) -> BlockSparse:
        """Store the blocks where `keep` is true (default: the blocks that are not all zero).

        Args:
          weight: `[..., out, in]`.
          keep: a bool for each block. It must not be traced, because the length of `values` depends
            on it.
          block: height and width of a block, which divide `out` and `in`.

        Raises:
          InputError: the blocks do not divide the weight, or the mask has another shape or is
            traced.
        """
        keep = _some(weight, block) if keep is None else keep
        if isinstance(keep, Tracer):
            raise InputError(
                "keep: a traced mask was given; the number of kept blocks must be known before "
                "compilation"
            )
        want = jax.eval_shape(lambda weight: cut(weight, block), weight).shape[:-2]
        if keep.shape != want:
            raise InputError(
                f"keep: shape {keep.shape} given; allowed: {want}, a bit for each block"
            )
        n = max(1, int(most_kept(keep)))
        leaf = cls(*_store(weight, keep, block, n), pad=-keep.shape[-1] % 8)
        leaf.check()
        return leaf

    @property
    def block(self) -> tuple[int, int]:
        """The height and width of a block."""
        return self.values.shape[-2], self.values.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense weight."""
        height, width = self.block
        *lead, rows, n_bytes = self.mask.shape
        return (*lead, rows * height, (n_bytes * 8 - self.pad) * width)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the values."""
        return self.values.dtype

    def keep(self) -> Bool[Array, "... rows columns"]:
        """Return which blocks are kept."""
        return unpack(self.mask, 1)[..., : self.mask.shape[-1] * 8 - self.pad].astype(jnp.bool_)

    def columns(self) -> Int[Array, "... rows n"]:
        """Return the block column of each stored block.

        A block of zeros that only fills up its row gets some free column.
        """
        return _first(self.keep(), self.values.shape[-3])

    def decode(self, dtype: Any = None) -> jax.Array:
        """Return the dense weight."""
        tiles = _spread(
            self.keep(), self.values if dtype is None else self.values.astype(dtype), axis=-3
        )
        return jnp.swapaxes(tiles, -3, -2).reshape(self.shape)

    def rows(self, ids: Int[Array, "..."]) -> Float[Array, "..."]:
        """Decode only the rows `ids` of a leaf without leading axes: `[*ids.shape, in]`."""
        if self.ndim != 2:
            raise InputError(
                f"BlockSparse.rows: a leaf of shape {self.shape} given; allowed: [out, in]"
            )
        height = self.block[0]
        at = lambda a, i: jnp.take(a, i, axis=0, mode="clip")
        # [out, n, width]
        values = self.values.swapaxes(-3, -2).reshape(self.shape[0], *self.values.shape[-3::2])
        return _spread(at(self.keep(), ids // height), at(values, ids), axis=-2).reshape(
            *ids.shape, self.shape[-1]
        )

    def specs(self, spec: PartitionSpec, sizes: AxisSizes) -> BlockSparse:
        """Return the leaf with a `PartitionSpec` in place of each array."""
        *lead, out, last = full_spec(spec, self.ndim)
        rows = self.mask.shape[-2]
        parts = shards(out, sizes)
        expect(
            shards(last, sizes) == 1,
            self,
            f"a spec {spec} cuts the last axis, whose blocks have no fixed places; shard another "
            "axis",
        )
        expect(
            rows % parts == 0,
            self,
            f"a spec {spec} cuts {rows} rows of blocks into {parts} parts, which splits a block",
        )
        return type(self)(PartitionSpec(*lead, out), PartitionSpec(*lead, out), pad=self.pad)  # pyright: ignore

    def check(self) -> None:
        """Check the invariants that do not need the data."""
        m = self.mask
        v = self.values
        expect(
            m.dtype == jnp.uint8 and m.ndim >= 2,
            self,
            f"mask is {m.dtype} {m.shape}; allowed: uint8 [..., rows, bytes]",
        )
        expect(
            v.ndim == m.ndim + 2 and v.shape[:-3] == m.shape[:-1],
            self,
            f"values has shape {v.shape}; [..., rows, n, height, width] for the mask {m.shape} is "
            "needed",
        )
        expect(0 <= self.pad < 8, self, f"pad is {self.pad}; allowed: 0 to 7")
        columns = m.shape[-1] * 8 - self.pad
        expect(
            v.shape[-3] <= columns, self, f"{v.shape[-3]} blocks are stored for rows of {columns}"
        )

    def check_values(self) -> None:
        """Check the invariants that need the data: counts of the mask, zeros behind the last block.

        Not for use under jit.
        """
        kept = jnp.sum(self.keep(), axis=-1, dtype=jnp.int32)
        n = self.values.shape[-3]
        expect(
            int(jnp.max(kept, initial=0)) <= n,
            self,
            f"a row keeps {int(jnp.max(kept))} blocks but has {n}",
        )
        padding = unpack(self.mask, 1)[..., self.keep().shape[-1] :]
        expect(not bool(jnp.any(padding != 0)), self, "the mask keeps a block of the padding")
        behind = _count(n, kept.ndim + 1) >= kept[..., None]
        filled = jnp.any(
            jnp.where(behind[..., None, None], self.values, jnp.zeros((), self.dtype)) != 0
        )
        expect(not bool(filled), self, "there is a value after the last kept block")


def cut(
    weight: jax.Array, block: tuple[int, int]
) -> Shaped[Array, "... rows columns height width"]:
    """Cut a weight `[..., out, in]` into its blocks.

    Raises:
      InputError: the blocks do not divide the weight.
    """
    (height, width), (*lead, out, n) = block, weight.shape
    if height < 1 or width < 1 or out % height or n % width:
        raise InputError(
            f"block: {block} given; allowed: divisors of the weight's {out} rows and {n} columns"
        )
    return jnp.swapaxes(weight.reshape(*lead, out // height, height, n // width, width), -3, -2)


def largest_blocks(
    weight: jax.Array, block: tuple[int, int], kept: int
) -> Bool[Array, "... rows columns"]:
    """Select the `kept` blocks of each block row that have the largest sum of squares.

    The first of equal blocks wins. Every row keeps the same number, so none needs filling up and
    each costs the same.

    Raises:
      InputError: the blocks do not divide the weight, or `kept` is not between 1 and their number.
    """
    size = jnp.sum(jnp.square(cut(weight, block).astype(jnp.float32)), axis=(-2, -1))
    if not 0 < kept <= size.shape[-1]:
        raise InputError(f"kept: {kept} given; allowed: 1 to {size.shape[-1]} blocks of a row")
    return largest(size, kept)


@functools.partial(jax.jit, static_argnums=1)
def _some(weight: jax.Array, block: tuple[int, int]) -> Bool[Array, "... rows columns"]:
    return jnp.any(cut(weight, block) != 0, axis=(-2, -1))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _store(
    weight: jax.Array, keep: Bool[Array, "... rows columns"], block: tuple[int, int], n: int
) -> tuple[jax.Array, jax.Array]:
    """Return the bitmask and the values, computed by one program."""
    first = _first(keep, n)
    there = jnp.sum(keep, axis=-1, keepdims=True) > _count(n, keep.ndim)
    values = jnp.take_along_axis(cut(weight, block), first[..., None, None], axis=-3)
    values = jnp.where(there[..., None, None], values, jnp.zeros((), values.dtype))
    return pack(pad_last(keep, 8)[0].astype(jnp.uint8), 1), values


def _first(keep: Bool[Array, "... columns"], n: int) -> Int[Array, "... n"]:
    """Return the first `n` places of each row, with the kept places in front."""
    return jnp.argsort(~keep, axis=-1, stable=True)[..., :n].astype(jnp.int32)


def _spread(keep: Bool[Array, "..."], values: jax.Array, axis: int) -> jax.Array:
    """Put the stored blocks, along `axis`, at the places that are kept, zeros elsewhere."""
    place = jnp.clip(jnp.cumsum(keep, axis=-1, dtype=jnp.int32) - 1, 0, values.shape[axis] - 1)
    tail = (1,) * (-1 - axis)
    found = jnp.take_along_axis(values, place.reshape(*place.shape, *tail), axis=axis)
    return jnp.where(keep.reshape(*keep.shape, *tail), found, jnp.zeros((), values.dtype))


def _count(n: int, ndim: int) -> Int[Array, "..."]:
    return jnp.arange(n).reshape((1,) * (ndim - 1) + (n,))
