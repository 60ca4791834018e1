"""`Draft`: a matrix on its way through a chain of methods.

A chain opens a leaf into a draft, each method returns another draft, and the end stores the draft
as a leaf. All of it is pure and traceable: `run_chain` runs a chain layer by layer, and `fake` is
the same code with a straight-through gradient, for training that is aware of it.

A draft knows what earlier methods decided (which weights are kept, which values are allowed), and
`Draft.to` holds to it, so no later method can break what an earlier one made.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from jaxmodel.errors import InputError
from jaxmodel.leaves import BlockSparse, Codebook, Compressed, QTensor, Sparse, Turned
from jaxmodel.leaves.block_sparse import cut
from jaxmodel.leaves.hadamard import turn
from jaxmodel.leaves.largest import most_kept
from jaxmodel.leaves.leaf import register, static
from jaxmodel.leaves.packing import pack, pad_last
from jaxmodel.leaves.qtensor import FLOATS, TERNARY
from jaxmodel.leaves.sparse import gather_kept

type LeafStats = Mapping[str, Array]


@register
class Grid:
    """The values that the weights of a matrix may take.

    Even steps: `scale * q`, or `scale * code + minimum`. A table: `scale * table[code]`.

    Attributes:
      scale: `[out or 1, groups]` in the dtype that it is stored in; None for a table without scale.
      minimum: None (q is signed and symmetric, -1 and +1 at one bit), or like `scale`.
      table: None, or `[out or 1, 2^bits]`, sorted.
      bits: of a code.
      form: None, or what else a code is than an integer (see `leaves.QTensor`).
      group: the length of a group of `scale` along a row; None for whole rows.
    """

    scale: Any = None
    minimum: Any = None
    table: Any = None
    bits: int = static(default=8)
    group: int | None = static(default=None)
    form: str | None = static(default=None)

    def _wide(self, small: Array, n: int) -> Array:
        return jnp.repeat(small.astype(jnp.float32), self.group or n, axis=-1)[..., :n]

    def values(self, codes: Integer[Array, "out in"]) -> Float[Array, "out in"]:
        """Return the values that codes stand for."""
        n = codes.shape[-1]
        if self.form in FLOATS:
            numbers = jax.lax.bitcast_convert_type(codes.astype(jnp.uint8), FLOATS[self.form])
            values = numbers.astype(jnp.float32)
        elif self.table is None:
            values = codes.astype(jnp.float32)
        else:
            table = jnp.broadcast_to(
                self.table.astype(jnp.float32), (codes.shape[0], self.table.shape[-1])
            )
            values = jnp.take_along_axis(table, codes, axis=-1)
        if self.scale is not None:
            values = values * self._wide(self.scale, n)
        return values if self.minimum is None else values + self._wide(self.minimum, n)

    def nearest(self, weight: Float[Array, "out in"]) -> Integer[Array, "out in"]:
        """Return the code of the allowed value that is nearest to each weight, as int32."""
        n = weight.shape[-1]
        if self.minimum is not None:
            weight = weight - self._wide(self.minimum, n)
        if self.scale is not None:
            weight = weight / self._wide(self.scale, n)
        if self.table is not None:
            table = self.table.astype(jnp.float32)
            middle = 0.5 * (table[:, 1:] + table[:, :-1])
            more = lambda i, codes: codes + (weight > middle[:, i, None]).astype(jnp.int32)
            codes = jnp.zeros(weight.shape, jnp.int32)
            if middle.shape[-1] >= 16:
                return jax.lax.fori_loop(0, middle.shape[-1], more, codes)
            for i in range(middle.shape[-1]):  # of so few levels, that beats a search
                codes = more(i, codes)
            return codes
        if self.form in FLOATS:
            top = float(jnp.finfo(FLOATS[self.form]).max)
            numbers = jnp.clip(weight, -top, top).astype(FLOATS[self.form])
            return jax.lax.bitcast_convert_type(numbers, jnp.uint8).astype(jnp.int32)
        if self.minimum is not None:
            codes = jnp.clip(jnp.round(weight), 0, 2**self.bits - 1)
        elif self.bits == 1:
            codes = jnp.where(weight < 0, -1.0, 1.0)
        else:
            top = 2 ** (self.bits - 1) - 1
            codes = jnp.clip(jnp.round(weight), -top - (self.form != TERNARY), top)
        return codes.astype(jnp.int32)

    def round(self, weight: Float[Array, "out in"]) -> Float[Array, "out in"]:
        """Return the allowed value that is nearest to each weight."""
        return self.values(self.nearest(weight))


@register
class Draft:
    """One matrix `[out, in]` on its way: the leaf will be `weight`, behind a turned input.

    Attributes:
      weight: float32 `[out, in]`; on the grid where there is one, zero where not kept.
      target: float32 `[out, in]`: the weight before all rounding and pruning of this chain, which
        methods that make up for errors hold `weight` against. None at the end of a chain.
      keep: None, or bool `[out, in]`: the weights that are not pruned.
      grid: None, or the values that are allowed.
      scale: None, or `[in]`: the factor of the contraction's input (see `leaves.Turned`).
      notes: what a method has to say: name -> number (the damping that it took, a count).
      hadamard: the size of the blocks in which the input is rotated; 0 for none.
      kept: how many weights of each row are kept, where that is known before the data is.
      pattern: None, or (N, M): N of each M neighbours are kept.
      block: None, or the size of the blocks that are kept as a whole.
      activations: None, or what the input is rounded to when the leaf runs (see
        `leaves.QTensor`).
      limit: None, or where the input is clipped then, a number.
      changed: whether a method did anything.
    """

    weight: Any
    target: Any
    keep: Any = None
    grid: Any = None
    scale: Any = None
    limit: Any = None
    notes: Any = dataclasses.field(default_factory=dict)
    hadamard: int = static(default=0)
    kept: int | None = static(default=None)
    pattern: tuple[int, int] | None = static(default=None)
    block: tuple[int, int] | None = static(default=None)
    activations: str | None = static(default=None)
    changed: bool = static(default=False)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix."""
        return self.weight.shape

    def to(self, weight: Float[Array, "out in"], **changes: Any) -> Draft:
        """Return the draft with another weight and other fields.

        What is not kept stays zero, and values stay on the grid.
        """
        draft = dataclasses.replace(self, **changes, changed=True)
        if draft.grid is not None:
            weight = draft.grid.round(weight)
        if draft.keep is not None:
            weight = jnp.where(draft.keep, weight, 0.0)
        return dataclasses.replace(draft, weight=weight)

    def note(self, **notes: Array) -> Draft:
        """Return the draft with more notes."""
        return dataclasses.replace(self, notes={**self.notes, **notes})

    def dense(self) -> Float[Array, "out in"]:
        """Return the matrix that the input itself is multiplied with."""
        weight = turn(self.weight, self.hadamard, back=True) if self.hadamard else self.weight
        return weight if self.scale is None else weight * self.scale[None]

    def seen(self, stats: LeafStats) -> LeafStats:
        """Return the statistics of what `weight` meets, from those of the contraction's input.

        Behind a rotation there is no `square` without a `gram`, no histogram and no `fisher`.
        """
        found = dict(stats)
        if self.scale is not None:
            found.pop("histogram", None)
            for name, power in (
                ("gram", self.scale[:, None] * self.scale[None]),
                ("square", self.scale**2),
            ):
                if name in found:
                    found[name] = found[name] * power
        if self.hadamard:
            for name in ("square", "histogram"):
                found.pop(name, None)
            if "gram" in found:
                half = turn(found["gram"], self.hadamard)
                found["gram"] = turn(half.T, self.hadamard).T
                found["square"] = jnp.diagonal(found["gram"])
        for name, power in (("gradient", 1), ("fisher", 2)):  # dense = weight * scale
            if name in found and self.scale is not None:
                found[name] = found[name] * self.scale[None] ** power
        if self.hadamard:
            found.pop("fisher", None)
            if "gradient" in found:
                found["gradient"] = turn(found["gradient"], self.hadamard)
        return found


