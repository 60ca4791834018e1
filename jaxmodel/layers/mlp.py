"""The feed-forward part of a block."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
from jaxtyping import Array, Float

from jaxmodel import ops
from jaxmodel.layers.leaf import leaf
from jaxmodel.layers.linear import Initializer, linear
from jaxmodel.ops.norms import on_last
from jaxmodel.sharding import constrain


class MLP(nn.Module):
    """The feed-forward part `down(act(up x))`, or gated `down(act(gate x) * up x)` (Shazeer, 2020).

    Leaves up (and gate) `[F, D]`, down `[D, F]`, and biases of each if `bias`.

    Attributes:
      width: F of new leaves; existing leaves have their own.
      activation: an elementwise function.
      gated: whether there is a gate.
      bias: whether the maps have biases.
      initializer: the initialiser of up and gate.
      out_initializer: the initialiser of down.
      policy: dtypes and placement.
    """

    width: int
    activation: Callable[[Array], Array]
    gated: bool
    bias: bool
    initializer: Initializer
    out_initializer: Initializer
    policy: ops.Policy

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Return the output of the feed-forward part."""
        names = ("gate", "up") if self.gated else ("up",)
        parts = linear(
            self, x, dict.fromkeys(names, self.width), self.initializer, self.bias, self.policy
        )
        parts = [constrain(y, "BTF", self.policy.axes) for y in parts]
        hidden = self.activation(parts[0]) * parts[1] if self.gated else self.activation(parts[0])
        down = leaf(self, "down", self.out_initializer, (x.shape[-1], hidden.shape[-1]))
        y = ops.einsum("BTF,DF->BTD", hidden, down, self.policy)
        if self.bias:
            y = y + on_last(
                leaf(self, "down_bias", nn.initializers.zeros, y.shape[-1:]).astype(y.dtype), y.ndim
            )
        return y
