"""`Probe`: a leaf that measures the input of its contraction, read out by differentiation.

The op computes its output `y` and returns `tap(y, x, zeros)`: `y` unchanged, but with a gradient
for the zeros that is the statistic of `x`. `jax.grad` of anything downstream with respect to the
zeros then returns the statistics of every layer, under `scan`, `remat`, `jit` and on a mesh,
without hooks and without a second model. The *output* is tapped, because the gradient of an input
is zero behind a rounding or an argmax, and so the statistic would silently be zero too.

Every statistic is a sum over tokens, so statistics of batches and shards can be added.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmodel.errors import InputError, unknown
from jaxmodel.leaves.leaf import register, static
from jaxmodel.ops.product import precision

HISTOGRAM_BINS = 64
HISTOGRAM_STEP = 0.5  # octaves; bin i counts |x| in [2^(i*STEP + LOW), 2^((i+1)*STEP + LOW))
HISTOGRAM_LOW = -24.0

STATISTICS = ("count", "taken", "square", "gram", "histogram", "norms", "tokens")
# the gradient of the weight itself, for a leaf that has none; not a statistic of the input alone
GRADIENT = "gradient"
OF_TAKE = ("taken", "tokens")  # the statistics of a lookup; the others belong to a contraction


@register
class Probe:
    """A weight, and the zeros whose gradient is the statistics.

    `zeros` maps a statistic to an array, with the weight's leading axes (layers, experts) in front:
      count: [], the number of rows of x in a contraction (always there).
      taken: [], the number of rows looked up by `take` (always there).
      square: [in], sum of x^2.
      gram: [in, in], X^T X.
      histogram: [bins], the number of elements of x by log |x| on a fixed grid.
      norms: [2, bins], of the rows of x by the log of their root mean square, on the same grid:
        how many there are, and the sum of their squares (see `top_share`).
      tokens: [rows of the table], how often each row was looked up.
      gradient: [out, in], the gradient of the array that the weight stands for, in the dtype of
        the zeros. This is how a compressed weight trains (see `jaxmodel.optim.quantized`).

    `rows` says which rows of the input count, so that padding does not: masks with the weight's
    leading axes in front, of which the one whose shape is that of the rows applies, as do masks of
    the first axis alone. None if all count.

    `cap` bounds how much one row counts in `square` and `gram`: a row that is longer than `cap`
    times the median of the rows of a call is shortened to that.
    """

    weight: Any
    zeros: Any
    rows: Any = None
    cap: float | None = static(default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        return self.weight.shape

    @property
    def dtype(self) -> jnp.dtype:
        """The weight's dtype."""
        return self.weight.dtype


def zeros_for(shape: tuple[int, ...], statistics: Iterable[str]) -> dict[str, Array]:
    """Return the zeros of a probe on a weight.

    Args:
      shape: `[..., out, in]`. The leading axes are layers, which `scan` slices off, and experts,
        which are batch letters of the equation; each of their matrices has its own statistics.
      statistics: names from `STATISTICS`; `count` and `taken` are always there.

    Returns:
      Statistic -> float32 zeros, with the leading axes in front.

    Raises:
      InputError: a statistic is unknown, or the shape is that of a vector.
    """
    if len(shape) < 2:
        raise InputError(f"shape: {shape} is not that of a matrix; allowed: [..., out, in]")
    *lead, out, width = shape
    shapes = {
        "count": (),
        "taken": (),
        "square": (width,),
        "gram": (width, width),
        "histogram": (HISTOGRAM_BINS,),
        "norms": (2, HISTOGRAM_BINS),
        "tokens": (out,),
    }
    wanted = dict.fromkeys(("count", "taken", *statistics))
    for name in wanted:
        if name not in shapes:
            raise unknown("statistics", name, STATISTICS)
    return {name: jnp.zeros((*lead, *shapes[name]), jnp.float32) for name in wanted}


