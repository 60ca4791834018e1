"""Masks: which weights a pruning method keeps."""

from __future__ import annotations

import abc
import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxmodel.compress.draft import Draft, LeafStats
from jaxmodel.compress.method import Method
from jaxmodel.schema import Count, Range


@dataclasses.dataclass(frozen=True)
class Pruning(Method, abc.ABC):
    """Base of the methods that set weights to zero; a bitmask and the other weights are stored.

    A subclass gives a `score`, and the weights of the lowest score go. What an earlier method of
    the chain has pruned stays pruned.

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
    def score(self, draft: Draft, stats: LeafStats, key: jax.Array) -> Float[Array, "out in"]:
        """Return what a weight counts, not negative; the lowest are pruned."""

    def step(self, draft: Draft, stats: LeafStats, key: jax.Array) -> Draft:
        """Prune a matrix; see `Method`."""
        if self.pattern is None and self.fraction == 0:
            return draft
        self.check_pattern(draft)
        score = self.score(draft, stats, key)
        return prune(draft, score, self.fraction, self.scope, self.pattern)

    def check_pattern(self, draft: Draft) -> None:
        """Refuse a pattern that does not divide the rows of a matrix.

        Raises:
          InputError: it does not.
        """
        n = draft.shape[-1]
        if self.pattern is not None and n % self.pattern[1]:
            self.refuse("pattern", f"(N, M) with an M that divides the rows of {n} weights")


def prune(
    draft: Draft,
    score: Float[Array, "out in"],
    fraction: float,
    scope: str = "row",
    pattern: tuple[int, int] | None = None,
) -> Draft:
    """Keep the weights of the highest score, of those that are kept so far.

    Args:
      draft: the matrix.
      score: not negative.
      fraction: of the weights that become zero, those of earlier methods included.
      scope: "row" compares within each row, "leaf" within the matrix.
      pattern: None, or (N, M) to keep N of each M neighbours; fraction and scope do not count then.
    """
    out, n = score.shape
    # among equal scores, one that is kept so far goes before one that is not
    score = score + 1e-30 if draft.keep is None else jnp.where(draft.keep, score + 1e-30, 0.0)
    if pattern is not None:
        some, of = pattern
        kept = n // of * some
        keep = largest(score.reshape(out, n // of, of), some).reshape(out, n)
    elif scope == "row":
        kept = n - round(n * fraction)
        keep = largest(score, kept)
    else:
        kept = None
        keep = largest(score.reshape(-1), out * n - round(out * n * fraction)).reshape(out, n)
    if draft.keep is not None:
        # what was pruned before may be among the largest where too little is left
        fewer = draft.kept is not None and (kept is None or draft.kept < kept)
        same = draft.pattern is not None and draft.pattern != pattern
        keep = keep & draft.keep if scope == "leaf" or fewer or same else keep
        kept = draft.kept if kept is None or fewer else kept
        pattern = pattern if not (fewer or same) else None
    return draft.to(draft.weight, keep=keep, kept=kept, pattern=pattern)


def largest(scores: Float[Array, "... n"], count: int | Array) -> Bool[Array, "... n"]:
    """Mark the `count` largest of non-negative scores along the last axis; of equal ones the first.

    The threshold is found bit by bit: the bit patterns of non-negative floats are ordered like the
    floats, so 31 passes that only count find it. This needs no sort, and on a mesh only counts are
    exchanged.
    """
    pattern = jax.lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.int32)

    def refine(i: Array, threshold: Array) -> Array:
        higher = threshold | (jnp.int32(1) << (30 - i))
        enough = jnp.sum(pattern >= higher, axis=-1, keepdims=True, dtype=jnp.int32) >= count
        return jnp.where(enough, higher, threshold)

    threshold = jax.lax.fori_loop(0, 31, refine, jnp.zeros((*pattern.shape[:-1], 1), jnp.int32))
    above = pattern > threshold
    equal = pattern == threshold
    room = count - jnp.sum(above, axis=-1, keepdims=True, dtype=jnp.int32)
    return above | (equal & (jnp.cumsum(equal, axis=-1, dtype=jnp.int32) <= room))
