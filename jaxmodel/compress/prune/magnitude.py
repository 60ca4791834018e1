"""Magnitude pruning: set the smallest weights to zero."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodel.compress.draft import Draft, LeafStats
from jaxmodel.compress.prune.masks import Pruning


@dataclasses.dataclass(frozen=True)
class Magnitude(Pruning):
    """Magnitude pruning, which keeps the weights of largest absolute value (Han et al., 2015)."""

    def score(self, draft: Draft, stats: LeafStats, key: jax.Array) -> Float[Array, "out in"]:
        """Return `|w|`."""
        return jnp.abs(draft.weight)
