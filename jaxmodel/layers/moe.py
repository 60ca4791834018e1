"""A mixture of experts in place of the feed-forward part."""

from __future__ import annotations

import dataclasses
import functools
import math
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
from jaxmodel.ops.norms import on_last
from jaxmodel.sharding import auto_axes, axes_of


class MoE(nn.Module):
    """`sum_k p_k down_k(act(gate_k x) * up_k x)` over the experts k that a router chooses for each
    token (Shazeer et al., 2017; Mixtral: Jiang et al., 2024). No token is dropped: the rows of all
    tokens are sorted by expert, however many each has.

    Leaves router `[E, D]`, gate and up `[E, F, D]`, down `[E, D, F]`.

    Attributes:
      experts: E of new leaves; leaves that exist have their own.
      chosen: experts of each token; their probabilities are those of a softmax over the chosen, or
        over all (`normed`).
      width: F of new leaves; leaves that exist have their own.
      activation: of the gate.
      initializer: of router, up and gate.
      out_initializer: of down.
      policy: dtypes; the router is float32 whatever it says.
      normed: whether the probabilities of the chosen sum to one.
      gated: what is made of gate and up, in place of `activation(gate) * up`.
      bias: whether all maps have biases, the router too: router_bias `[E]`, gate_bias and up_bias
        `[E, F]`, down_bias `[E, D]`.
    """

    experts: int
    chosen: int
    width: int
    activation: Callable[[Array], Array]
    initializer: Initializer
    out_initializer: Initializer
    policy: ops.Policy
    normed: bool = True
    gated: Callable[[Array, Array], Array] | None = None
    bias: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], real: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, ""]]]:
        """Returns the mixed outputs, and `load_balance`, the loss of `load_balance` below.

        Args:
          x: normed activations.
          real: true for tokens; padding is sent to no expert and gives zeros. None where all are
            tokens.
        """
        router = leaf(self, "router", self.initializer, (self.experts, x.shape[-1]))
        wide = dataclasses.replace(self.policy, compute="float32", stream="float32")
        scores = ops.einsum("BTD,ED->BTE", x, router, wide)
        if self.bias:
            of_router = leaf(self, "router_bias", nn.initializers.zeros, (self.experts,))
            scores = scores + on_last(of_router.astype(jnp.float32), 3)
        real = jnp.ones(x.shape[:2], jnp.bool_) if real is None else real
        mixed, expert = expert_parallel(
            self._choose, self._mixed, x, scores, real, self._leaves(x.shape[-1]), self.policy
        )
        each = on_last(jnp.arange(scores.shape[-1], dtype=expert.dtype), 4)
        sizes = jnp.sum(expert[..., None] == each, axis=(0, 1, 2))
        return mixed, {"load_balance": load_balance(scores, sizes, real)}

    def _choose(
        self, scores: Float[Array, "B T E"], real: Bool[Array, "B T"]
    ) -> tuple[Int[Array, "B T n"], Float[Array, "B T n"]]:
        """The experts of each token and their weights; padding is sent behind all others, where
        rows are of no group.
        """
        best, expert = jax.lax.top_k(scores, self.chosen)
        whole = best if self.normed else scores
        weights = jnp.exp(best - jax.nn.logsumexp(whole, axis=-1, keepdims=True))
        return jnp.where(real[..., None], expert, scores.shape[-1]), jnp.where(
            real[..., None], weights, 0.0
        )

    def _mixed(
        self,
        x: Float[Array, "B T D"],
        expert: Int[Array, "B T n"],
        weights: Float[Array, "B T n"],
        leaves: dict[str, Any],
    ) -> Float[Array, "B T D"]:
        """What those experts whose leaves are given say, in float32; what is sent to others is
        zero.
        """
        width = x.shape[-1]
        flat = expert.reshape(-1)
        # stable, so that a token's place does not depend on later ones of its expert
        order = jnp.argsort(flat)
        sizes = jnp.bincount(flat, length=leaves["down"].shape[0])
        rows = x.reshape(-1, width)[order // self.chosen]
        y = self._expert(rows, sizes, leaves)[jnp.argsort(order)].reshape(-1, self.chosen, width)
        return jnp.sum(y.astype(jnp.float32) * weights.reshape(-1, self.chosen, 1), axis=1).reshape(
            x.shape
        )

    def _leaves(self, width: int) -> dict[str, Any]:
        """Those of the feed-forward parts, by name."""
        fused = fused_key(self.variables.get("params", {}), ("gate", "up"))
        names = ("gate", "up") if fused is None else (fused,)
        leaves = {
            name: leaf(self, name, self.initializer, (self.experts, self.width, width))
            for name in names
        }
        inner = leaves["gate"].shape[1] if fused is None else leaves[fused].shape[1] // 2
        leaves["down"] = leaf(self, "down", self.out_initializer, (self.experts, width, inner))
        for name in tuple(leaves) if self.bias else ():
            key = f"{name}_bias"
            shape = (self.experts, leaves[name].shape[1])
            leaves[key] = leaf(self, key, nn.initializers.zeros, shape)
        return leaves

    def _expert(
        self, rows: Float[Array, "N D"], sizes: Int[Array, " E"], leaves: dict[str, Any]
    ) -> Float[Array, "N D"]:
        """The feed-forward part of each row's expert."""
        group = jnp.searchsorted(
            jnp.cumsum(sizes), jnp.arange(rows.shape[0], dtype=sizes.dtype), side="right"
        )
        group = jnp.minimum(group, sizes.shape[0] - 1)[None].astype(jnp.int32)

        def run(x: Array, name: str) -> Array:
            y = ops.ragged(x, leaves[name], sizes, self.policy)
            if not self.bias:
                return y
            return y + ops.take(
                leaves[f"{name}_bias"], group, dataclasses.replace(self.policy, axes=())
            )[0].astype(y.dtype)

        fused = fused_key([name for name in leaves if not name.endswith("_bias")], ("gate", "up"))
        gate, up = (
            (run(rows, "gate"), run(rows, "up")) if fused is None else cut(run(rows, fused), fused)
        )
        return run(
            self.activation(gate) * up if self.gated is None else self.gated(gate, up), "down"
        )


def expert_parallel(
    choose: Callable[..., tuple[Array, Array]],
    mixed: Callable[..., Array],
    x: Float[Array, "B T D"],
    scores: Float[Array, "B T E"],
    real: Bool[Array, "B T"],
    leaves: dict[str, Any],
    policy: ops.Policy,
) -> tuple[Float[Array, "B T D"], Int[Array, "B T n"]]:
    """`mixed(x, *choose(scores, real), leaves)`, each device with its own tokens and, on a mesh
    with `expert`, its own experts.

    Tokens lie along `expert` too. The devices of such a group gather theirs, each runs its own
    experts on all of them, and the sums are scattered back to where the tokens came from: exact,
    whatever the router chooses, with shapes that are known. (Sending each token to its experts only
    is less where they are few and used alike, but then either tokens are dropped or every device
    must have room for all of them.) Along other axes nothing is sent: each device sorts its own
    tokens.

    Bytes on each device, of the N tokens of a group: forward an all-gather of `N D` in
    `policy.stream` with `8 N n` for the choice and its weights, and a reduce-scatter of `4 N D`;
    backward the reverse of both, and `4 N n` for the weights' gradient.

    Args:
      choose: of scores and what is real, the experts of each token (E for none) and their weights,
        float32.
      mixed: of tokens, their experts and weights, and the leaves of some experts, in float32.
      x: tokens.
      scores: of the router.
      real: true for tokens.
      leaves: `[E, ., .]` each.
      policy: `axes` says how tokens lie on the mesh.

    Returns:
      The result, in `policy.stream`, and the experts of each token.
    """
    sizes = auto_axes()
    rows = axes_of("B", policy.axes)
    positions = axes_of("T", policy.axes)
    experts = scores.shape[-1]
    n = sizes.get("expert", 1)
    lie = math.prod(sizes[name] for name in rows), math.prod(sizes[name] for name in positions)

    def own(x: Array, scores: Array, real: Array, leaves: dict[str, Any]) -> tuple[Array, Array]:
        expert, weights = choose(scores, real)
        return mixed(x, expert, weights, leaves).astype(policy.stream), expert

    def of_group(
        x: Array, scores: Array, real: Array, leaves: dict[str, Any]
    ) -> tuple[Array, Array]:
        chosen, weights = choose(scores, real)
        x, expert, weights = (
            jax.lax.all_gather(a, "expert", axis=0, tiled=True) for a in (x, chosen, weights)
        )
        here = experts // n
        place = expert - here * jax.lax.axis_index("expert").astype(expert.dtype)
        is_here = (place >= 0) & (place < here)
        part = mixed(x, jnp.where(is_here, place, here), jnp.where(is_here, weights, 0.0), leaves)
        return jax.lax.psum_scatter(part, "expert", scatter_dimension=0, tiled=True).astype(
            policy.stream
        ), chosen

    fits = (
        x.shape[0] % lie[0] == 0
        and x.shape[1] % lie[1] == 0
        and experts % n == 0
        and (n == 1 or "expert" in rows)
    )
    if lie == (1, 1) or not fits:
        return own(x, scores, real, leaves)
    tokens = jax.P(rows or None, positions or None)
    first = jax.P("expert" if n > 1 else None)
    specs = {
        name: w.specs(first, sizes) if hasattr(w, "specs") else first for name, w in leaves.items()
    }
    run = jax.shard_map(
        own if n == 1 else of_group,
        in_specs=(tokens, tokens, tokens, specs),
        out_specs=(tokens, tokens),
        axis_names={*rows, *positions},
        check_vma=False,
    )
    return run(x, scores, real, leaves)


def load_balance(
    scores: Float[Array, "*N E"], sizes: Int[Array, " E"], real: Bool[Array, "*N"] | None = None
) -> Float[Array, ""]:
    """`E sum_e f_e p_e` (Switch: Fedus et al., 2022): f_e the rows that expert e was given for each
    token, p_e its mean probability. It is the number of chosen experts where all are used alike,
    and more the less they are.

    Args:
      scores: of the router.
      sizes: rows of each expert; no gradient comes from here.
      real: true for tokens; None where all are.
    """
    ones = jnp.ones(scores.shape[:-1], jnp.float32) if real is None else real.astype(jnp.float32)
    tokens = jnp.maximum(jnp.sum(ones), 1.0)
    probability = (
        jnp.sum(jax.nn.softmax(scores, axis=-1) * ones[..., None], axis=tuple(range(ones.ndim)))
        / tokens
    )
    return scores.shape[-1] * jnp.sum(sizes.astype(jnp.float32) / tokens * probability)


def real_tokens(inputs: Mapping[str, Array]) -> Bool[Array, "B T"] | None:
    """True for what is not padding, by `mask` and `segments`; None where there are neither."""
    found = [inputs[name].astype(jnp.bool_) for name in ("mask", "segments") if name in inputs]
    return functools.reduce(jnp.logical_and, found) if found else None
