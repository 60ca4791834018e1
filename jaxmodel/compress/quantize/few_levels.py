"""Two and three levels, and numbers of 8 bits: `Binary`, `Ternary`, `Fp8`."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from jaxmodel.compress.draft import Draft, Grid, LeafStats
from jaxmodel.compress.method import Method
from jaxmodel.compress.quantize.ranges import cut
from jaxmodel.compress.quantize.rtn import check_group, check_unrounded
from jaxmodel.leaves.qtensor import FLOATS, TERNARY
from jaxmodel.schema import Count


@dataclasses.dataclass(frozen=True)
class Binary(Method):
    """One bit for each weight, its sign, times the mean of the sizes (Rastegari et al., 2016).

    Attributes:
      group: number of neighbouring weights of a row that share a scale, a multiple of 8; None for
        one scale per row.
      stochastic: draw the sign, so that the mean is the weight where it is below the scale
        (BinaryConnect: Courbariaux et al., 2015).
    """

    group: Count | None = None
    stochastic: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_group(self, self.group, 1)

    def step(self, draft: Draft, stats: LeafStats, key: jax.Array) -> Draft:
        """Quantise a matrix; see `Method`."""
        check_unrounded(self, draft)
        groups = cut(draft.weight, self.group, keep=draft.keep)
        grid = _grid(groups.mean(jnp.abs(groups.values)), self.group, 1)
        weight = draft.weight
        if self.stochastic:
            size = grid.values(jnp.ones(draft.shape, jnp.int32))
            chance = jnp.clip((weight / size + 1) / 2, 0, 1)
            weight = jnp.where(jax.random.uniform(key, weight.shape) < chance, size, -size)
        return draft.to(weight, grid=grid)


@dataclasses.dataclass(frozen=True)
class Ternary(Method):
    """Three levels, -1, 0 and 1 times a scale, stored in 1.6 bits for each weight.

    Attributes:
      group: number of neighbouring weights of a row that share a scale, a multiple of 5; None for
        one scale per row.
      rule: "twn" sets what is below 0.7 of the mean size to zero, and the scale is the mean size of
        the others (Li and Liu, 2016); "absmean" takes the mean size as the scale and rounds (BitNet
        b1.58: Ma et al., 2024).
    """

    group: Count | None = None
    rule: Literal["twn", "absmean"] = "twn"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group is not None and self.group % 5:
            self.refuse("group", "a multiple of 5, which fills bytes")

    def step(self, draft: Draft, stats: LeafStats, key: jax.Array) -> Draft:
        """Quantise a matrix; see `Method`."""
        check_unrounded(self, draft)
        groups = cut(draft.weight, self.group, keep=draft.keep)
        size = jnp.abs(groups.values)
        scale = groups.mean(size)
        if self.rule == "absmean":
            return draft.to(draft.weight, grid=_grid(scale, self.group, 2, TERNARY))
        large = (size > 0.7 * scale[..., None]).astype(jnp.float32)
        scale = groups.mean(size * large) / jnp.maximum(groups.mean(large), 1e-30)
        grid = _grid(scale, self.group, 2, TERNARY)
        large = large.reshape(len(large), -1)[:, : draft.shape[-1]]
        signs = (jnp.sign(draft.weight) * large).astype(jnp.int32)
        return draft.to(grid.values(signs), grid=grid)


@dataclasses.dataclass(frozen=True)
class Fp8(Method):
    """Floating-point numbers of 8 bits, with a scale (Micikevicius et al., 2022).

    Attributes:
      format: "e4m3", 3 bits of fraction and numbers up to 448, or "e5m2", 2 bits and up to 57344.
      group: number of neighbouring weights of a row that share a scale; None for one scale per row.
    """

    format: Literal["e4m3", "e5m2"] = "e4m3"
    group: Count | None = None

    def step(self, draft: Draft, stats: LeafStats, key: jax.Array) -> Draft:
        """Quantise a matrix; see `Method`."""
        check_unrounded(self, draft)
        high = cut(draft.weight, self.group, keep=draft.keep).widest()[1]
        scale = high / float(jnp.finfo(FLOATS[self.format]).max)
        grid = _grid(scale, self.group, 8, self.format, "float32")
        return draft.to(draft.weight, grid=grid)


def _grid(
    scale: jax.Array,
    group: int | None,
    bits: int,
    form: str | None = None,
    dtype: str = "float16",
) -> Grid:
    tiny = float(jnp.finfo(dtype).tiny)
    scale = jnp.maximum(scale, tiny).astype(dtype)
    return Grid(scale, bits=bits, group=group if scale.shape[-1] > 1 else None, form=form)
