"""Masks: which weights a pruning method keeps."""

from __future__ import annotations

import abc
import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodel.compress.draft import Draft, LeafStats
from jaxmodel.compress.method import Method
from jaxmodel.leaves.block_sparse import cut
from jaxmodel.leaves.largest import largest
from jaxmodel.schema import Count, Index, Range


@dataclasses.dataclass(frozen=True)
class Pruning(Method, abc.ABC):
    """Base of the methods that set weights to zero; a bitmask and the other weights are stored.

    What an earlier method of the chain has pruned stays pruned.

    Attributes:
      fraction: the fraction of weights that become zero, in [0, 1).
      scope: "row" compares within each row, so that all rows keep equally many and need no padding;
        "leaf" compares within each layer's leaf, and pads all rows to the fullest.
      pattern: None, or (N, M) to keep N of each M neighbours; `fraction` and `scope` are then
        ignored.
    """

    fraction: Annotated[float, Range(0, below=1)] = 0.5
    scope: Literal["row", "leaf"] = "row"
    pattern: tuple[Count, Count] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern is not None and not self.pattern[0] < self.pattern[1]:
            self.refuse("pattern", "(N, M) with 0 < N < M")

    @abc.abstractmethod
    def step(self, draft: Draft, stats: LeafStats, key: jax.Array) -> Draft:
        """Prune a matrix; see `Method`."""

    @property
    def idle(self) -> bool:
        """Whether the settings prune nothing."""
        return self.pattern is None and self.fraction == 0

    def check_pattern(self, draft: Draft) -> None:
        """Refuse a pattern that does not divide the rows of a matrix.

        Raises:
          InputError: it does not.
        """
        n = draft.shape[-1]
        if self.pattern is not None and n % self.pattern[1]:
            self.refuse("pattern", f"(N, M) with an M that divides the rows of {n} weights")


@dataclasses.dataclass(frozen=True)
class Scored(Pruning):
    """Base of the methods that give each weight a score and prune the lowest.

    Attributes:
      threshold: None, or the score below which weights go; `fraction` and `scope` are then ignored.
      block: None, or (rows, columns) of the blocks that are kept or pruned as a whole, by their
        mean score; 0 stands for all rows or all columns. (1, 0) prunes rows, (0, 1) columns,
        and (16, 16) is stored as `BlockSparse`. With the scope "row" each row of blocks keeps
        equally many, unless there is one alone.
    """

    threshold: float | None = None
    block: tuple[Index, Index] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern is not None and self.threshold is not None:
            self.refuse("threshold", "None beside a pattern")
        if self.pattern is not None and self.block is not None:
            self.refuse("block", "None beside a pattern")

    @abc.abstractmethod
    def score(self, draft: Draft, stats: LeafStats, key: jax.Array) -> Float[Array, "out in"]:
        """Return what a weight counts; the lowest are pruned."""

    @property
    def idle(self) -> bool:
        """Whether the settings prune nothing."""
        return super().idle and self.threshold is None

    @property
    def lowest(self) -> float | None:
        """The score of the lowest weight that stays, where there is a threshold."""
        return self.threshold

    def at(self, lowest: float) -> Scored:
        """Return the method with the threshold that this lowest score stands for."""
        return dataclasses.replace(self, threshold=lowest)

    def step(self, draft: Draft, stats: LeafStats, key: jax.Array) -> Draft:
        """Prune a matrix; see `Method`."""
        if self.idle:
            return draft
        self.check_pattern(draft)
        score = self.score(draft, stats, key)
        block = self.block_of(draft)
        return prune(draft, score, self.fraction, self.scope, self.pattern, self.lowest, block)

    def block_of(self, draft: Draft) -> tuple[int, int] | None:
        """Return the size of the blocks of a matrix.

        Raises:
          InputError: they do not divide it.
        """
        if self.block is None:
            return None
        out, n = draft.shape
        block = self.block[0] or out, self.block[1] or n
        if out % block[0] or n % block[1]:
            self.refuse("block", f"divisors of the {out} rows and the {n} columns, 0 for all")
        return block


def prune(
    draft: Draft,
    score: Float[Array, "out in"],
    fraction: float,
    scope: str = "row",
    pattern: tuple[int, int] | None = None,
    lowest: float | None = None,
    block: tuple[int, int] | None = None,
) -> Draft:
    """Keep the weights of the highest score, of those that are kept so far.

    Args:
      draft: the matrix.
      score: of each weight.
      fraction: of the weights that become zero, those of earlier methods included.
      scope: "row" compares within each row, "leaf" within the matrix.
      pattern: None, or (N, M) to keep N of each M neighbours; fraction and scope do not count then.
      lowest: None, or the lowest score that stays; fraction and scope do not count then.
      block: None, or the size of the blocks that go as a whole.
    """
    if draft.keep is not None:  # of equal scores, those of what is kept so far go first
        score = jnp.where(draft.keep, score, -jnp.inf)
    if block is not None:
        alive = jnp.isfinite(score)
        left = jnp.sum(cut(alive, block), axis=(-2, -1), dtype=jnp.float32)
        total = jnp.sum(cut(jnp.where(alive, score, 0.0), block), axis=(-2, -1))
        score = jnp.where(left > 0, total / (block[0] * block[1]), -jnp.inf)
        scope = "leaf" if score.shape[-1] == 1 else scope
    out, n = score.shape
    kept = None
    if pattern is not None:
        some, of = pattern
        kept = n // of * some
        keep = largest(score.reshape(out, n // of, of), some).reshape(out, n)
    elif lowest is not None:
        keep = score >= lowest
    elif scope == "row":
        kept = n - round(n * fraction)
        keep = largest(score, kept)
    else:
        keep = largest(score, out * n - round(out * n * fraction), axes=2)
    if block is not None:
        keep = jnp.repeat(jnp.repeat(keep, block[0], axis=0), block[1], axis=1)
        kept = None if kept is None else kept * block[1]
    if draft.keep is not None:
        keep = keep & draft.keep  # a row or a group may have less left than it should keep
        known = [count for count in (kept, draft.kept) if count is not None]
        kept = min(known, default=None)
        pattern = pattern if draft.pattern == pattern else None
    return draft.to(draft.weight, keep=keep, kept=kept, pattern=pattern, block=block)
