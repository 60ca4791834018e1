"""GPTQ: round column by column, and let the columns behind make up for the error."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp

from jaxmodel.compress.draft import Draft, Grid, LeafStats
from jaxmodel.compress.method import Method
from jaxmodel.compress.quantize.rtn import Rtn, check_unrounded
from jaxmodel.compress.solve import Hessian, compensate, hessian, refine
from jaxmodel.schema import Index, Positive, Range


@dataclasses.dataclass(frozen=True)
class Gptq(Rtn):
    """Rounding with compensation (Frantar et al., 2023); the settings of `Rtn`, and these.

    Attributes:
      range: as for `Rtn`; errors count by the mean square of the input that they meet.
      act_order: round the columns of the largest inputs first. The groups stay where they are.
      damping: of the Hessian, as a fraction of its mean diagonal. With 0.1 the result fits other
        texts than the one that was measured better; `int4` has that.
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
        found, order = _ordered_hessian(stats, self.damping, self.act_order)
        diagonal = jnp.diagonal(found.matrix)
        grid = self.grid(draft, diagonal if order is None else diagonal[jnp.argsort(order)])
        draft = dataclasses.replace(draft, grid=grid, activations=self.activations)
        return _compensated(draft, found, order, self.sweeps)


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
        found, order = _ordered_hessian(stats, self.damping, self.act_order)
        return _compensated(draft, found, order, self.sweeps)


def _ordered_hessian(
    stats: LeafStats, damping: float, act_order: bool
) -> tuple[Hessian, jax.Array | None]:
    """Return the Hessian with the largest inputs first, and their order; None for the given one."""
    gram = stats["gram"]
    order = jnp.argsort(-jnp.diagonal(gram)) if act_order else None
    gram = gram if order is None else gram[order][:, order]
    return hessian(gram, stats["count"], damping), order


def _compensated(draft: Draft, found: Hessian, order: jax.Array | None, sweeps: int) -> Draft:
    """Return the draft with weights near `target` for the inputs of `found`."""
    grid = draft.grid
    keep = draft.keep
    target = draft.target
    if order is not None:
        target = target[:, order]
        keep = None if keep is None else keep[:, order]
        grid = None if grid is None else _reordered(grid, order, target.shape[-1])
    weight, _ = compensate(target, found.factor, grid, keep)
    if sweeps:
        weight = refine(target, weight, found.matrix, grid, keep, sweeps)
    weight = weight if order is None else weight[:, jnp.argsort(order)]
    return draft.note(damping=found.damping).to(weight)


def _reordered(grid: Grid, order: jax.Array, n: int) -> Grid:
    """Return the grid with a scale for each column, in the order given."""
    if grid.group is None or grid.scale is None:
        return grid
    wide = lambda small: jnp.repeat(small, grid.group or n, axis=-1)[..., :n][:, order]
    minimum = None if grid.minimum is None else wide(grid.minimum)
    return dataclasses.replace(grid, scale=wide(grid.scale), minimum=minimum, group=1)
