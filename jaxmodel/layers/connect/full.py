"""The full connection: every input to every output."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from jaxmodel import ops, tree
from jaxmodel.errors import InputError
from jaxmodel.layers.leaf import leaf
from jaxmodel.layers.linear import Initializer
from jaxmodel.leaves import decode
from jaxmodel.ops.edges import EdgeBlock, Edges, edges_of
from jaxmodel.ops.norms import on_last

fan_in: Initializer = nn.initializers.variance_scaling(
    1.0, "fan_in", "truncated_normal", in_axis=-1, out_axis=-2
)
"""Initialiser of weights `[out, in]` that keeps the scale of the inputs (LeCun et al., 1998)."""


class Full(nn.Module):
    """A linear map `W x + b`, with leaves weight `[D, N]` and weight_bias `[D]`.

    Attributes:
      width: D of new leaves.
      policy: dtypes and placement.
      bias: whether there is a bias.
      initializer: the initialiser of the weight.

    >>> import jax, jax.numpy as jnp
    >>> from jaxmodel.ops.edges import edge_sum
    >>> x, module = jnp.ones((2, 3)), Full(4, ops.Policy())
    >>> params = jax.jit(module.init)(jax.random.key(0), x)["params"]
    >>> listed = jax.jit(lambda params: edge_sum(x, module.edges(params)))
    >>> bool(jnp.allclose(module.apply({"params": params}, x), listed(params), atol=1e-6))
    True
    """

    width: int
    policy: ops.Policy
    bias: bool = True
    initializer: Initializer = fan_in

    @nn.compact
    def __call__(self, x: Float[Array, "B N"]) -> Float[Array, "B D"]:
        """Compute `W x + b`."""
        y = ops.einsum(
            "BN,DN->BD",
            x,
            leaf(self, "weight", self.initializer, (self.width, x.shape[-1])),
            self.policy,
        )
        return add_bias(self, y) if self.bias else y

    def edges(self, params: tree.Params) -> Edges:
        """Return the same connections as a list."""
        weight = decode(params["weight"])
        bias = [EdgeBlock(params["weight_bias"])] if "weight_bias" in params else []
        return edges_of([EdgeBlock(weight, (0,)), *bias], weight.shape[1], weight.shape[0])


def add_bias(
    module: nn.Module, y: Float[Array, "B D"], name: str = "weight_bias"
) -> Float[Array, "B D"]:
    """Add the module's leaf of this name, which starts at zero, to `y`."""
    return y + on_last(
        leaf(module, name, nn.initializers.zeros, y.shape[-1:]).astype(y.dtype), y.ndim
    )


def by_name(branches: Any) -> dict[str, Array]:
    """Return several inputs in the order in which they are concatenated, sorted by name.

    Raises:
      InputError: `branches` is not a dict with at least one entry, or a name has a slash.
    """
    if not isinstance(branches, Mapping) or not branches:
        given = "none" if isinstance(branches, Mapping) else type(branches).__name__
        raise InputError(f"branches: {given} given; allowed: a dict, name of a branch -> [B, N]")
    if slashed := [name for name in branches if "/" in name]:
        raise InputError(
            f"branches: {slashed[0]!r} has a slash, which separates the keys of a path; allowed: "
            "names without slashes"
        )
    return dict(sorted(branches.items()))


def starts(widths: Iterable[int]) -> list[int]:
    """Return the start of each of several ranges of features, and the total length.

    >>> starts([3, 2])
    [0, 3, 5]
    """
    return [0, *itertools.accumulate(widths)]
