"""Wanda: prune by the size of a weight and of the input that it meets."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodel.compress.draft import Draft, LeafStats
from jaxmodel.compress.prune.masks import Scored


@dataclasses.dataclass(frozen=True)
class Wanda(Scored):
    """Pruning by `|w| * |x|`, where |x| is the norm of the inputs seen (Sun et al., 2024)."""

    needs: ClassVar = ("square",)

    def score(self, draft: Draft, stats: LeafStats, key: jax.Array) -> Float[Array, "out in"]:
        """Return `|w| * |x|`."""
        return jnp.abs(draft.weight) * jnp.sqrt(stats["square"])[None]
