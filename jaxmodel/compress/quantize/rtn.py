"""Round to nearest: codes of 1 to 8 bits, with the range of the weights alone."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import jax

from jaxmodel.compress.draft import Draft, Grid, LeafStats
from jaxmodel.compress.method import Method
from jaxmodel.compress.quantize.ranges import Absmax, RangeRule, even_grid
from jaxmodel.errors import InputError
from jaxmodel.leaves.packing import codes_per_unit
from jaxmodel.schema import Count, Range
from jaxmodel.text_form import name_of, read_one


@dataclasses.dataclass(frozen=True)
class Rtn(Method):
    """Rounding of each weight to the nearest of `2^bits` levels.

    Symmetric: `scale = max|w| / (2^(bits-1) - 1)`; at one bit it is the mean of |w|, the least
    squares choice. Affine: levels from the smallest to the largest weight. The codes are computed
    with the scale as it is stored.

    Attributes:
      bits: 1 to 8.
      group: number of neighbouring weights of a row that share a scale, whole bytes of codes; None
        for one scale per row.
      symmetric: True for a range symmetric around zero, with zero as a level; False for affine.
      activations: None, or "int8" to round the input of the contraction too, row by row at run
        time.
      scale_dtype: None for float32 with one scale per row and float16 with groups.
      range: how the range is chosen: a rule of `ranges` by its text, such as "mse" or
        "percentile(99.9)". At one bit there is nothing to choose.
    """

    bits: Annotated[int, Range(1, 8)] = 8
    group: Count | None = None
    symmetric: bool = True
    activations: Literal["int8"] | None = None
    scale_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    range: str = "absmax"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_group(self, self.group, self.bits)
        if self.rule.weighted and "gram" not in self.needs:
            object.__setattr__(self, "needs", ("square",))

    @property
    def rule(self) -> RangeRule:
        """The rule that `range` names.

        Raises:
          InputError: it names none.
        """
        return read_one(RangeRule, self.range) or Absmax()

    def grid(self, draft: Draft, importance: jax.Array | None = None) -> Grid:
        """Return the grid for a matrix."""
        return even_grid(
            draft.weight,
            self.bits,
            self.group,
            symmetric=self.symmetric,
            rule=self.rule,
            importance=importance,
            keep=draft.keep,
            dtype=self.scale_dtype,
        )

    def step(self, draft: Draft, stats: LeafStats, key: jax.Array) -> Draft:
        """Quantise a matrix; see `Method`."""
        check_unrounded(self, draft)
        importance = stats["square"] if self.rule.weighted else None
        grid = self.grid(draft, importance)
        return draft.to(draft.weight, grid=grid, activations=self.activations)


def check_group(method: Method, group: int | None, bits: int) -> None:
    """Refuse groups that do not fill whole bytes.

    Raises:
      InputError: they do not.
    """
    unit = codes_per_unit(bits)
    if group is not None and group % unit:
        method.refuse("group", f"at {bits} bits a multiple of {unit}, which fills bytes")


def check_unrounded(method: Method, draft: Draft) -> None:
    """Refuse a matrix whose weights are on a grid: a second one would undo the first.

    Raises:
      InputError: they are.
    """
    if draft.grid is not None:
        raise InputError(
            f"{name_of(type(method))}: the weights are rounded already; allowed: one method that "
            "rounds in a chain, and compensate() behind it"
        )
