"""Every input meets every output."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import flax.linen as nn
from jaxtyping import Array, Float

from jaxmodel import ops, tree
from jaxmodel.layers.leaf import leaf
from jaxmodel.layers.linear import Initializer
from jaxmodel.leaves import decode

fan_in: Initializer = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=-1, out_axis=-2)
"""Of weights `[out, in]` whose results should be as large as their inputs (LeCun et al., 1998)."""


class Full(nn.Module):
    """`W x + b`; leaves weight `[D, N]` and weight_bias `[D]`.

    Attributes:
      width: D of new leaves.
      policy: dtypes and placement.
      bias: whether there is one.
      initializer: of the weight.
    """

    width: int
    policy: ops.Policy
    bias: bool = True
    initializer: Initializer = fan_in

    @nn.compact
    def __call__(self, x: Float[Array, "B N"]) -> Float[Array, "B D"]:
        y = ops.einsum("BN,DN->BD", x, leaf(self, "weight", self.initializer, (self.width, x.shape[-1])), self.policy)
        return add_bias(self, y) if self.bias else y

    def edges(self, params: tree.Params) -> ops.Edges:
        """The same connections as a list."""
        weight = decode(params["weight"])
        bias = [ops.EdgeBlock(params["weight_bias"])] if "weight_bias" in params else []
        return ops.edges_of([ops.EdgeBlock(weight, (0,)), *bias], weight.shape[1], weight.shape[0])


def add_bias(module: nn.Module, y: Float[Array, "B D"], name: str = "weight_bias") -> Float[Array, "B D"]:
    """`y` plus the module's leaf of this name, which starts at zero."""
    return y + ops.on_last(leaf(module, name, nn.initializers.zeros, y.shape[-1:]).astype(y.dtype), y.ndim)


def starts(widths: Iterable[int]) -> list[int]:
    """Where each of some runs of features begins, and at last how many there are in all.

    >>> starts([3, 2])
    [0, 3, 5]
    """
    return [0, *itertools.accumulate(widths)]
