"""The range of a grid: which scale, and which minimum, a row or a group of weights gets."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodel.compress.draft import Grid

SHRINKS = 60
"""How many narrower ranges a search tries, the narrowest of a third."""


def even_grid(
    weight: Float[Array, "out in"],
    bits: int,
    group: int | None = None,
    *,
    symmetric: bool = True,
    search: float | None = None,
    importance: Float[Array, " in"] | None = None,
    keep: Array | None = None,
    dtype: str | None = None,
) -> Grid:
    """Return a grid of even steps for each row, or group of a row.

    Args:
      weight: the weights; those that are not kept are zero.
      bits: of a code, 1 to 8.
      group: the length of a group; the last may be cut short. None for whole rows.
      symmetric: steps on both sides of zero, or from the smallest weight to the largest.
      search: None for a range that holds all weights; else the power p: of `SHRINKS` narrower
        ranges, the one whose sum of `importance * |error|^p` is least.
      importance: of each input, for the search; None for equal ones.
      keep: the weights that are not pruned; None for all.
      dtype: of the stored scale; None for float32 for whole rows, else float16.
    """
    out, n = weight.shape
    size = min(group or n, n)
    groups = -(-n // size)
    # the padding repeats the last weight, so that it widens no range
    index = jnp.minimum(jnp.arange(groups * size), n - 1)
    cut = lambda array: array[..., index].reshape(*array.shape[:-1], groups, size)
    own = cut(weight)
    kept = None if keep is None else cut(keep)
    cost = None if importance is None else cut(importance)
    inside = jnp.arange(groups * size).reshape(groups, size) < n
    kind = jnp.dtype(dtype or ("float16" if group else "float32"))
    if not symmetric:
        low = jnp.min(own, axis=-1)
        high = jnp.max(own, axis=-1)
    elif bits == 1:
        mass = jnp.where(inside[None], jnp.abs(own), 0.0)
        count = jnp.sum(inside[None] if kept is None else inside[None] & kept, axis=-1)
        low = jnp.sum(mass, axis=-1) / jnp.maximum(count, 1).astype(jnp.float32)
        high = low
    else:
        high = jnp.max(jnp.abs(own), axis=-1) / (2 ** (bits - 1) - 1)
        low = high

    def grid(factor: Array | float) -> Grid:
        if symmetric:
            scale = high * factor
            minimum = None
        else:
            minimum = (low * factor).astype(kind)
            scale = (high * factor - minimum.astype(jnp.float32)) / (2**bits - 1)
        scale = jnp.maximum(scale, float(jnp.finfo(kind).tiny)).astype(kind)
        return Grid(scale, minimum, bits=bits, group=group if groups > 1 else None)

    if search is None or bits == 1:
        return grid(1.0)

    def error(factor: Array) -> Array:
        off = jnp.abs(cut(grid(factor).round(weight)) - own) ** search
        off = jnp.where(inside[None] if kept is None else inside[None] & kept, off, 0.0)
        return jnp.sum(off if cost is None else off * cost[None], axis=-1)

    def better(best: tuple[Array, Array], factor: Array) -> tuple[tuple[Array, Array], None]:
        found = error(factor)
        least, at = best
        return (jnp.where(found < least, found, least), jnp.where(found < least, factor, at)), None

    start = (jnp.full((out, groups), jnp.inf), jnp.ones((out, groups)))
    factors = jnp.linspace(1.0, 1 / 3, SHRINKS)
    (_, factor), _ = jax.lax.scan(better, start, factors)
    return grid(factor)
