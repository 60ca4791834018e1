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
from jaxmodel.leaves import decode
from jaxmodel.ops.norms import on_last
from jaxmodel.sharding import auto_axes, axes_of


class MoE(nn.Module):
    """A mixture of experts `sum_k p_k down_k(act(gate_k x) * up_k x)`.

    The sum is over the experts k that a router chooses for each token.

    A router chooses the experts (Shazeer et al., 2017; Mixtral: Jiang et al., 2024). No token is
    dropped: the rows of all tokens are sorted by expert, however many each expert gets. An expert
    whose row of the router is zero is chosen for none, as if it were not there (unless all are).
    Leaves: router `[E, D]`, gate and up `[E, F, D]`, down `[E, D, F]`.

    Attributes:
      experts: E of new leaves; existing leaves have their own.
      chosen: the number of experts of each token.
      width: F of new leaves; existing leaves have their own.
      activation: the activation of the gate.
      initializer: the initialiser of router, up and gate.
      out_initializer: the initialiser of down.
      policy: dtypes; the router is always float32.
      normed: whether the softmax is over the chosen experts, so that their probabilities sum to
        one, rather than over all.
      gated: a function of gate and up that replaces `activation(gate) * up`.
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
        """Return the mixed outputs, and the loss `load_balance` (see the function below).

        Args:
          x: the normalised activations.
          real: True for tokens; padding is sent to no expert and its output is zero. None if all
            are tokens.
        """
        router = leaf(self, "router", self.initializer, (self.experts, x.shape[-1]))
        wide = dataclasses.replace(self.policy, compute_dtype="float32", activation_dtype="float32")
        scores = ops.einsum("BTD,ED->BTE", x, router, wide)
        gone = _zero_rows(router)
        if self.bias:
            of_router = leaf(self, "router_bias", nn.initializers.zeros, (self.experts,))
            scores = scores + on_last(of_router.astype(jnp.float32), 3)
            gone = gone & (of_router == 0)
        scores = jnp.where(on_last(gone & ~jnp.all(gone), 3), -jnp.inf, scores)
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
        """Return the experts of each token and their weights.

        Padding is sent to the index after the last expert, which is not a group.
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
        """Return the mixed outputs of the experts whose leaves are given, in float32.

        Tokens that are sent to other experts contribute zero.
        """
        width = x.shape[-1]
        flat = expert.reshape(-1)
        # stable, so that a token's position does not depend on later tokens of its expert
        order = jnp.argsort(flat)
        sizes = jnp.bincount(flat, length=leaves["down"].shape[0])
        rows = x.reshape(-1, width)[order // self.chosen]
        y = self._expert(rows, sizes, leaves)[jnp.argsort(order)].reshape(-1, self.chosen, width)
        return jnp.sum(y.astype(jnp.float32) * weights.reshape(-1, self.chosen, 1), axis=1).reshape(
            x.shape
        )

    def _leaves(self, width: int) -> dict[str, Any]:
        """Return the leaves of the feed-forward parts, by name."""
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
        """Run the feed-forward part of each row's expert."""
        group = jnp.searchsorted(
            jnp.cumsum(sizes), jnp.arange(rows.shape[0], dtype=sizes.dtype), side="right"
        )
        group = jnp.minimum(group, sizes.shape[0] - 1)[None].astype(jnp.int32)

        def run(x: Array, name: str) -> Array:
            y = ops.ragged(x, leaves[name], sizes, self.policy)
            if not self.bias:
                return y
            return y + ops.embed(
                leaves[f"{name}_bias"], group, dataclasses.replace(self.policy, axes=())
            )[0].astype(y.dtype)

        fused = fused_key([name for name in leaves if not name.endswith("_bias")], ("gate", "up"))
        gate, up = (
            (run(rows, "gate"), run(rows, "up")) if fused is None else cut(run(rows, fused), fused)
        )
        return run(
            self.activation(gate) * up if self.gated is None else self.gated(gate, up), "down"
        )


def _zero_rows(router: Any) -> Bool[Array, " E"]:
    weight = router.weight if isinstance(router, ops.Probe) else router
    return jnp.all(decode(weight) == 0, axis=-1)


def expert_parallel(
    choose: Callable[..., tuple[Array, Array]],
    mixed: Callable[..., Array],
    x: Float[Array, "B T D"],
    scores: Float[Array, "B T E"],
    real: Bool[Array, "B T"],
    leaves: dict[str, Any],
    policy: ops.Policy,
) -> tuple[Float[Array, "B T D"], Int[Array, "B T n"]]:
    """Run `mixed(x, *choose(scores, real), leaves)` on the tokens and experts of each device.

    Tokens are split along the mesh axis `expert` too. The devices of such a group gather their
    tokens, each runs its own experts on all of them, and the sums are scattered back to the devices
    that the tokens came from. This is exact, whatever the router chooses, and has static shapes.
    (Sending each token only to its experts moves less if they are few and used equally, but then
    either tokens are dropped or every device must have room for all of them.) Along other axes
    nothing is sent: each device sorts its own tokens.

    Bytes on each device, for the N tokens of a group: forward an all-gather of `N D` in
    `policy.activation_dtype` with `8 N n` for the choice and its weights, and a reduce-scatter of
    `4 N D`;
    backward the reverse of both, and `4 N n` for the gradient of the weights.

    Args:
      choose: a function (scores, real) -> the experts of each token (E for none) and their
        weights, float32.
      mixed: a function (tokens, experts, weights, leaves of some experts) -> outputs, float32.
      x: the activations of the tokens.
      scores: the scores of the router.
      real: True for tokens, False for padding.
      leaves: the leaves of the experts, `[E, ., .]` each.
      policy: `axes` says how tokens are placed on the mesh.

    Returns:
      The outputs, in `policy.activation_dtype`, and the experts of each token.
    """
    sizes = auto_axes()
    rows = axes_of("B", policy.axes)
    positions = axes_of("T", policy.axes)
    experts = scores.shape[-1]
    n = sizes.get("expert", 1)
    lie = math.prod(sizes[name] for name in rows), math.prod(sizes[name] for name in positions)

    def own(x: Array, scores: Array, real: Array, leaves: dict[str, Any]) -> tuple[Array, Array]:
        expert, weights = choose(scores, real)
        return mixed(x, expert, weights, leaves).astype(policy.activation_dtype), expert

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
            policy.activation_dtype
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
    """Compute the load-balancing loss `E sum_e f_e p_e` (Switch: Fedus et al., 2022).

    f_e is the number of rows of expert e per token, p_e its mean probability. The loss equals the
    number of chosen experts if all are used equally, and is larger otherwise.

    Args:
      scores: the scores of the router.
      sizes: the number of rows of each expert; it has no gradient.
      real: True for tokens, False for padding; None if all are tokens.
    """
    ones = jnp.ones(scores.shape[:-1], jnp.float32) if real is None else real.astype(jnp.float32)
    tokens = jnp.maximum(jnp.sum(ones), 1.0)
    probability = (
        jnp.sum(jax.nn.softmax(scores, axis=-1) * ones[..., None], axis=tuple(range(ones.ndim)))
        / tokens
    )
    return scores.shape[-1] * jnp.sum(sizes.astype(jnp.float32) / tokens * probability)


def real_tokens(inputs: Mapping[str, Array]) -> Bool[Array, "B T"] | None:
    """Return what is not padding, by `mask` and `segments`; None if there are neither."""
    found = [inputs[name].astype(jnp.bool_) for name in ("mask", "segments") if name in inputs]
    return functools.reduce(jnp.logical_and, found) if found else None
