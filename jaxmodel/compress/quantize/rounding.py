"""Other ways to round than to the nearest: `Truncate`, `Stochastic`."""

from __future__ import annotations

import abc
import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodel.compress.draft import Draft, LeafStats
from jaxmodel.compress.quantize.rtn import Rtn
from jaxmodel.schema import Range


@dataclasses.dataclass(frozen=True)
class _Otherwise(Rtn, abc.ABC):
    bits: Annotated[int, Range(2, 8)] = 8

    @abc.abstractmethod
    def further(
        self,
        weight: Float[Array, "out in"],
        off: Float[Array, "out in"],
        key: jax.Array,
    ) -> Array:
        """Tell which weights take the value on their other side, not the nearest.

        Args:
          weight: the weights.
          off: the weights less the nearest values of the grid, in steps of it.
          key: for what is drawn.
        """

    def step(self, draft: Draft, stats: LeafStats, key: jax.Array) -> Draft:
        """Quantise a matrix; see `Method`."""
        weight = draft.weight
        draft = super().step(draft, stats, key)
        value = lambda code: draft.grid.values(jnp.full(draft.shape, code, jnp.int32))
        step = value(1) - value(0)
        nearest = draft.grid.round(weight)
        off = (weight - nearest) / step
        other = self.further(weight, off, key)
        return draft.to(jnp.where(other, nearest + jnp.sign(off) * step, nearest))


@dataclasses.dataclass(frozen=True)
class Truncate(_Otherwise):
    """Bit truncation: the bits of a code behind the first ones are cut off, toward zero.

    Toward the smallest value, where the grid is not symmetric. The settings are those of `Rtn`, at
    2 bits or more.
    """

    def further(
        self,
        weight: Float[Array, "out in"],
        off: Float[Array, "out in"],
        key: jax.Array,
    ) -> Array:
        """Return where the nearest value is further from zero than the weight."""
        outward = off * jnp.sign(weight) if self.symmetric else off
        return outward < -1e-5


@dataclasses.dataclass(frozen=True)
class Stochastic(_Otherwise):
    """Stochastic rounding: up or down at random, so that the mean is the weight.

    Weights outside of the range are clipped. The settings are those of `Rtn`, at 2 bits or more.
    """

    def further(
        self,
        weight: Float[Array, "out in"],
        off: Float[Array, "out in"],
        key: jax.Array,
    ) -> Array:
        """Return a draw with the probability of the distance in steps."""
        return jax.random.uniform(key, weight.shape) < jnp.abs(off)
