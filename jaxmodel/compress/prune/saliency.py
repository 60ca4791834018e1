"""Pruning by the gradient of the loss: what the loss would change by without a weight.

The statistics are sums over batches: `gradient` of `dL/dw`, `fisher` of its square, `movement` of
`-w dL/dw` while the weights are trained.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodel.compress.draft import Draft, LeafStats
from jaxmodel.compress.prune.masks import Scored


@dataclasses.dataclass(frozen=True)
class Gradient(Scored):
    """Pruning by the size of the gradient, `|g|`.

    Attributes:
      prune: "smallest": the weights that the loss would rather leave where they are go; "largest":
        those that it would rather move.
      threshold: None, or the size below which ("smallest") or above which ("largest") weights go;
        `fraction` and `scope` are then ignored.
    """

    needs: ClassVar = ("gradient",)

    prune: Literal["smallest", "largest"] = "smallest"

    @property
    def lowest(self) -> float | None:
        """The score of the lowest weight that stays, where there is a threshold."""
        if self.threshold is None or self.prune == "smallest":
            return self.threshold
        return -self.threshold

    def at(self, lowest: float) -> Scored:
        """Return the method with the threshold that this lowest score stands for."""
        sign = 1 if self.prune == "smallest" else -1
        return dataclasses.replace(self, threshold=sign * lowest)

    def score(self, draft: Draft, stats: LeafStats, key: jax.Array) -> Float[Array, "out in"]:
        """Return `|g|`, or its negative."""
        size = jnp.abs(stats["gradient"])
        return size if self.prune == "smallest" else -size


@dataclasses.dataclass(frozen=True)
class Snip(Scored):
    """Pruning by `|w g|`, the sensitivity of the loss to a connection (Lee et al., 2019).

    That is how much the loss changes without the weight, to first order (Molchanov et al., 2019).
    """

    needs: ClassVar = ("gradient",)

    def score(self, draft: Draft, stats: LeafStats, key: jax.Array) -> Float[Array, "out in"]:
        """Return `|w g|`."""
        return jnp.abs(draft.weight * stats["gradient"])


@dataclasses.dataclass(frozen=True)
class Fisher(Scored):
    """Pruning by `w^2 F / 2`, with the diagonal of the empirical Fisher information F.

    Optimal brain damage (LeCun et al., 1990) with the mean square of gradients for the Hessian.
    """

    needs: ClassVar = ("fisher",)

    def score(self, draft: Draft, stats: LeafStats, key: jax.Array) -> Float[Array, "out in"]:
        """Return `w^2 F / 2`."""
        return 0.5 * draft.weight**2 * stats["fisher"]


@dataclasses.dataclass(frozen=True)
class Taylor(Scored):
    """Pruning by `|w^2 F / 2 - w g|`: the change of the loss without a weight, to second order.

    The Hessian is the diagonal of the empirical Fisher information (Molchanov et al., 2019).
    """

    needs: ClassVar = ("gradient", "fisher")

    def score(self, draft: Draft, stats: LeafStats, key: jax.Array) -> Float[Array, "out in"]:
        """Return `|w^2 F / 2 - w g|`."""
        weight = draft.weight
        return jnp.abs(0.5 * weight**2 * stats["fisher"] - weight * stats["gradient"])


@dataclasses.dataclass(frozen=True)
class Movement(Scored):
    """Pruning of the weights that training moves towards zero (Sanh et al., 2020).

    The statistic is summed in training by `optim.prune_gradually(..., by="movement")`.
    """

    needs: ClassVar = ("movement",)

    def score(self, draft: Draft, stats: LeafStats, key: jax.Array) -> Float[Array, "out in"]:
        """Return the sum of `-w g`."""
        return stats["movement"]
