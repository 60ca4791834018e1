"""A mixture of experts in place of the feed-forward part."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmodel import ops
from jaxmodel.layers.fuse import cut, fused_key
from jaxmodel.layers.leaf import leaf
from jaxmodel.layers.linear import Initializer


class MoE(nn.Module):
    """`sum_k p_k down_k(act(gate_k x) * up_k x)` over the experts k that a router chooses for each token (Shazeer et al., 2017;
    Mixtral: Jiang et al., 2024). No token is dropped: the rows of all tokens are sorted by expert, however many each has.

    Leaves router `[E, D]`, gate and up `[E, F, D]`, down `[E, D, F]`.

    Attributes:
      experts: E.
      chosen: experts of each token; their probabilities are those of a softmax over the chosen.
      width: F of new leaves; leaves that exist have their own.
      activation: of the gate.
      initializer: of router, up and gate.
      out_initializer: of down.
      policy: dtypes; the router is float32 whatever it says.
    """

    experts: int
    chosen: int
    width: int
    activation: Callable[[Array], Array]
    initializer: Initializer
    out_initializer: Initializer
    policy: ops.Policy

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], real: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, ""]]]:
        """Returns the mixed outputs, and `load_balance`, the loss of `load_balance` below.

        Args:
          x: normed activations.
          real: true for tokens; padding is sent to no expert and gives zeros. None where all are tokens.
        """
        width = x.shape[-1]
        router = leaf(self, "router", self.initializer, (self.experts, width))
        wide = dataclasses.replace(self.policy, compute="float32", stream="float32")
        scores = ops.einsum("BTD,ED->BTE", x, router, wide).reshape(-1, self.experts)
        real = None if real is None else real.reshape(-1)
        best, expert = jax.lax.top_k(scores, self.chosen)
        weights = jax.nn.softmax(best, axis=-1)
        if real is not None:
            expert = jnp.where(real[:, None], expert, self.experts)  # behind all others, where rows are of no group
            weights = jnp.where(real[:, None], weights, 0.0)
        flat = expert.reshape(-1)
        order = jnp.argsort(flat)  # stable, so that a token's place does not depend on later ones of its expert
        sizes = jnp.bincount(flat, length=self.experts)
        rows = x.reshape(-1, width)[order // self.chosen]
        y = self._expert(rows, sizes)[jnp.argsort(order)].reshape(-1, self.chosen, width)
        mixed = jnp.sum(y.astype(jnp.float32) * weights[..., None], axis=1).astype(self.policy.stream)
        return mixed.reshape(x.shape), {"load_balance": load_balance(scores, sizes, real)}

    def _expert(self, rows: Float[Array, "N D"], sizes: Int[Array, " E"]) -> Float[Array, "N D"]:
        """The feed-forward part of each row's expert."""
        shape = (self.experts, self.width, rows.shape[-1])
        fused = fused_key(self.variables.get("params", {}), ("gate", "up"))
        run: Callable[[Any], Array] = lambda w: ops.ragged(rows, w, sizes, self.policy)
        if fused is None:
            gate, up = (run(leaf(self, name, self.initializer, shape)) for name in ("gate", "up"))
        else:
            gate, up = cut(run(leaf(self, fused, self.initializer, shape)), fused)
        hidden = self.activation(gate) * up
        down = leaf(self, "down", self.out_initializer, (self.experts, rows.shape[-1], hidden.shape[-1]))
        return ops.ragged(hidden, down, sizes, self.policy)


def load_balance(scores: Float[Array, "N E"], sizes: Int[Array, " E"], real: Bool[Array, " N"] | None = None) -> Float[Array, ""]:
    """`E sum_e f_e p_e` (Switch: Fedus et al., 2022): f_e the rows that expert e was given for each token, p_e its mean
    probability. It is the number of chosen experts where all are used alike, and more the less they are.

    Args:
      scores: of the router.
      sizes: rows of each expert; no gradient comes from here.
      real: true for tokens; None where all are.
    """
    ones = jnp.ones(scores.shape[0], jnp.float32) if real is None else real.astype(jnp.float32)
    tokens = jnp.maximum(jnp.sum(ones), 1.0)
    probability = jnp.sum(jax.nn.softmax(scores, axis=-1) * ones[:, None], axis=0) / tokens
    return scores.shape[1] * jnp.sum(sizes.astype(jnp.float32) / tokens * probability)


def real_tokens(inputs: Mapping[str, Array]) -> Bool[Array, "B T"] | None:
    """True for what is not padding, by `mask` and `segments`; None where there are neither."""
    found = [inputs[name].astype(jnp.bool_) for name in ("mask", "segments") if name in inputs]
    return functools.reduce(jnp.logical_and, found) if found else None
