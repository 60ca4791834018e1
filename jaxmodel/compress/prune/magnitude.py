"""Pruning without data: the smallest weights, or any."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodel.compress.draft import Draft, LeafStats
from jaxmodel.compress.prune.masks import Scored


@dataclasses.dataclass(frozen=True)
class Magnitude(Scored):
    """Magnitude pruning, which keeps the weights of largest absolute value (Han et al., 2015)."""

    def score(self, draft: Draft, stats: LeafStats, key: jax.Array) -> Float[Array, "out in"]:
        """Return `|w|`."""
        return jnp.abs(draft.weight)


@dataclasses.dataclass(frozen=True)
class Random(Scored):
    """Pruning at random, which any other method should beat."""

    def score(self, draft: Draft, stats: LeafStats, key: jax.Array) -> Float[Array, "out in"]:
        """Return numbers that are uniform in [0, 1)."""
        return jax.random.uniform(key, draft.shape)
