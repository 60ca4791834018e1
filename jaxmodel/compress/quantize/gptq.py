"""GPTQ: round column by column, and let the columns behind make up for the error."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp

from jaxmodel.compress.draft import Draft, Grid, LeafStats
from jaxmodel.compress.method import Method
from jaxmodel.compress.quantize.rtn import Rtn, check_unrounded
from jaxmodel.compress.solve import Hessian, compensate, hessian, inverse_factor, refine
from jaxmodel.schema import Index, Positive, Range


@dataclasses.dataclass(frozen=True)
class Gptq(Rtn):
    """Rounding with compensation (Frantar et al., 2023); the settings of `Rtn`, and these.

    Attributes:
      range: as for `Rtn`; errors count by the mean square of the input that they meet.
      act_order: round the columns of the largest inputs first. The groups stay where they are.
      damping: of the Hessian, as a fraction of its mean diagonal.
      sweeps: how often the columns are improved afterwards (see `solve.refine`).
    """

    needs: ClassVar = ("gram",)

    bits: Annotated[int, Range(1, 8)] = 4
    range: str = "mse"
    act_order: bool = True
    damping: Positive = 0.01
    sweeps: Index = 0

    def step(self, draft: Draft, stats: LeafStats, key: jax.Array) -> Draft:
        """Quantise a matrix; see `Method`."""
        check_unrounded(self, draft)
        found = hessian(stats["gram"], stats["count"], self.damping)
        grid = self.grid(draft, jnp.diagonal(found.matrix))
        draft = dataclasses.replace(draft, grid=grid, activations=self.activations)
        return _compensated(draft, found, self.act_order, self.sweeps)


@dataclasses.dataclass(frozen=True)
class Compensate(Method):
    """The compensation of `Gptq` for what earlier methods of the chain decided.

    The mask and the grid stay as they are; the weights that are kept move so that the error of the
    output is small, and are rounded to the grid.

    Attributes:
      act_order: begin with the columns of the largest inputs.
      damping: of the Hessian, as a fraction of its mean diagonal.
      sweeps: how often the columns are improved afterwards (see `solve.refine`).
    """

    needs: ClassVar = ("gram",)

    act_order: bool = True
    damping: Positive = 0.01
    sweeps: Index = 0

    def step(self, draft: Draft, stats: LeafStats, key: jax.Array) -> Draft:
        """Improve a matrix; see `Method`."""
        if draft.grid is None and draft.keep is None:
            return draft
        found = hessian(stats["gram"], stats["count"], self.damping)
        return _compensated(draft, found, self.act_order, self.sweeps)


def _compensated(draft: Draft, found: Hessian, act_order: bool, sweeps: int) -> Draft:
    """Return the draft with weights near `target` for the inputs of `found`."""
    grid = draft.grid
    keep = draft.keep
    if act_order:
        order = jnp.argsort(-jnp.diagonal(found.matrix))
        back = jnp.argsort(order)
        upper = inverse_factor(found.matrix[order][:, order])
        chosen = None if keep is None else keep[:, order]
        per = None if grid is None else _reordered(grid, order, draft.shape[-1])
        weight, _ = compensate(draft.target[:, order], upper, per, chosen)
        weight = weight[:, back]
    else:
        weight, _ = compensate(draft.target, found.factor, grid, keep)
    if sweeps:
        weight = refine(draft.target, weight, found.matrix, grid, keep, sweeps)
    return draft.note(damping=found.damping).to(weight)


def _reordered(grid: Grid, order: jax.Array, n: int) -> Grid:
    """Return the grid with a scale for each column, in the order given."""
    if grid.group is None or grid.scale is None:
        return grid
    wide = lambda small: jnp.repeat(small, grid.group or n, axis=-1)[..., :n][:, order]
    minimum = None if grid.minimum is None else wide(grid.minimum)
    return dataclasses.replace(grid, scale=wide(grid.scale), minimum=minimum, group=1)
