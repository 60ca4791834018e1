"""`AttentionMask`: which keys each query may see, as rules that are expanded only where needed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxmodel.leaves.leaf import register, static


@register
class AttentionMask:
    """The conditions under which a query sees a key; all must hold.

    A pytree in which nothing but `mask` grows with T times S.

    Attributes:
      query: int32 `[#B, T]`, the position of each query among the keys; None if query t is at key
        t.
      segments: int32 `([B, T], [B, S])`, the segments of queries and keys, which must be equal
        (documents packed into a row); or None.
      valid: bool `[B, S]`, False for padding; or None.
      window: int32 scalar; a key is seen only at a smaller distance than this. None for any
        distance. It may differ between the layers of one scan.
      mask: bool `[#B, T, S]`, any other condition; or None.
      causal: whether a query sees no key after its own position.
    """

    query: Any = None
    segments: Any = None
    valid: Any = None
    window: Any = None
    mask: Any = None
    causal: bool = static(default=True)

    def square(self, t: int, s: int, first: Any = 0, first_key: Any = 0) -> Bool[Array, "#B t s"]:
        """Return the mask of a rectangle: whether query `first + i` sees key `first_key + j`.

        The starts may be traced.

        Args:
          t: the number of queries.
          s: the number of keys.
          first: the index of the first query.
          first_key: the index of the first key.
        """
        steps = jnp.arange(t, dtype=jnp.int32)[None]
        query = first + steps if self.query is None else _cut(self.query, first, t)
        key = first_key + jnp.arange(s, dtype=jnp.int32)[None, None]
        distance = query[:, :, None] - key
        seen = distance >= 0 if self.causal else jnp.ones(distance.shape, jnp.bool_)
        if self.window is not None:
            seen = seen & (jnp.abs(distance) < self.window)
        if self.segments is not None:
            of_query, of_key = self.segments
            seen = seen & (
                _cut(of_query, first, t)[:, :, None] == _cut(of_key, first_key, s)[:, None, :]
            )
        if self.valid is not None:
            seen = seen & _cut(self.valid, first_key, s)[:, None, :]
        if self.mask is not None:
            seen = seen & jax.lax.dynamic_slice_in_dim(
                _cut(self.mask, first, t), first_key, s, axis=2
            )
        return seen


def _cut(a: Array, start: Any, length: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(a, start, length, axis=1)


# the score of a hidden key: finite, so that a row that sees no key stays finite
HIDDEN = -1e30


def masked(
    scores: Float[Array, "B K G T S"], seen: Bool[Array, "#B T S"]
) -> Float[Array, "B K G T S"]:
    """Return the scores, with those of hidden keys far below all others."""
    return jnp.where(seen[:, None, None], scores, HIDDEN)