def open_leaf(leaf: Any) -> Draft:
    """Open one matrix, plain or compressed, into a draft; `store` is the inverse.

    Raises:
      InputError: a leaf of a kind that no chain takes.
    """
    if isinstance(leaf, Turned):
        scale = None if leaf.scale is None else leaf.scale[0].astype(jnp.float32)
        draft = dataclasses.replace(open_leaf(leaf.base), scale=scale, hadamard=leaf.hadamard)
        if leaf.limit is None:
            return draft
        return dataclasses.replace(draft, activations="int8", limit=leaf.limit[0, 0])
    if isinstance(leaf, Sparse):
        values = leaf.values
        weight = leaf.decode(jnp.float32)
        return Draft(
            weight,
            weight,
            leaf.keep(),
            _grid_of(leaf),
            kept=values.shape[-1],
            pattern=leaf.pattern,
            **_input_of(values),
        )
    if isinstance(leaf, BlockSparse):
        height, width = leaf.block
        keep = jnp.repeat(jnp.repeat(leaf.keep(), height, axis=0), width, axis=1)
        weight = leaf.decode(jnp.float32)
        return Draft(weight, weight, keep, block=leaf.block)
    if isinstance(leaf, QTensor | Codebook):
        weight = leaf.decode()
        return Draft(weight, weight, grid=_grid_of(leaf), **_input_of(leaf))
    if isinstance(leaf, Compressed):
        raise InputError(f"chain: takes a matrix, plain or compressed, not {type(leaf).__name__}")
    weight = leaf.astype(jnp.float32)
    return Draft(weight, weight)


