"""SparseGPT: prune, and let the weights that stay make up for those that go."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxmodel.compress.draft import Draft, LeafStats
from jaxmodel.compress.prune.masks import Pruning
from jaxmodel.compress.solve import BLOCK, compensate, hessian, refine
from jaxmodel.leaves.largest import largest
from jaxmodel.schema import Index, Positive


@dataclasses.dataclass(frozen=True)
class Sparsegpt(Pruning):
    """Pruning with compensation, column by column (Frantar and Alistarh, 2023).

    Which weights go is decided for a block of columns at a time, when those in front of it are
    done. A mask of an earlier method is kept, and what it leaves out is made up for. On a matrix
    with a grid the values stay on it.

    Attributes:
      scope: "row": each row loses equally many of each block; "leaf": the rows share each block's.
      damping: of the Hessian, as a fraction of its mean diagonal.
      sweeps: how often the columns that stay are improved afterwards (see `solve.refine`).
    """

    needs: ClassVar = ("gram",)

    damping: Positive = 0.01
    sweeps: Index = 0

    def step(self, draft: Draft, stats: LeafStats, key: jax.Array) -> Draft:
        """Prune a matrix; see `Method`."""
        if self.idle:
            return draft
        self.check_pattern(draft)
        found = hessian(stats["gram"], stats["count"], self.damping)
        out = draft.shape[0]
        pattern = self.pattern
        every = pattern[1] if pattern else BLOCK
        left = lambda total: jnp.round(jnp.float32(total) * (1 - self.fraction)).astype(jnp.int32)

        def choose(cost: Float[Array, "columns out"], columns: Array) -> Bool[Array, "columns out"]:
            if pattern:
                return largest(cost.T, pattern[0]).T
            if self.scope == "row":
                return largest(cost.T, left(columns)).T
            return largest(cost, left(columns * out), axes=2)

        weight, keep = compensate(draft.target, found.factor, draft.grid, draft.keep, choose, every)
        if self.sweeps:
            weight = refine(draft.target, weight, found.matrix, draft.grid, keep, self.sweeps)
        return draft.note(damping=found.damping).to(
            weight, keep=keep, kept=None, pattern=pattern if draft.keep is None else None
        )
