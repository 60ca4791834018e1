"""Rounding of the inputs of contractions: `Activations`."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import jax

from jaxmodel.compress.draft import Draft, LeafStats
from jaxmodel.compress.method import Method
from jaxmodel.errors import InputError
from jaxmodel.ops.probe import histogram_quantile
from jaxmodel.schema import Range
from jaxmodel.text_form import name_of


@dataclasses.dataclass(frozen=True)
class Activations(Method):
    """Rounding of the input too, when the leaf runs; behind a method that rounds the weights.

    `rtn(8) | activations()` is W8A8, `rtn(4, group=64) | activations()` W4A8, and
    `fp8() | activations("e4m3")` rounds both to floating-point numbers of 8 bits.

    Attributes:
      dtype: "int8", "e4m3" or "e5m2".
      percentile: None for a scale for each row, found at run time; else one scale for all, such
        that this percentage of the elements seen in calibration lies in the range.
    """

    dtype: Literal["int8", "e4m3", "e5m2"] = "int8"
    percentile: Annotated[float, Range(50, 100)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.percentile is not None:
            object.__setattr__(self, "needs", ("histogram",))

    def step(self, draft: Draft, stats: LeafStats, key: jax.Array) -> Draft:
        """Say how the input is rounded; see `Method`."""
        if draft.grid is None or draft.grid.table is not None:
            raise InputError(
                f"{name_of(type(self))}: the weights "
                f"{'are not rounded' if draft.grid is None else 'are rounded to a table'}; "
                "allowed: behind a method that rounds them to even steps or to fp8"
            )
        limit = None
        if self.percentile is not None:
            limit = histogram_quantile(stats["histogram"], self.percentile / 100)
            draft = draft.note(limit=limit)
        return dataclasses.replace(draft, activations=self.dtype, limit=limit, changed=True)
