"""`Turn`: rotation of the input of one matrix, in front of methods that round."""

from __future__ import annotations

import dataclasses

import jax

from jaxmodel.compress.draft import Draft, LeafStats
from jaxmodel.compress.method import Method
from jaxmodel.compress.quantize.rtn import check_unrounded
from jaxmodel.errors import InputError
from jaxmodel.leaves.hadamard import block_of, largest_block, turn
from jaxmodel.schema import Count
from jaxmodel.text_form import Member


@dataclasses.dataclass(frozen=True)
class Turn(Method):
    """Rotation of the input when the leaf runs, so that its outliers are spread over all elements.

    The weights are rotated likewise, and the product stays what it was; methods behind it round
    both with a smaller error (QuIP: Chee et al., 2023; QuaRot: Ashkboos et al., 2024). A matrix
    whose input is rotated already, or has no length that a Hadamard matrix of more than one row
    divides, stays as it is. The transform `rotate` rotates what several matrices share, where that
    costs nothing at run time.

    Attributes:
      block: the length of a block, a size of a Hadamard matrix; None for the longest that divides
        the input. One that does not divide it leaves the matrix as it is.
    """

    block: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_block(self, self.block)

    def step(self, draft: Draft, stats: LeafStats, key: jax.Array) -> Draft:
        """Rotate a matrix; see `Method`."""
        check_unrounded(self, draft)
        if draft.keep is not None or draft.block is not None:
            raise InputError("turn: the weights are pruned already; allowed: turn() before that")
        size = block_of(draft.shape[-1], self.block)
        if draft.hadamard or not size:
            return draft
        weight = turn(draft.weight, size)
        target = turn(draft.target, size)
        return dataclasses.replace(draft, weight=weight, target=target, hadamard=size, changed=True)


def check_block(one: Member, block: int | None) -> None:
    """Refuse a block for which no Hadamard matrix is known.

    Raises:
      InputError: it is one.
    """
    if block is not None and largest_block(block) != block:
        one.refuse("block", f"a size of a Hadamard matrix, such as {largest_block(block)}")
