"""OBS: prune one weight after the other, and let all that stay make up for it."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmodel.compress.draft import Draft, LeafStats
from jaxmodel.compress.prune.masks import Pruning
from jaxmodel.compress.solve import compensate, hessian
from jaxmodel.leaves.largest import largest
from jaxmodel.schema import Positive

ROWS = 64
"""How many rows, each with an inverse of its own, are worked on at a time."""


@dataclasses.dataclass(frozen=True)
class Obs(Pruning):
    """The optimal brain surgeon (Hassibi and Stork, 1993), exact for the output of each row.

    The weight whose loss costs least goes, all others of its row move to where the error of the
    output is smallest, the inverse loses a row and a column, and so on (ExactOBS: Frantar and
    Alistarh, 2022). Time grows with `out * in^3`: for small matrices; for large ones there is
    `Sparsegpt`.

    Attributes:
      scope: "row": each row loses equally many; "leaf": the weight that costs least in any row
        goes next.
      damping: of the Hessian, as a fraction of its mean diagonal.
    """

    needs: ClassVar = ("gram",)

    damping: Positive = 0.01

    def step(self, draft: Draft, stats: LeafStats, key: jax.Array) -> Draft:
        """Prune a matrix; see `Method`."""
        if self.idle:
            return draft
        self.check_pattern(draft)
        found = hessian(stats["gram"], stats["count"], self.damping)
        inverse = found.factor.T @ found.factor
        out, n = draft.shape
        before = jnp.ones((out, n), bool) if draft.keep is None else draft.keep
        gone = n - jnp.sum(before, axis=-1, dtype=jnp.int32)
        pattern = self.pattern if draft.keep is None else None
        some, of = self.pattern or (0, n)
        kept = n // of * some if self.pattern else n - round(n * self.fraction)
        # a group of a pattern keeps less where earlier methods left less, so rows may differ
        room = jnp.minimum(jnp.sum(before.reshape(out, -1, of), axis=-1, dtype=jnp.int32), some)
        ends = jnp.sum(room, axis=-1) if self.pattern else jnp.full(out, kept)
        steps = jnp.maximum(gone, n - ends.astype(jnp.int32))
        run = lambda steps: _each_row(inverse, some, of, draft.target, before, steps)
        if self.scope == "leaf" and not self.pattern:
            kept = None
            costs = run(jnp.full(out, n, jnp.int32))[2]
            # a cheap weight behind a dear one waits for it
            dear = jax.lax.cummax(costs, axis=1)
            first = largest(-dear, round(out * n * self.fraction), axes=2)
            steps = jnp.maximum(gone, jnp.sum(first, axis=-1, dtype=jnp.int32))
        weight, keep, _ = run(steps)
        if draft.grid is not None:
            weight, _ = compensate(draft.target, found.factor, draft.grid, keep)
        kept = kept if draft.keep is None else None
        return draft.note(damping=found.damping).to(weight, keep=keep, kept=kept, pattern=pattern)


def _each_row(
    inverse: Float[Array, "n n"],
    some: int,
    of: int,
    weight: Float[Array, "out n"],
    keep: Bool[Array, "out n"],
    steps: Int[Array, " out"],
) -> tuple[Float[Array, "out n"], Bool[Array, "out n"], Float[Array, "out n"]]:
    """Prune all rows, `ROWS` at a time, which are far apart: each device takes some of its own.

    Args:
      inverse: of the Hessian.
      some: how many of each group must stay.
      of: the length of a group.
      weight: the rows.
      keep: what earlier methods kept; what they did not goes first, at no cost.
      steps: how many weights of each row go.

    Returns:
      The rows, what is kept of them, and what each step cost.
    """
    most = jnp.max(steps)
    at_once = math.gcd(ROWS, weight.shape[0])
    apart = lambda a: jnp.moveaxis(a.reshape(at_once, -1, *a.shape[1:]), 1, 0)
    back = lambda a: jnp.moveaxis(a, 0, 1).reshape(-1, *a.shape[2:])
    surgery = jax.vmap(functools.partial(_surgery, inverse, some, of, most))
    rows = jax.tree.map(apart, (weight, keep, steps))
    return jax.tree.map(back, jax.lax.map(lambda row: surgery(*row), rows))


def _surgery(
    inverse: Float[Array, "n n"],
    some: int,
    of: int,
    most: Array,
    weight: Float[Array, " n"],
    keep: Bool[Array, " n"],
    steps: Array,
) -> tuple[Float[Array, " n"], Bool[Array, " n"], Float[Array, " n"]]:
    """Prune a row step by step; the turns from `steps` to `most` change nothing."""
    n = weight.shape[0]

    def one(i: Array, state: Any) -> Any:
        weight, inverse, alive, costs = state
        diagonal = jnp.where(alive, jnp.diagonal(inverse), 1.0)
        left = jnp.sum(alive.reshape(-1, of), axis=-1, keepdims=True)
        free = jnp.broadcast_to(left > some, (n // of, of)).reshape(n)
        cost = jnp.where(alive & free, weight**2 / diagonal, jnp.inf)
        cost = jnp.where(alive & ~keep, -1.0, cost)
        q = jnp.argmin(cost)
        live = i < steps
        gone = live & (jnp.arange(n) == q)
        column = jnp.where(live, inverse[:, q] / diagonal[q], 0.0)
        weight = jnp.where(gone, 0.0, weight - weight[q] * column)
        inverse = inverse - column[:, None] * inverse[q][None]
        return weight, inverse, alive & ~gone, costs.at[i].set(jnp.where(live, cost[q], jnp.inf))

    state = (weight, inverse, jnp.ones(n, bool), jnp.full(n, jnp.inf))
    weight, _, alive, costs = jax.lax.fori_loop(0, most, one, state)
    return jnp.where(alive, weight, 0.0), alive, costs
