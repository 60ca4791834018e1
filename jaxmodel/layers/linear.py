"""Several linear maps of one input, which may be fused in one leaf."""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
from jaxtyping import Array, Float

from jaxmodel import ops
from jaxmodel.layers.fuse import cut, fused_key
from jaxmodel.layers.leaf import leaf
from jaxmodel.ops.norms import on_last

Initializer = nn.initializers.Initializer


def linear(
    module: nn.Module,
    x: Float[Array, "B T I"],
    outputs: Mapping[str, int],
    initializer: Initializer,
    bias: bool,
    policy: ops.Policy,
) -> list[Float[Array, "B T O"]]:
    """Compute `x @ w.T + b` for every named weight `[O, I]`, with biases named `{name}_bias`.

    Args:
      module: the Linen module that owns the leaves.
      x: the input.
      outputs: name -> width O of a new leaf; an existing leaf has its own.
      initializer: the initialiser of the weights; biases start at zero.
      bias: whether each map has a bias.
      policy: dtypes and placement.
    """

    def one(name: str, width: int) -> Array:
        # F, because all of these are split by output: with a letter that no mesh axis has, results
        # and weights would be gathered
        y = ops.einsum(
            "BTI,FI->BTF", x, leaf(module, name, initializer, (width, x.shape[-1])), policy
        )
        if bias:
            y = y + on_last(
                leaf(module, f"{name}_bias", nn.initializers.zeros, y.shape[-1:]).astype(y.dtype),
                y.ndim,
            )
        return y

    fused = fused_key(module.variables.get("params", {}), outputs) if len(outputs) > 1 else None
    return (
        cut(one(fused, 0), fused)
        if fused
        else [one(name, width) for name, width in outputs.items()]
    )
