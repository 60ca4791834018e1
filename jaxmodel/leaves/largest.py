"""The largest of some numbers, found by counting: no sort, and on a mesh only counts are sent."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt32


def largest(scores: Float[Array, "..."], count: int | Array, axes: int = 1) -> Bool[Array, "..."]:
    """Mark the `count` largest scores; of equal ones the first.

    The threshold is found bit by bit, in 32 passes that only count.

    Args:
      scores: any numbers but NaN; infinities are allowed.
      count: how many; if it is an array, it has the axes in front of the last ones, or none.
      axes: 1: along the last axis; 2: among all of the last two.

    >>> largest(jnp.array([1.0, -3.0, 2.0, 1.0]), 2).tolist()
    [True, False, True, False]
    >>> largest(jnp.array([[1.0, 3.0], [2.0, 1.0]]), 3, axes=2).tolist()
    [[True, True], [True, False]]
    """
    order = ordered(scores)
    last = tuple(range(-axes, 0))
    count = jnp.expand_dims(jnp.asarray(count, jnp.int32), last)
    count = count if count.ndim == order.ndim else count.reshape((1,) * order.ndim)
    counted = lambda marked: jnp.sum(marked, axis=last, keepdims=True, dtype=jnp.int32)

    def refine(i: Array, threshold: Array) -> Array:
        higher = threshold | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(counted(order >= higher) >= count, higher, threshold)

    start = jnp.zeros((*order.shape[:-axes], *(1,) * axes), jnp.uint32)
    threshold = jax.lax.fori_loop(0, 32, refine, start)
    above = order > threshold
    equal = order == threshold
    place = jnp.cumsum(equal, axis=-1, dtype=jnp.int32)
    if axes == 2:  # not as one long row, which rows on several devices are not
        rows = place[..., -1:]
        place = place + jnp.cumsum(rows, axis=-2, dtype=jnp.int32) - rows
    return above | (equal & (place <= count - counted(above)))


@jax.jit
def most_kept(keep: Bool[Array, "... n"]) -> Array:
    """Return the largest number of marks in a row of a mask, of any number of rows.

    >>> int(most_kept(jnp.array([[True, False], [True, True]])))
    2
    """
    return jnp.max(jnp.sum(keep, axis=-1), initial=0)


def ordered(scores: Float[Array, "..."]) -> UInt32[Array, "..."]:
    """Return unsigned numbers that are ordered like the scores; both zeros are the same."""
    bits = jax.lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits > sign, ~bits, bits | sign)


def score_of(number: int) -> float:
    """Return the score that `ordered` makes this number of."""
    bits = number ^ (1 << 31) if number >> 31 else ~number & 0xFFFFFFFF
    return float(np.uint32(bits).view(np.float32))
