"""Grids whose values stand in a table: NF4, a normal's quantiles, equalised codebooks.

The table is one of the whole matrix, and each row or group has its scale.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri
from jaxtyping import Array, Float

from jaxmodel.compress.draft import Draft, Grid, LeafStats
from jaxmodel.compress.method import Method
from jaxmodel.compress.quantize.ranges import Groups, cut
from jaxmodel.compress.quantize.rtn import check_group, check_unrounded
from jaxmodel.schema import Count, Range

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The 16 values of a 4-bit NormalFloat, as published."""


@dataclasses.dataclass(frozen=True)
class Table(Method, abc.ABC):
    """Base of the methods that round to the values of a table; stored as a `Codebook`.

    Attributes:
      group: number of neighbouring weights of a row that share a scale, whole bytes of codes; None
        for one scale per row.
      scale_dtype: None for float32 with one scale per row and float16 with groups.
    """

    group: Count | None = dataclasses.field(default=None, kw_only=True)
    scale_dtype: Literal["float32", "float16", "bfloat16"] | None = dataclasses.field(
        default=None, kw_only=True
    )
    bits: ClassVar[int] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_group(self, self.group, self.bits)

    @abc.abstractmethod
    def fit(
        self, groups: Groups, key: jax.Array
    ) -> tuple[Float[Array, " levels"], Float[Array, "out groups"]]:
        """Return the values of the table, sorted, and the scale of each group."""

    def step(self, draft: Draft, stats: LeafStats, key: jax.Array) -> Draft:
        """Quantise a matrix; see `Method`."""
        check_unrounded(self, draft)
        groups = cut(draft.weight, self.group, keep=draft.keep)
        table, scale = self.fit(groups, key)
        dtype = jnp.dtype(self.scale_dtype or ("float16" if self.group else "float32"))
        scale = jnp.maximum(scale, float(jnp.finfo(dtype).tiny)).astype(dtype)
        group = self.group if scale.shape[-1] > 1 else None
        table = table.astype(jnp.float32)[None]
        return draft.to(draft.weight, grid=Grid(scale, None, table, bits=self.bits, group=group))


@dataclasses.dataclass(frozen=True)
class Nf4(Table):
    """The 4-bit NormalFloat (Dettmers et al., 2023): quantiles of a normal, and zero.

    The largest weight of a group is an end of the table.
    """

    def fit(
        self, groups: Groups, key: jax.Array
    ) -> tuple[Float[Array, " levels"], Float[Array, "out groups"]]:
        """Return the published values and the largest weights."""
        return jnp.asarray(NF4, jnp.float32), groups.widest()[1]


@dataclasses.dataclass(frozen=True)
class InverseTransform(Table):
    """Quantiles of the normal distribution that is fitted to each row or group.

    A Monte Carlo sample of the weights is drawn by the inverse of their cumulative distribution.
    What the inverse of a normal's gives for the same random numbers is fitted to it by robust least
    squares (Huber's weights), so that outliers do not widen the levels. These are the quantiles
    `(k + 1/2) / 2^bits`, all equally probable.

    Attributes:
      bits: 2 to 8.
      samples: how many weights are drawn for each group.
    """

    bits: Annotated[int, Range(2, 8)] = 4  # pyright: ignore[reportIncompatibleVariableOverride]
    samples: Count = 256

    def fit(
        self, groups: Groups, key: jax.Array
    ) -> tuple[Float[Array, " levels"], Float[Array, "out groups"]]:
        """Return the quantiles of the standard normal, and the fitted standard deviations."""
        levels = ndtri((jnp.arange(2**self.bits, dtype=jnp.float32) + 0.5) / 2**self.bits)
        chance = jax.random.uniform(key, (self.samples,), minval=1e-4, maxval=1 - 1e-4)
        order = jnp.argsort(groups.values, axis=-1)
        values = jnp.take_along_axis(groups.values, order, axis=-1)
        counts = jnp.take_along_axis(groups.counts, order, axis=-1)
        upto = jnp.cumsum(counts, axis=-1)
        middle = (upto - counts / 2) / jnp.maximum(upto[..., -1:], 1e-30)
        draw = jax.vmap(jax.vmap(lambda places, of: jnp.interp(chance, places, of)))
        return levels, robust_slope(ndtri(chance)[None, None], draw(middle, values))


def robust_slope(
    x: Float[Array, "#out #groups n"], y: Float[Array, "out groups n"]
) -> Float[Array, "out groups"]:
    """Return the slopes b of `y ~ b x` by least squares with Huber's weights, in 10 rounds."""
    tuning = 1.345 * 1.4826  # of Huber; of the median of sizes to the deviation of a normal
    x = jnp.broadcast_to(x, y.shape)

    def again(slope: Array, _: None) -> tuple[Array, None]:
        off = jnp.abs(y - slope[..., None] * x)
        limit = tuning * jnp.median(off, axis=-1, keepdims=True)
        weight = jnp.minimum(1.0, limit / jnp.maximum(off, 1e-30)) + 1e-6
        return jnp.sum(weight * x * y, axis=-1) / jnp.sum(weight * x * x, axis=-1), None

    start = jnp.median(jnp.abs(y), axis=-1) / jnp.median(jnp.abs(x), axis=-1)
    slope, _ = jax.lax.scan(again, start, None, length=10)
    return jnp.maximum(slope, 0.0)


@dataclasses.dataclass(frozen=True)
class Equalised(Table):
    """A codebook whose values stand for equally many weights each, by a histogram of the matrix.

    Each value is the mean of its share of the weights, divided by the root mean square of their row
    or group.

    Attributes:
      bits: 2 to 8.
      bins: of the histogram.
    """

    bits: Annotated[int, Range(2, 8)] = 4  # pyright: ignore[reportIncompatibleVariableOverride]
    bins: Count = 2048

    def fit(
        self, groups: Groups, key: jax.Array
    ) -> tuple[Float[Array, " levels"], Float[Array, "out groups"]]:
        """Return the means of equal shares, and the root mean squares."""
        size = jnp.sqrt(groups.mean(groups.values**2))
        values = groups.values / jnp.maximum(size, 1e-30)[..., None]
        end = jnp.maximum(jnp.max(jnp.abs(values) * groups.counts), 1e-30)
        place = jnp.floor((values / end + 1) / 2 * self.bins).astype(jnp.int32)
        place = jnp.clip(place, 0, self.bins - 1).reshape(-1)
        zeros = jnp.zeros(self.bins, jnp.float32)
        counts = zeros.at[place].add(groups.counts.reshape(-1))
        sums = zeros.at[place].add((groups.counts * values).reshape(-1))
        # the sum of the weights up to a share of all, linear within a bin
        upto = lambda array: jnp.concatenate([jnp.zeros(1), jnp.cumsum(array)])
        total = jnp.maximum(jnp.sum(counts), 1e-30)
        shares = jnp.arange(2**self.bits + 1, dtype=jnp.float32) / 2**self.bits
        below = jnp.interp(shares, upto(counts) / total, upto(sums))
        return jnp.sort(jnp.diff(below) * (2**self.bits / total)), size