def tap(
    y: Array,
    x: Array,
    zeros: dict[str, Array],
    cap: float | None = None,
    rows: tuple[Array, ...] | None = None,
) -> Array:
    """Return `y`, whose gradient carries the statistics of `x` to `zeros`.

    Args:
      y: the output.
      x: the input `[..., in]`, or ids.
      zeros: see `Probe`, as for `cap`.
      cap: how long a row may be.
      rows: the masks that say which rows of x count.
    """
    ids = jnp.issubdtype(x.dtype, jnp.integer)
    return _tap(
        y, jax.lax.stop_gradient(x), zeros, _real(x.shape if ids else x.shape[:-1], rows), cap
    )


def _real(shape: tuple[int, ...], masks: tuple[Array, ...] | None) -> Array | None:
    """Return which rows count, in the shape of the rows; None if no mask applies."""
    found = None
    for mask in masks or ():
        if mask.shape == shape or mask.shape == shape[:1]:
            mask = jnp.broadcast_to(
                mask.reshape(*mask.shape, *[1] * (len(shape) - mask.ndim)), shape
            )
            found = mask if found is None else found & mask
    return found


def every_row(params: Any) -> Any:
    """Return a tree whose probes count all rows: those of a part that reads another input."""
    return jax.tree.map(
        lambda leaf: dataclasses.replace(leaf, rows=None) if isinstance(leaf, Probe) else leaf,
        params,
        is_leaf=lambda leaf: isinstance(leaf, Probe),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _tap(
    y: Array, x: Array, zeros: dict[str, Array], real: Array | None, cap: float | None
) -> Array:
    return y


def _forward(
    y: Array, x: Array, zeros: dict[str, Array], real: Array | None, cap: float | None
) -> tuple[Array, tuple[Array, dict[str, Array], Array | None]]:
    return y, (x, zeros, real)


def _backward(
    cap: float | None, saved: tuple[Array, dict[str, Array], Array | None], g: Array
) -> tuple[Array, Any, dict[str, Array], Any]:
    x, zeros, real = saved
    sums = {
        name: _gradient(x, g, zero)
        if name == GRADIENT
        else _statistic(name, x, zero, real, cap).reshape(zero.shape)
        for name, zero in zeros.items()
    }
    return g, None, {name: _gather(total, x, zeros[name]) for name, total in sums.items()}, None


_tap.defvjp(_forward, _backward)


def _gradient(x: Array, g: Array, zero: Array) -> Float[Array, "out in"]:
    """Return the gradient of a weight `[out, in]`.

    Either `y = x w^T`, or y are the weight's rows at the ids x.
    """
    if jnp.issubdtype(x.dtype, jnp.integer):
        # ids outside of the table are dropped
        place = jnp.where((x >= 0) & (x < zero.shape[0]), x, zero.shape[0])
        return (
            jnp.zeros(zero.shape, jnp.float32)
            .at[place]
            .add(g.astype(jnp.float32), mode="drop")
            .astype(zero.dtype)
        )
    rows = tuple(range(x.ndim - 1))
    product = jax.lax.dot_general(
        g.astype(zero.dtype),
        x.astype(zero.dtype),
        ((rows, rows), ((), ())),
        precision=precision(zero.dtype),
        preferred_element_type=jnp.float32,
    )
    return product.astype(zero.dtype)


def _statistic(
    name: str, x: Array, zero: Array, real: Array | None, cap: float | None
) -> Float[Array, "..."]:
    if name in OF_TAKE:
        counts = _counts(x, real)
        if name == "taken":
            return jnp.sum(counts)
        place = jnp.clip(x.reshape(-1), 0, zero.shape[0] - 1)
        return jnp.zeros(zero.shape, jnp.float32).at[place].add(counts.reshape(-1))
    if name == "count":
        return jnp.sum(_counts(x[..., 0], real))
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    counts = _counts(x[..., 0], real).reshape(-1, 1)
    if name == "histogram":
        return histogram(rows, counts)
    if name == "norms":
        return jnp.sum(norms(rows) * counts[..., None], axis=0)
    rows = rows if real is None else jnp.where(counts > 0, rows, 0.0)
    rows = capped(rows, cap)
    if name == "square":
        return jnp.sum(rows * rows, axis=0)
    return jnp.einsum("ni,nj->ij", rows, rows, precision="highest")


def _counts(x: Array, real: Array | None) -> Float[Array, "..."]:
    """Return 1 for each element of x, and 0 where it is not real.

    They depend on x because `vmap` adds up what depends on a mapped x, and would count a constant
    once.
    """
    ones = jnp.where(x == x, 1.0, 1.0).astype(jnp.float32)
    return ones if real is None else jnp.where(real, ones, 0.0)


def histogram(
    x: Float[Array, "..."], counts: Float[Array, "..."] | float = 1.0
) -> Float[Array, " bins"]:
    """Count |x| on the fixed logarithmic grid.

    Values outside of it fall into the first or last bin.

    Args:
      x: the values.
      counts: how often each counts.
    """
    each = jnp.broadcast_to(jnp.asarray(counts, jnp.float32), x.shape).reshape(-1)
    return jnp.zeros(HISTOGRAM_BINS, jnp.float32).at[_bin(x.reshape(-1))].add(each)


def _bin(x: Float[Array, "..."]) -> Array:
    """Return the bin of each element."""
    octave = jnp.log2(jnp.maximum(jnp.abs(x.astype(jnp.float32)), 1e-30))
    place = (octave - HISTOGRAM_LOW) / HISTOGRAM_STEP
    return jnp.clip(place, 0, HISTOGRAM_BINS - 1).astype(jnp.int32)


def norms(rows: Float[Array, "n in"]) -> Float[Array, "n 2 bins"]:
    """Return what each row contributes to the statistic `norms`."""
    squares = jnp.sum(rows * rows, axis=-1)
    place = jax.nn.one_hot(_bin(jnp.sqrt(squares / rows.shape[-1])), HISTOGRAM_BINS)
    return jnp.stack([place, place * squares[:, None]], axis=1)


def capped(rows: Float[Array, "n in"], cap: float | None) -> Float[Array, "n in"]:
    """Shorten rows that are longer than `cap` times the median of those that are not zero."""
    if cap is None:
        return rows
    sizes = jnp.sqrt(jnp.sum(rows * rows, axis=-1, keepdims=True))
    middle = jnp.nanmedian(jnp.where(sizes > 0, sizes, jnp.nan))
    # a size of zero, and rows that are all zero, give no factor
    return rows * jnp.nan_to_num(jnp.minimum(cap * middle / jnp.maximum(sizes, 1e-30), 1.0))


def top_share(norms: Float[np.ndarray, "*lead 2 bins"], part: float) -> float:
    """Return the share of the sum of squares that the largest rows have.

    Args:
      norms: the statistic; leading axes (layers, experts) are summed.
      part: the part of the rows, at least one of them; rows of one bin count as equally large.

    >>> rows = jnp.ones((100, 4)).at[7].set(30.0)  # one of a hundred has 900 of 999 parts
    >>> round(top_share(np.asarray(jnp.sum(norms(rows), axis=0)), 0.01), 3)
    0.901
    """
    counts, squares = np.asarray(norms, np.float64).reshape(-1, 2, HISTOGRAM_BINS).sum(axis=0)
    above = np.cumsum(counts[::-1])
    share = np.cumsum(squares[::-1])
    wanted = max(1.0, part * above[-1])
    return float(np.interp(wanted, [0.0, *above], [0.0, *share]) / max(share[-1], 1e-300))


def histogram_quantile(counts: Float[Array, " bins"], share: float) -> Float[Array, ""]:
    """Return the size below which a share of the elements lies, from their histogram.

    Within a bin, which is half an octave wide, it is interpolated on the logarithmic scale.
    """
    wanted = share * jnp.sum(counts)
    upto = jnp.cumsum(counts)
    i = jnp.argmax(upto >= wanted * (1 - 1e-6))
    inside = (wanted - (upto[i] - counts[i])) / jnp.maximum(counts[i], 1e-30)
    octave = (i.astype(jnp.float32) + jnp.clip(inside, 0, 1)) * HISTOGRAM_STEP + HISTOGRAM_LOW
    return 2.0**octave


def _gather(total: Array, x: Array, zero: Array) -> Array:
    """Sum over the mesh axes that the data varies over but the zeros do not (in `shard_map`)."""
    axes = _varying(x) - _varying(zero)
    return jax.lax.psum(total, tuple(axes)) if axes else total


def _varying(x: Array) -> frozenset[str]:
    kind = jax.typeof(x)
    # `vma` is the name before JAX 0.12
    return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma
