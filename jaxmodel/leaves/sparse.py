"""`Sparse`: a weight with zeros, as a bitmask and the values that it keeps."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool

from jaxmodel import tree
from jaxmodel.leaves.largest import most_kept
from jaxmodel.leaves.leaf import (
    AxisSizes,
    Compressed,
    decode,
    expect,
    full_spec,
    later,
    register,
    shards,
    static,
)
from jaxmodel.leaves.packing import pack, pad_last, unpack
from jaxmodel.leaves.qtensor import FLOATS, QTensor


@register
class Sparse(Compressed):
    """A weight `[..., out, in]` as one bit for each element and the kept values, row by row.

    Invariants (`check`, `check_values`):
      mask: uint8 `[..., out, (in + pad) / 8]`; element i of a row is bit `i % 8` of byte `i // 8`.
        The bits of the padding are zero.
      values: `[..., out, n]`, an array, a `QTensor` or a `Codebook`, where n is the largest number
        of kept elements in any row. The kept values of a row come first, in order; anything that
        decodes to a finite number fills the rest.
      pattern: None, or (N, M): of each M neighbours along the last axis exactly N are kept (a zero
        may be kept); then `n = in / M * N` and nothing is padded.
      scale: None, or `[..., out, groups]`: what the values are multiplied with, a number for each
        group of neighbours of the dense row. The groups are of equal length; the last may be cut
        short. The values are then a symmetric `QTensor` with the scale 1.
      pad: the number of bits that fill up the last byte of each row, fewer than 8.
      group: the length of a group of `scale`.
    """

    mask: Any
    values: Any
    pattern: tuple[int, int] | None = static(default=None)
    pad: int = static(default=0)
    scale: Any = later(default=None)
    group: int | None = later(default=None, fixed=True)

    @classmethod
    def from_dense(
        cls,
        weight: jax.Array,
        keep: Bool[Array, "... out in"] | None = None,
        *,
        pattern: tuple[int, int] | None = None,
    ) -> Sparse:
        """Store the elements where `keep` is true (default: where the weight is not zero).

        Not for use under jit: the length of `values` depends on the data, unless `pattern` fixes
        it.
        """
        keep = weight != 0 if keep is None else keep
        if pattern is not None:
            n = weight.shape[-1] // pattern[1] * pattern[0]
        else:
            n = max(1, int(most_kept(keep)))
        leaf = cls(*_store(weight, keep, n), pattern=pattern, pad=-weight.shape[-1] % 8)
        leaf.check()
        if pattern is not None and not isinstance(keep, Tracer):
            leaf.check_values()  # a group with more than N would lose weights silently
        return leaf

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense weight."""
        return (*self.mask.shape[:-1], self.mask.shape[-1] * 8 - self.pad)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the values."""
        return self.values.dtype

    def keep(self) -> Bool[Array, "... out in"]:
        """Return which elements are kept."""
        return _keep(self)

    def decode(self, dtype: Any = None) -> jax.Array:
        """Return the dense weight."""
        return _decode(self, None if dtype is None else jnp.dtype(dtype))

    def expand(self) -> jax.Array | QTensor:
        """Return the weight with its zeros in place.

        The result is a plain array, or a `QTensor` with the same codes if the values are one.
        """
        if not isinstance(self.values, QTensor) or self.values.minimum is not None:
            return self.decode()
        if self.values.groups > 1:  # a group of kept values has no place in the dense row
            return self.decode()
        codes, bits = (
            _scatter(self.keep(), self.values.codes()),
            max(self.values.bits, 2),  # one bit has no code for zero
        )
        scale = self.values.scale if self.scale is None else self.scale
        of = self.values
        return QTensor.from_codes(
            codes,
            scale,
            bits=bits,
            group=self.group,
            activations=of.activations,
            limit=of.limit,
            form=of.form if of.form in FLOATS else None,
        )

    def specs(self, spec: PartitionSpec, sizes: AxisSizes) -> Sparse:
        """Return the leaf with a `PartitionSpec` in place of each array."""
        *lead, out, last = full_spec(spec, self.ndim)
        parts = shards(last, sizes)
        n = self.shape[-1]
        per = 8 * (self.pattern[1] if self.pattern else 1)
        expect(
            parts == 1 or (self.pattern is not None and self.pad == 0 and n % (parts * per) == 0),
            self,
            f"a spec {spec} cuts the last axis of {n} elements into {parts} parts; only an N:M "
            f"pattern with whole bytes and "
            "groups in each part can be cut there, so shard another axis",
        )
        inner = PartitionSpec(*lead, out, last)
        values = self.values.specs(inner, sizes) if isinstance(self.values, Compressed) else inner
        expect(
            parts == 1 or self.scale is None or n % (parts * (self.group or 1)) == 0,
            self,
            f"a spec {spec} cuts the last axis of {n} elements into {parts} parts, which splits a "
            f"group of {self.group}",
        )
        scale = None if self.scale is None else inner
        return dataclasses.replace(self, mask=inner, values=values, scale=scale)

    def check(self) -> None:
        """Check the invariants that do not need the data."""
        m = self.mask
        v = self.values
        expect(
            m.dtype == jnp.uint8 and m.ndim >= 2,
            self,
            f"mask is {m.dtype} {m.shape}; allowed: uint8 [..., out, bytes]",
        )
        expect(
            len(v.shape) == m.ndim and v.shape[:-1] == m.shape[:-1],
            self,
            f"values has shape {v.shape}; [..., out, kept] for the mask {m.shape} is needed",
        )
        expect(0 <= self.pad < 8, self, f"pad is {self.pad}; allowed: 0 to 7")
        if isinstance(v, Compressed):
            expect(
                not isinstance(v, Sparse), self, "values must be an array, a QTensor or a Codebook"
            )
            v.check()
        expect((self.scale is None) == (self.group is None), self, "scale and group go together")
        if self.scale is not None:
            want = (*m.shape[:-1], -(-self.shape[-1] // (self.group or 1)))
            expect(
                tuple(self.scale.shape) == want,
                self,
                f"scale has shape {self.scale.shape}; {want} is needed",
            )
            expect(
                isinstance(v, QTensor) and v.minimum is None and v.groups == 1,
                self,
                "values under a scale must be a symmetric QTensor with one scale",
            )
        if self.pattern is not None:
            n, per = self.pattern
            expect(
                0 < n <= per and self.shape[-1] % per == 0,
                self,
                f"{n}:{per} does not divide {self.shape[-1]} elements",
            )
            want = self.shape[-1] // per * n
            expect(v.shape[-1] == want, self, f"{v.shape[-1]} values a row; {n}:{per} needs {want}")

    def check_values(self) -> None:
        """Check the invariants that need the data: counts of the mask, zeros behind the last value.

        Not for use under jit.
        """
        found, *right = _checks(self)
        most = int(found)
        whole, clean, ended = map(bool, right)
        n = self.values.shape[-1]
        expect(most <= n, self, f"a row keeps {most} elements but has {n} values")
        if self.pattern is not None:
            expect(whole, self, f"a group does not keep {self.pattern[0]} elements")
        expect(clean, self, "the mask keeps an element of the padding")
        expect(ended, self, "there is a value after the last kept one")


@functools.partial(jax.jit, static_argnums=2)
def _store(
    weight: jax.Array, keep: Bool[Array, "... out in"], n: int
) -> tuple[jax.Array, jax.Array]:
    """Return the bitmask and the values, computed by one program."""
    return pack(pad_last(keep, 8)[0].astype(jnp.uint8), 1), gather_kept(weight, keep, n)


def gather_kept(weight: jax.Array, keep: Bool[Array, "... out in"], n: int) -> jax.Array:
    """Move the kept elements of each row to its start, zeros behind: the inverse of `_scatter`."""
    # n is outside and dropped
    place = jnp.where(keep, jnp.cumsum(keep, axis=-1, dtype=jnp.int32) - 1, n)
    row = lambda w, p: jnp.zeros(n, w.dtype).at[p].set(w, mode="drop")
    for _ in weight.shape[:-1]:  # not as one axis of rows, which rows on several devices are not
        row = jax.vmap(row)
    return row(weight, place)


def _scatter(keep: Bool[Array, "... out in"], values: jax.Array) -> jax.Array:
    """Put the values of each row at the places that are kept, zeros elsewhere."""
    place = jnp.cumsum(keep, axis=-1, dtype=jnp.int32) - 1
    spread = jnp.take_along_axis(values, jnp.clip(place, 0, values.shape[-1] - 1), axis=-1)
    return jnp.where(keep, spread, jnp.zeros((), values.dtype))


@functools.partial(jax.jit, inline=True)
def _keep(leaf: Sparse) -> jax.Array:
    return unpack(leaf.mask, 1)[..., : leaf.shape[-1]].astype(jnp.bool_)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _decode(leaf: Sparse, dtype: jnp.dtype | None) -> jax.Array:
    if leaf.scale is None:
        return _scatter(leaf.keep(), decode(leaf.values, dtype))
    dense = _scatter(leaf.keep(), leaf.values.codes().astype(jnp.float32))
    wide = jnp.repeat(leaf.scale.astype(jnp.float32), leaf.group or 1, axis=-1)
    return (dense * wide[..., : dense.shape[-1]]).astype(leaf.dtype if dtype is None else dtype)


@jax.jit
def _checks(leaf: Sparse) -> tuple[jax.Array, ...]:
    """Return what `check_values` looks at.

    The largest number of elements that a row keeps, and three numbers that are not 0 where all is
    right: each group keeps as many as the pattern says, the mask's padding is zero, and so is what
    stands behind the last kept value.
    """
    keep = leaf.keep()
    kept = jnp.sum(keep, axis=-1, dtype=jnp.int32)
    whole = ended = jnp.ones((), jnp.bool_)
    if leaf.pattern is not None:
        groups = keep.reshape(*leaf.shape[:-1], -1, leaf.pattern[1]).sum(-1)
        whole = jnp.all(groups == leaf.pattern[0])
    clean = jnp.all(unpack(leaf.mask, 1)[..., leaf.shape[-1] :] == 0)
    if not isinstance(leaf.values, Compressed) or _has_zero(leaf.values):
        n = leaf.values.shape[-1]
        behind = jnp.expand_dims(jnp.arange(n), range(kept.ndim)) >= kept[..., None]
        ended = ~jnp.any(jnp.where(behind, decode(leaf.values), 0) != 0)
    return jnp.max(kept, initial=0), whole, clean, ended


def _has_zero(values: Compressed) -> bool:
    """Tell whether what fills up a row decodes to zero: symmetric codes do, except at one bit."""
    return isinstance(values, QTensor) and values.minimum is None and values.bits > 1


def expand(params: tree.Params) -> tree.Params:
    """Expand every `Sparse` leaf of `params`, for running.

    On a device without sparse kernels that is many times faster, since expanding a bitmask in every
    decode step costs more than the step. Memory grows; the stored tree stays packed.
    """
    tree.check(params)
    run = jax.jit(lambda leaf: leaf.expand())
    return tree.map_leaves(lambda _, leaf: run(leaf) if isinstance(leaf, Sparse) else leaf, params)
