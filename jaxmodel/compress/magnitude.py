"""Magnitude pruning: set the smallest weights to zero."""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxmodel.compress.method import Method
from jaxmodel.errors import InputError
from jaxmodel.leaves import Compressed, Sparse
from jaxmodel.leaves.leaf import check_weights
from jaxmodel.schema import Count, Range


@dataclasses.dataclass(frozen=True)
class Magnitude(Method):
    """Magnitude pruning, which keeps the weights of largest absolute value (Han et al., 2015).

    The other weights are zero bits of a mask.

    Attributes:
      fraction: the fraction of weights that become zero, in [0, 1).
      scope: "row" compares within each row, so that all rows keep equally many and need no padding;
        "leaf" compares within each layer's leaf, and pads all rows to the fullest.
      pattern: None, or (N, M) to keep the N largest of each M neighbours; `fraction` and `scope`
        are then ignored.
    """

    fraction: Annotated[float, Range(0, below=1)] = 0.5
    scope: Literal["row", "leaf"] = "row"
    pattern: tuple[Count, Count] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern is not None and not self.pattern[0] < self.pattern[1]:
            self.refuse("pattern", "(N, M) with 0 < N < M")

    def __call__(self, leaf: Any, stats: dict[str, Any] | None = None) -> Any:
        """Prune a leaf; see `Method`."""
        if isinstance(leaf, Compressed):
            raise InputError(
                f"magnitude: takes a plain leaf, not {type(leaf).__name__}; prune before you "
                f"quantise"
            )
        check_weights(leaf, "magnitude")
        if self.pattern is None and self.fraction == 0:
            return leaf
        if self.pattern is not None and leaf.shape[-1] % self.pattern[1]:
            raise InputError(
                f"magnitude: pattern {self.pattern} does not divide rows of {leaf.shape[-1]} "
                f"weights"
            )
        return Sparse.from_dense(leaf, _keep(leaf, self), pattern=self.pattern)


@functools.partial(jax.jit, static_argnums=1)
def _keep(weight: Float[Array, "... out in"], method: Magnitude) -> Bool[Array, "... out in"]:
    size = jnp.abs(weight.astype(jnp.float32))
    *lead, out, n = weight.shape
    if method.pattern is not None:
        kept, per = method.pattern
        return largest(size.reshape(*lead, out, n // per, per), kept).reshape(weight.shape)
    if method.scope == "row":
        return largest(size, n - round(n * method.fraction))
    return largest(
        size.reshape(*lead, out * n), out * n - round(out * n * method.fraction)
    ).reshape(weight.shape)


def largest(scores: Float[Array, "... n"], count: int) -> Bool[Array, "... n"]:
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