def _input_of(leaf: Any) -> dict[str, Any]:
    if not isinstance(leaf, QTensor):
        return {}
    limit = None if leaf.limit is None else leaf.limit[0, 0]
    return {"activations": leaf.activations, "limit": limit}


def _grid_of(leaf: Any) -> Grid | None:
    if isinstance(leaf, Sparse):
        grid = _grid_of(leaf.values)
        if grid is not None and grid.group is not None:
            return None  # groups of kept values have no place in the dense row
        if grid is not None and leaf.scale is not None:
            return dataclasses.replace(grid, scale=leaf.scale, group=leaf.group)
        return grid
    if isinstance(leaf, Codebook):
        group = _group(leaf)
        return Grid(leaf.scale, None, leaf.table, bits=leaf.bits, group=group)
    if isinstance(leaf, QTensor):
        return Grid(leaf.scale, leaf.minimum, bits=leaf.bits, group=_group(leaf), form=leaf.form)
    return None


def _group(leaf: QTensor | Codebook) -> int | None:
    return None if leaf.groups == 1 else (leaf.shape[-1] + leaf.pad) // leaf.groups


def store(draft: Draft) -> Any:
    """Store a draft, of one matrix or of stacked ones, as a leaf.

    Outside of jit, if how many weights a row keeps is not known before the data is.

    Raises:
      InputError: groups of pruned weights that are not rounded symmetrically.
    """
    if draft.grid is None and draft.block is not None and (leaf := _blocks(draft)) is not None:
        return leaf
    n = draft.kept
    if draft.keep is not None and n is None:
        n = max(1, int(most_kept(draft.keep)))
    leaf = _stored(draft, n)
    if isinstance(leaf, Compressed):
        leaf.check()
    return leaf


def _blocks(draft: Draft) -> Any:
    """Return a draft as a `BlockSparse`, or None where not all of a block is kept."""
    block = draft.block or (1, 1)
    some, whole = _whole(draft.keep, block)
    if not bool(whole):
        return None
    return _turned(BlockSparse.from_dense(draft.weight, some, block=block), draft)


@functools.partial(jax.jit, static_argnums=1)
def _whole(keep: Array, block: tuple[int, int]) -> tuple[Array, Array]:
    """Return which blocks keep a weight, and whether these keep all of them."""
    tiles = cut(keep, block)
    some = jnp.any(tiles, axis=(-2, -1))
    return some, jnp.all(some == jnp.all(tiles, axis=(-2, -1)))


def _turned(leaf: Any, draft: Draft) -> Any:
    if draft.scale is None and not draft.hadamard:
        return leaf
    scale = None if draft.scale is None else draft.scale[..., None, :]
    return Turned(leaf, scale, hadamard=draft.hadamard)


@functools.partial(jax.jit, static_argnums=1)
def _stored(draft: Draft, n: int | None) -> Any:
    leaf = draft.weight
    if draft.grid is not None:
        nearest = lambda grid, weight: grid.nearest(weight)
        leaf = _each(nearest, leaf.ndim - 2)(draft.grid, leaf)  # codes
    if draft.keep is not None:
        leaf = _sparse(draft, leaf, n)
    elif draft.grid is not None:
        leaf = _encoded(leaf, draft.grid, draft)
    return _turned(leaf, draft)


def _encoded(codes: Array, grid: Grid, draft: Draft) -> QTensor | Codebook:
    shape: dict[str, Any] = {"bits": grid.bits, "group": grid.group}
    if grid.table is not None:
        return Codebook.from_codes(codes, grid.table, grid.scale, **shape)
    limit = None if draft.limit is None else draft.limit[..., None, None]
    shape |= {"activations": draft.activations, "limit": limit, "form": grid.form}
    return QTensor.from_codes(codes, grid.scale, grid.minimum, **shape)


def _sparse(draft: Draft, dense: Array, n: int | None) -> Sparse:
    grid = draft.grid
    bits, pad = pad_last(draft.keep, 8)
    values = gather_kept(dense, draft.keep, n or 1)
    scale = None
    group = None
    if grid is not None and grid.group is None:
        values = _encoded(values, grid, draft)
    elif grid is not None:
        if grid.minimum is not None or grid.table is not None:
            raise InputError(
                "chain: groups of pruned weights are rounded symmetrically; leave out symmetric="
                "False, or the group"
            )
        scale = grid.scale
        group = grid.group
        one = jnp.ones((*values.shape[:-2], 1, 1), jnp.float32)
        values = _encoded(values, dataclasses.replace(grid, scale=one, group=None), draft)
    mask = pack(bits.astype(jnp.uint8), 1)
    return Sparse(mask, values, pattern=draft.pattern, pad=pad, scale=scale, group=group)


def _each(function: Any, axes: int) -> Any:
    return functools.reduce(lambda inner, _: jax.vmap(inner), range(axes), function)


def opened(chain: tuple[Any, ...], leaf: Any, stats: LeafStats, key: jax.Array) -> Draft:
    """Run a chain on one matrix and return the draft at its end. Traceable.

    Args:
      chain: methods, in order.
      leaf: `[out, in]`.
      stats: of the contraction's input.
      key: from which each method gets its own.
    """
    draft = open_leaf(leaf)
    for i, method in enumerate(chain):
        seen = draft.seen(stats)
        for name in method.needs:
            if name not in seen:
                raise InputError(
                    f"stats: {str(method)!r} needs {name!r} of what the weights meet, which is "
                    "not known" + (" behind a scale or a rotation" if name in stats else "")
                )
        draft = method.step(draft, seen, jax.random.fold_in(key, i))
    return dataclasses.replace(draft, target=None)


@functools.partial(jax.jit, static_argnums=0)
def draft_of(chain: tuple[Any, ...], leaf: Any, stats: LeafStats, keys: jax.Array) -> Draft:
    """Run a chain on a leaf `[..., out, in]`, one layer at a time.

    Args:
      chain: methods, in order.
      leaf: with any number of leading axes, of layers and experts.
      stats: with the same leading axes.
      keys: an array of keys with the same leading axes.
    """
    return each_matrix(functools.partial(opened, chain), leaf, stats, keys)


