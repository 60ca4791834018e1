"""GPTQ: round column by column, and let the columns behind make up for the error."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp

from jaxmodel.compress.draft import Draft, Grid, LeafStats
from jaxmodel.compress.rtn import Rtn
from jaxmodel.compress.solve import compensate, hessian, refine
from jaxmodel.schema import Index, Positive, Range


@dataclasses.dataclass(frozen=True)
class Gptq(Rtn):
    """Rounding with compensation (Frantar et al., 2023); the settings of `Rtn`, and these.

    Attributes:
      search: as for `Rtn`; errors count by the size of the input that they meet.
      act_order: round the columns of the largest inputs first. The groups stay where they are.
      damping: of the Hessian, as a fraction of its mean diagonal.
      sweeps: how often the columns are improved afterwards (see `solve.refine`).
    """

    needs: ClassVar = ("gram",)

    bits: Annotated[int, Range(1, 8)] = 4
    search: Positive | None = 2.0
    act_order: bool = True
    damping: Positive = 0.01
    sweeps: Index = 0

    def __call__(self, draft: Draft, stats: LeafStats, key: jax.Array) -> Draft:
        """Quantise a matrix; see `Method`."""
        gram = stats["gram"]
        found = hessian(gram, stats["count"], self.damping)
        grid = self.grid(draft, jnp.diagonal(found.matrix))
        n = draft.shape[-1]
        if self.act_order:
            order = jnp.argsort(-jnp.diagonal(found.matrix))
            back = jnp.argsort(order)
            upper = hessian(gram[order][:, order], stats["count"], self.damping).factor
            keep = None if draft.keep is None else draft.keep[:, order]
            per = _reordered(grid, order, n)
            weight, _ = compensate(draft.target[:, order], upper, per, keep)
            weight = weight[:, back]
        else:
            weight, _ = compensate(draft.target, found.factor, grid, draft.keep)
        if self.sweeps:
            weight = refine(draft.target, weight, found.matrix, grid, draft.keep, self.sweeps)
        changes = {"grid": grid, "activations": self.activations}
        return draft.note(damping=found.damping).to(weight, **changes)


def _reordered(grid: Grid, order: jax.Array, n: int) -> Grid:
    """Return the grid with a scale for each column, in the order given."""
    if grid.group is None:
        return grid
    wide = lambda small: jnp.repeat(small, grid.group or n, axis=-1)[..., :n][:, order]
    minimum = None if grid.minimum is None else wide(grid.minimum)
    return dataclasses.replace(grid, scale=wide(grid.scale), minimum=minimum, group=1)
