"""Moving factors and rotations from leaves into those that read them, as `Axes.feeds` says."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float

from jaxmodel import tree
from jaxmodel.axes import Axes, Axis, Letters, Member, assign, groups
from jaxmodel.errors import InputError
from jaxmodel.leaves import Compressed

type Leaves = dict[str, Any]  # layer path -> leaf of one layer


class Feed(NamedTuple):
    """Leaves that scale units, and the leaves that alone read these.

    Attributes:
      sources: layer paths: a norm's weight and bias, or a map and its bias.
      readers: layer paths, whose inputs are the scaled units; they all read the same.
      letters: of the units, as the sources have them: `D`, or `K` and `h`.
      shape: the numbers of units of these letters.
      norm: whether the sources are those of a norm.
    """

    sources: tuple[str, ...]
    readers: tuple[str, ...]
    letters: tuple[str, ...]
    shape: tuple[int, ...]
    norm: bool


class Map(NamedTuple):
    """What `Axes` says about the leaves at hand, one layer at a time.

    Attributes:
      axes: the declaration.
      letters: of each layer path.
      sizes: letter of a path -> number of units.
      feeds: all that have readers.
    """

    axes: Axes
    letters: Mapping[str, Letters]
    sizes: Mapping[tuple[str, str], int]
    feeds: tuple[Feed, ...]


def survey(axes: Axes, params: tree.Params) -> Map:
    """Find the feeds of parameters.

    Args:
      axes: of the model.
      params: arrays, compressed leaves or shapes, stacked in any way.

    Raises:
      InputError: leaves that do not fit the declaration.
    """
    letters = assign(axes, params)
    sizes = {
        (member.path, group.letter): group.size
        for group in groups(axes, params).values()
        for member in group.members
    }
    found: dict[str, list[str]] = {}
    for pattern, readers in axes.feeds:
        regex = re.compile(pattern)
        for path in letters:
            if match := regex.fullmatch(path):
                own = re.sub(
                    r"\\(\d)", lambda n, match=match: re.escape(match[int(n[1])] or ""), readers
                )
                found.setdefault(own, []).append(path)
    feeds = []
    for readers, sources in found.items():
        reading = [path for path in letters if re.fullmatch(readers, path)]
        if not reading:
            continue
        first = next((p for p in sources if letters[p].role != "vector"), sources[0])
        norm = letters[first].role == "vector"
        own = letters[first].axes if norm else letters[first].axes[:-1]
        names = tuple(letter for axis in own for letter in axis[0])
        shape = tuple(sizes[first, letter] for letter in names)
        feeds.append(Feed(tuple(sources), tuple(reading), names, shape, norm))
    return Map(axes, letters, sizes, tuple(feeds))


def spread(
    known: Map, feed: Feed, factor: Float[Array, "..."], reader: str, other: float = 1.0
) -> Float[Array, "..."]:
    """Return a factor of each unit of a feed as a factor of each column of a reader.

    Args:
      known: see `survey`.
      feed: one of its feeds.
      factor: of the shape of the feed.
      reader: one of its readers.
      other: the factor of columns that hold other units.

    Returns:
      An array that `leaf * array` takes: `[..., 1, in]`.
    """
    *lead, last = known.letters[reader].axes
    outer = [letter for axis in lead[:-1] for letter in axis[0]]
    shared = [letter for letter in outer if letter in feed.letters]
    parts = []
    for product in last:
        names = [*outer, *product]
        if not set(feed.letters) <= set(names):
            sizes = [known.sizes[reader, letter] for letter in product]
            parts.append(jnp.full((*_ones(outer, shared, feed), 1, math.prod(sizes)), other))
            continue
        order = [feed.letters.index(letter) for letter in names if letter in feed.letters]
        wide = factor.transpose(order)
        kept = iter(wide.shape)
        wide = wide.reshape([next(kept) if n in feed.letters else 1 for n in names])
        full = [
            known.sizes[reader, n] if n in product else wide.shape[i] for i, n in enumerate(names)
        ]
        wide = jnp.broadcast_to(wide, full)
        parts.append(wide.reshape(*wide.shape[: len(outer)], 1, -1))
    return jnp.concatenate(parts, axis=-1)


def _ones(outer: list[str], shared: list[str], feed: Feed) -> list[int]:
    return [feed.shape[feed.letters.index(n)] if n in shared else 1 for n in outer]


def gathered(
    known: Map, feed: Feed, columns: Float[Array, "..."], reader: str
) -> Float[Array, "..."]:
    """Return the largest value among the columns of each unit: the inverse of `spread`.

    Args:
      known: see `survey`.
      feed: one of its feeds.
      columns: one value for each column of a reader, `[..., in]`, not negative.
      reader: one of its readers.

    Returns:
      An array of the shape of the feed.
    """
    *lead, last = known.letters[reader].axes
    outer = [letter for axis in lead[:-1] for letter in axis[0]]
    start = 0
    best = jnp.zeros(feed.shape, columns.dtype)
    for product in last:
        sizes = [known.sizes[reader, letter] for letter in product]
        part = columns[..., start : start + math.prod(sizes)]
        start += math.prod(sizes)
        names = [*outer, *product]
        if not set(feed.letters) <= set(names):
            continue
        part = part.reshape(*part.shape[:-1], *sizes)
        part = part.max(axis=[i for i, n in enumerate(names) if n not in feed.letters])
        left = [n for n in names if n in feed.letters]
        part = part.transpose([left.index(n) for n in feed.letters])
        best = jnp.maximum(best, part)
    return best


def move(known: Map, leaves: Leaves, feed: Feed, factor: Float[Array, "..."]) -> None:
    """Divide the sources of a feed by a factor of each unit, and multiply its readers with it.

    Args:
      known: see `survey`.
      leaves: plain arrays by layer path, changed in place.
      feed: one of the feeds.
      factor: above zero, of the feed's shape.
    """
    offset = known.axes.norm_offset if feed.norm else 0.0
    for path in feed.sources:
        leaf = leaves[path]
        wide = plain(path, leaf).astype(jnp.float32)
        lead = wide.shape if known.letters[path].role == "vector" else wide.shape[:-1]
        wide = (wide + offset) / factor.reshape(*lead, *(1,) * (wide.ndim - len(lead))) - offset
        leaves[path] = wide.astype(leaf.dtype)
    for path in feed.readers:
        multiply(leaves, path, spread(known, feed, factor, path))


def multiply(leaves: Leaves, path: str, factor: Float[Array, "..."]) -> None:
    """Multiply a leaf, in float32, and keep its dtype."""
    leaf = leaves[path]
    leaves[path] = (plain(path, leaf).astype(jnp.float32) * factor).astype(leaf.dtype)


def fold_norms(known: Map, leaves: Leaves, paths: set[str], weights: set[str]) -> set[str]:
    """Move the weights of norms into the leaves that read them, so that they become ones.

    Args:
      known: see `survey`.
      leaves: by layer path, changed in place.
      paths: of the stream that the norms read.
      weights: the vectors that something is multiplied with; those of norms are among them.

    Returns:
      The layer paths of the norms' weights.

    Raises:
      InputError: a norm with a bias has a weight of zero, by which nothing can be divided.
    """
    offset = known.axes.norm_offset
    ones = set()
    for feed in known.feeds:
        if not feed.norm or not set(feed.sources) <= paths:
            continue
        weight = next(path for path in feed.sources if path in weights)
        factor = plain(weight, leaves[weight]).astype(jnp.float32) + offset
        for bias in set(feed.sources) - {weight}:
            own = plain(bias, leaves[bias]).astype(jnp.float32)
            lost = (factor == 0) & (own != 0)
            if not isinstance(lost, Tracer) and bool(jnp.any(lost)):
                raise InputError(
                    f"rotate: {weight!r} is zero where {bias!r} is not, so the matrices behind "
                    "cannot take it; give stream=False"
                )
            leaves[bias] = (own / jnp.where(factor == 0, 1.0, factor)).astype(leaves[bias].dtype)
        leaves[weight] = jnp.full_like(leaves[weight], 1 - offset)
        ones.add(weight)
        for path in feed.readers:
            multiply(leaves, path, spread(known, feed, factor, path))
    return ones


def turn_member(array: Array, member: Member, size: int, matrix: Float[Array, "n n"]) -> Array:
    """Multiply the units that a leaf has of a group with an orthogonal matrix.

    Args:
      array: the leaf.
      member: where the units are in it.
      size: how many there are.
      matrix: orthogonal.
    """
    stop = member.start + member.before * size * member.after
    axis = member.axis
    first, own, rest = jnp.split(array, [member.start, stop], axis=axis)
    shape = own.shape
    blocks = own.reshape(*shape[:axis], member.before, size, member.after, *shape[axis + 1 :])
    turned = rotate_axis(blocks, matrix, axis + 1).reshape(shape)
    return jnp.concatenate([first, turned, rest], axis=axis)


def rotate_axis(array: Array, matrix: Float[Array, "n n"], axis: int) -> Array:
    """Multiply blocks of an axis with an orthogonal matrix: `x -> x @ matrix` in each.

    Args:
      array: the size of the matrix divides the axis.
      matrix: orthogonal.
      axis: counted from the front or the end.
    """
    moved = jnp.moveaxis(array.astype(jnp.float32), axis, -1)
    blocks = moved.reshape(*moved.shape[:-1], -1, matrix.shape[0])
    turned = jnp.matmul(blocks, matrix, precision="highest").reshape(moved.shape)
    return jnp.moveaxis(turned, -1, axis).astype(array.dtype)


def plain(path: str, leaf: Any) -> jax.Array:
    """Return a leaf that is a plain array.

    Raises:
      InputError: it is compressed; transforms come before methods.
    """
    if isinstance(leaf, Compressed):
        raise InputError(
            f"transform: {path!r} is a {type(leaf).__name__} already; allowed: plain weights, "
            "which are compressed afterwards"
        )
    return leaf


def product_of(axis: Axis) -> tuple[str, ...]:
    """Return the letters of an axis that is no concatenation, else none."""
    return axis[0] if len(axis) == 1 else ()


def one_reader(known: Map, feed: Feed) -> str:
    """Return a reader of a feed whose input is measured: one that sees all tokens, if there is."""
    return min(feed.readers, key=lambda path: known.letters[path].role == "experts")