def each_matrix(run: Any, leaf: Any, *beside: Any) -> Any:
    """Run a function on each matrix `[out, in]` of a leaf, one at a time.

    Args:
      run: `(matrix, *beside) -> a pytree`.
      leaf: `[..., out, in]`, plain or compressed.
      beside: pytrees with the same leading axes.
    """
    for _ in range(len(leaf.shape) - 2):
        run = functools.partial(
            lambda inner, *args: jax.lax.map(lambda one: inner(*one), args), run
        )
    return run(leaf, *beside)


def run_chain(
    chain: tuple[Any, ...],
    leaf: Any,
    stats: LeafStats,
    keys: jax.Array,
    path: str = "the leaf",
) -> tuple[Any, dict[str, jax.Array]]:
    """Apply a chain of methods to one leaf.

    Args:
      chain: methods, in order.
      leaf: `[..., out, in]`, plain or compressed.
      stats: of the contraction's input, with the leading axes of the leaf.
      keys: keys with these axes.
      path: of the leaf, for errors.

    Returns:
      The compressed leaf and the notes of its methods.

    Raises:
      InputError: a method needs statistics that are missing, or does not take the leaf.
    """
    if not chain:
        return leaf, {}
    wanted = dict.fromkeys(name for method in chain for name in (*method.needs, "count"))
    for method in chain:
        for name in method.needs:
            if name not in stats:
                raise InputError(
                    f"stats: {str(method)!r} needs {name!r} of the input of {path!r}, which "
                    f"was not measured; give batches to compress_bundle, or stats from "
                    f"observe(..., statistics=[{name!r}])"
                )
    own = {name: stats[name] for name in wanted if name in stats}
    made = draft_of.eval_shape(chain, leaf, own, keys)
    if made.changed and (made.keep is None or (made.kept is not None and made.block is None)):
        small, notes = stored_of(chain, leaf, own, keys)
        if isinstance(small, Compressed):
            small.check()
        return small, notes
    if not made.changed and not made.notes:
        return leaf, {}  # not even the dtype changes
    draft = draft_of(chain, leaf, own, keys)
    if not draft.changed:
        return leaf, draft.notes
    return store(_narrowed(draft, leaf)), draft.notes


@functools.partial(jax.jit, static_argnums=0)
def stored_of(
    chain: tuple[Any, ...], leaf: Any, stats: LeafStats, keys: jax.Array
) -> tuple[Any, dict[str, jax.Array]]:
    """Run a chain on a leaf and store it, where how many weights a row keeps is known before.

    Args:
      chain: methods, in order.
      leaf: with any number of leading axes.
      stats: as for `draft_of`.
      keys: as for `draft_of`.

    Returns:
      The compressed leaf and the notes of its methods.
    """
    draft = draft_of(chain, leaf, stats, keys)
    return _stored(_narrowed(draft, leaf), draft.kept), draft.notes


def _narrowed(draft: Draft, leaf: Any) -> Draft:
    """Return the draft of a leaf in that leaf's dtype, if it is not rounded."""
    if draft.grid is not None:
        return draft
    return dataclasses.replace(draft, weight=draft.weight.astype(leaf.dtype))


def fake(
    chain: tuple[Any, ...], weight: Float[Array, "... out in"], stats: LeafStats, key: jax.Array
) -> Float[Array, "... out in"]:
    """Return the weight that a chain would store, with the gradient of the identity.

    Training with it is aware of the rounding and the pruning of the chain (straight-through:
    Bengio et al., 2013). Of the key, all matrices get the same draws.
    """
    run = lambda weight, stats: opened(chain, weight, stats, key).dense()
    still = jax.lax.stop_gradient(weight)
    dense = _each(run, weight.ndim - 2)(still, stats)
    return weight + jax.lax.stop_gradient(dense.astype(weight.dtype) - still)
