"""The range of an even grid: which scale, and which minimum, a row or a group of weights gets.

How it is chosen is a rule with a text form, the setting `range` of the methods that round:
`rtn(4, range="percentile(99.9)")`.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmodel import text_form
from jaxmodel.compress.draft import Grid
from jaxmodel.schema import Count, Positive, Range

SHRINKS = 40
"""How many narrower ranges a search tries for each sign of the scale."""
NARROWEST = 0.4
"""The narrowest of them, as a fraction of the range that holds all weights."""


@dataclasses.dataclass(frozen=True)
class Groups:
    """The weights of a matrix, cut into the groups that share a scale.

    Attributes:
      values: `[out, groups, size]`. The padding of the last group repeats the last weight, so that
        it widens no range.
      counts: `[out, groups, size]`: what the error of each weight counts; 0 for the padding and for
        what is pruned.
      bits: of a code.
      size: of a group in the grid; None for whole rows.
      symmetric: steps on both sides of zero, or from the smallest weight to the largest.
      dtype: of the stored scale.
    """

    values: Float[Array, "out groups size"]
    counts: Float[Array, "out groups size"]
    bits: int
    size: int | None
    symmetric: bool
    dtype: jnp.dtype

    def widest(self) -> tuple[Float[Array, "out groups"], Float[Array, "out groups"]]:
        """Return the lower and the upper end of the range that holds all weights."""
        if not self.symmetric:
            return jnp.min(self.values, axis=-1), jnp.max(self.values, axis=-1)
        high = jnp.max(jnp.abs(self.values), axis=-1)
        return -high, high

    def mean(self, of: Float[Array, "out groups size"]) -> Float[Array, "out groups"]:
        """Return the mean over each group, of what counts."""
        total = jnp.maximum(jnp.sum(self.counts, axis=-1), 1e-30)
        return jnp.sum(self.counts * of, axis=-1) / total

    def grid(self, low: Array, high: Array) -> Grid:
        """Return the grid from the lowest to the highest value; a symmetric one has no `low`."""
        if self.symmetric:
            return self.steps(high / (2 ** (self.bits - 1) - 1), None)
        low = low.astype(self.dtype).astype(jnp.float32)  # what is stored
        return self.steps((high - low) / (2**self.bits - 1), low)

    def steps(self, scale: Array, minimum: Array | None) -> Grid:
        """Return the grid with these steps, in the dtype that is stored."""
        size = jnp.maximum(jnp.abs(scale), float(jnp.finfo(self.dtype).tiny))
        scale = jnp.where(scale < 0, -size, size).astype(self.dtype)
        minimum = None if minimum is None else minimum.astype(self.dtype)
        return Grid(scale, minimum, bits=self.bits, group=self.size)

    def rounded(self, grid: Grid) -> Float[Array, "out groups size"]:
        """Return the values rounded to the grid."""
        values = (
            codes_of(grid, self.values).astype(jnp.float32)
            * grid.scale.astype(jnp.float32)[..., None]
        )
        if grid.minimum is not None:
            values = values + grid.minimum.astype(jnp.float32)[..., None]
        return values


@dataclasses.dataclass(frozen=True)
class RangeRule(text_form.Member, abc.ABC, kind="range", example="percentile(99.9)"):
    """Base of the rules that choose the range of an even grid.

    Attributes:
      weighted: whether an error counts by the mean square of the input that the weight meets, which
        takes statistics. `gptq`, which has them, always does so.
    """

    weighted: bool = dataclasses.field(default=False, kw_only=True)

    @abc.abstractmethod
    def choose(self, groups: Groups) -> Grid:
        """Return the grid of each group."""


@dataclasses.dataclass(frozen=True)
class Absmax(RangeRule):
    """The range that holds all weights."""

    def choose(self, groups: Groups) -> Grid:
        """Return the grid of each group."""
        return groups.grid(*groups.widest())


@dataclasses.dataclass(frozen=True)
class Percentile(RangeRule):
    """The range that holds most of the weights; those outside are clipped.

    Attributes:
      at: the percentage of the weights that it holds, half of the others on each side.
    """

    at: Annotated[float, Range(50, 100)] = 99.9

    def choose(self, groups: Groups) -> Grid:
        """Return the grid of each group."""
        share = self.at / 100
        if groups.symmetric:
            high = quantile(jnp.abs(groups.values), groups.counts, share)
            return groups.grid(-high, high)
        low, high = (
            quantile(groups.values, groups.counts, (1 + sign * share) / 2) for sign in (-1, 1)
        )
        return groups.grid(low, high)


@dataclasses.dataclass(frozen=True)
class Search(RangeRule, abc.ABC):
    """Base of the rules that try `SHRINKS` narrower ranges and take that of the least cost.

    A symmetric code has one value more below zero than above. With a negative scale that one serves
    the largest weights, so both signs are tried.
    """

    @abc.abstractmethod
    def cost(self, groups: Groups, grid: Grid) -> Float[Array, "out groups"]:
        """Return what a grid costs."""

    def choose(self, groups: Groups) -> Grid:
        """Return the grid of each group."""
        low, high = groups.widest()

        def better(best: tuple[Array, Array], factor: Array) -> tuple[tuple[Array, Array], None]:
            found = self.cost(groups, groups.grid(low * factor, high * factor))
            least, at = best
            worse = found < least
            return (jnp.where(worse, found, least), jnp.where(worse, factor, at)), None

        start = (jnp.full(low.shape, jnp.inf), jnp.ones(low.shape))
        factors = jnp.linspace(1.0, NARROWEST, SHRINKS)
        if groups.symmetric and groups.bits > 1:
            factors = jnp.concatenate([factors, -factors])
        (_, factor), _ = jax.lax.scan(better, start, factors)
        return groups.grid(low * factor, high * factor)


@dataclasses.dataclass(frozen=True)
class Power(Search):
    """The range with the least mean of `|error|^p`.

    Attributes:
      p: the power.
    """

    p: Positive = 2.4

    def cost(self, groups: Groups, grid: Grid) -> Float[Array, "out groups"]:
        """Return what a grid costs."""
        return groups.mean(_power(groups.rounded(grid) - groups.values, self.p))


@dataclasses.dataclass(frozen=True)
class Mse(Search):
    """The range with the least mean square error."""

    def cost(self, groups: Groups, grid: Grid) -> Float[Array, "out groups"]:
        """Return what a grid costs."""
        return groups.mean((groups.rounded(grid) - groups.values) ** 2)


@dataclasses.dataclass(frozen=True)
class Huber(Search):
    """The range with the least Huber loss: large errors, of clipped weights, count linearly.

    Attributes:
      delta: where "large" begins, as a fraction of the root mean square of the group.
    """

    delta: Positive = 1.0

    def cost(self, groups: Groups, grid: Grid) -> Float[Array, "out groups"]:
        """Return what a grid costs."""
        size = jnp.sqrt(groups.mean(groups.values**2))[..., None]
        off = jnp.abs(groups.rounded(grid) - groups.values) / jnp.maximum(size, 1e-30)
        small = jnp.minimum(off, self.delta)
        return groups.mean(small * (off - small / 2))


@dataclasses.dataclass(frozen=True)
class Gibbs(Search):
    """The range with the least expected error when weights are rounded at random.

    A weight takes each value of the grid with a probability proportional to
    `exp(-error^2 / T)`, as in Gibbs' distribution; at T = 0 it is the nearest, as for `mse`.

    Attributes:
      temperature: T, as a fraction of the mean square of the group.
    """

    temperature: Positive = 0.01

    def cost(self, groups: Groups, grid: Grid) -> Float[Array, "out groups"]:
        """Return what a grid costs."""
        heat = self.temperature * jnp.maximum(groups.mean(groups.values**2), 1e-30)[..., None]
        scale = grid.scale.astype(jnp.float32)[..., None]
        codes = codes_of(grid, groups.values)
        off = groups.rounded(grid) - groups.values
        top = 2 ** (groups.bits - 1) - 1
        least, most = (-top - 1, top) if groups.symmetric else (0, 2**groups.bits - 1)
        # of a weight inside the range, what is k steps off has at most exp(-k (k - 1) scale^2 / T),
        # and of one outside less; below exp(-20) it does not count
        needed = 1 + jnp.sqrt(20 * jnp.max(heat / scale**2))
        reach = jnp.minimum(jnp.ceil(needed), most - least).astype(jnp.int32)

        def one(step: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            error = (off + step.astype(jnp.float32) * scale) ** 2
            weight = jnp.exp((off**2 - error) / heat)
            weight = jnp.where((codes + step >= least) & (codes + step <= most), weight, 0.0)
            return sums[0] + weight, sums[1] + weight * error

        zeros = (jnp.zeros_like(off), jnp.zeros_like(off))
        total, expected = jax.lax.fori_loop(-reach, reach + 1, one, zeros)
        return groups.mean(expected / total)


@dataclasses.dataclass(frozen=True)
class Histogram(RangeRule):
    """The range that loses the least information: that of the least Kullback-Leibler divergence.

    Between the histogram of the matrix (of weights relative to the range of their group; of their
    sizes, if the grid is symmetric) and the one in which all bins that are rounded to the same
    value are level (after Migacz, 2017). All groups get the same share of their own range, since
    the weights of one are too few for a histogram.

    Attributes:
      bins: of the histogram.
    """

    bins: Count = 1024

    def choose(self, groups: Groups) -> Grid:
        """Return the grid of each group."""
        low, high = groups.widest()
        low = jnp.zeros_like(high) if groups.symmetric else low
        size = jnp.maximum(high - low, 1e-30)
        values = jnp.abs(groups.values) if groups.symmetric else groups.values
        place = jnp.floor((values - low[..., None]) / size[..., None] * self.bins)
        place = jnp.clip(place.astype(jnp.int32), 0, self.bins - 1).reshape(-1)
        counts = jnp.zeros(self.bins, jnp.float32).at[place].add(groups.counts.reshape(-1))
        used = (counts > 0).astype(jnp.float32)
        middle = (jnp.arange(self.bins, dtype=jnp.float32) + 0.5) / self.bins
        top = 2 ** (groups.bits - 1) - 1 if groups.symmetric else 2**groups.bits - 1

        def divergence(factor: Array) -> Array:
            start = 0.0 if groups.symmetric else (1 - factor) / 2
            levels = jnp.clip(jnp.round((middle - start) / factor * top), 0, top).astype(jnp.int32)
            mass, number = (
                jnp.zeros(top + 1, jnp.float32).at[levels].add(array) for array in (counts, used)
            )
            level = (mass / jnp.maximum(number, 1.0))[levels]
            return jnp.sum(counts * jnp.log(jnp.where(used > 0, counts / level, 1.0)))

        factors = jnp.linspace(1.0, NARROWEST, SHRINKS)
        factor = factors[jnp.argmin(jax.lax.map(divergence, factors))]
        if groups.symmetric:
            return groups.grid(-high * factor, high * factor)
        off = (1 - factor) / 2 * size
        return groups.grid(low + off, high - off)


@dataclasses.dataclass(frozen=True)
class Hqq(RangeRule):
    """Half-quadratic quantisation (Badri and Shaji, 2023): few large errors, many small ones.

    The error is split into an outlier part, which `|error|^p` leaves large, and a rest, of which a
    step in turn makes the squares least: by the scale of a symmetric grid, by the minimum of
    another. Of all steps the one with the least `|error|^p` counts.

    Attributes:
      p: the power, below 1.
      steps: how often both are done.
    """

    p: Annotated[float, Range(above=0, most=1)] = 0.7
    steps: Count = 20

    def choose(self, groups: Groups) -> Grid:
        """Return the grid of each group."""
        first = groups.grid(*groups.widest())
        wide = lambda a: None if a is None else a.astype(jnp.float32)
        start: Any = (wide(first.scale), wide(first.minimum))

        def cost(grid: Grid) -> Float[Array, "out groups"]:
            return groups.mean(_power(groups.rounded(grid) - groups.values, self.p))

        def step(state: Any, i: Array) -> tuple[Any, None]:
            (scale, minimum), best, least = state
            grid = groups.steps(scale, minimum)
            codes = codes_of(grid, groups.values).astype(jnp.float32)
            # in steps of the grid, so that the strength of the split does not depend on its size
            off = (groups.values - groups.rounded(grid)) / scale[..., None]
            size = jnp.maximum(jnp.abs(off), 1e-6)
            strength = 10.0 * 1.01 ** i.astype(jnp.float32)
            less = _power(size, self.p - 1) / strength
            outlier = jnp.sign(off) * jnp.maximum(size - less, 0.0)
            rest = groups.values - outlier * scale[..., None]
            if minimum is None:
                new = groups.mean(rest * codes) / jnp.maximum(groups.mean(codes**2), 1e-30)
                new = (jnp.where(new > 0, new, scale), None)
            else:
                new = (scale, groups.mean(rest - codes * scale[..., None]))
            found = cost(groups.steps(*new))
            better = found < least
            best = jax.tree.map(lambda a, b: jnp.where(better, a, b), new, best)
            return (new, best, jnp.minimum(found, least)), None

        begin = (start, start, cost(first))
        found, _ = jax.lax.scan(step, begin, jnp.arange(self.steps))
        scale, minimum = found[1]
        return groups.steps(scale, minimum)


def _power(values: Float[Array, "..."], p: float) -> Float[Array, "..."]:
    """Return `|values|^p`; on a CPU this is several times as fast as `**`."""
    return jnp.exp(p * jnp.log(jnp.maximum(jnp.abs(values), 1e-30)))


def codes_of(grid: Grid, values: Float[Array, "out groups n"]) -> Int[Array, "out groups n"]:
    """Return the codes of values, any number of which belong to each group of a grid."""
    inner = dataclasses.replace(grid, group=values.shape[-1])
    return inner.nearest(values.reshape(values.shape[0], -1)).reshape(values.shape)


def quantile(
    values: Float[Array, "... n"], counts: Float[Array, "... n"], share: float
) -> Float[Array, "..."]:
    """Return the least of the values such that those up to it have this share of all counts."""
    order = jnp.argsort(values, axis=-1)
    values, counts = (jnp.take_along_axis(a, order, axis=-1) for a in (values, counts))
    below = jnp.cumsum(counts, axis=-1)
    enough = below >= share * below[..., -1:] * (1 - 1e-6)
    return jnp.take_along_axis(values, jnp.argmax(enough, axis=-1)[..., None], axis=-1)[..., 0]


def even_grid(
    weight: Float[Array, "out in"],
    bits: int,
    group: int | None = None,
    *,
    symmetric: bool = True,
    rule: RangeRule | None = None,
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
      rule: chooses the range; None for one that holds all weights. A symmetric bit has none: its
        scale is the mean of the sizes, the choice of least squares.
      importance: of each input, what an error there counts; None for equal ones.
      keep: the weights that are not pruned; None for all.
      dtype: of the stored scale; None for float32 for whole rows, else float16.
    """
    groups = cut(weight, group, importance, keep)
    kind = jnp.dtype(dtype or ("float16" if group else "float32"))
    size = group if groups.values.shape[1] > 1 else None
    groups = dataclasses.replace(groups, bits=bits, size=size, symmetric=symmetric, dtype=kind)
    if symmetric and bits == 1:
        return groups.steps(groups.mean(jnp.abs(groups.values)), None)
    return (rule or Absmax()).choose(groups)


def cut(
    weight: Float[Array, "out in"],
    group: int | None,
    importance: Float[Array, " in"] | None = None,
    keep: Array | None = None,
) -> Groups:
    """Cut a matrix into groups along its rows; see `even_grid`."""
    out, n = weight.shape
    size = min(group or n, n)
    groups = -(-n // size)
    index = jnp.minimum(jnp.arange(groups * size), n - 1)

    def split(array: Array) -> Array:
        # looking all weights up takes longer than rounding them
        whole = array if groups * size == n else array[..., index]
        return whole.reshape(*array.shape[:-1], groups, size)

    inside = (jnp.arange(groups * size) < n).astype(jnp.float32).reshape(groups, size)
    counts = inside if importance is None else inside * split(importance)
    counts = jnp.broadcast_to(counts, (out, groups, size))
    if keep is not None:
        counts = jnp.where(split(keep), counts, 0.0)
    return Groups(split(weight), counts, 8, None, True, jnp.dtype("float32"))
