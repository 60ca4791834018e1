"""Self-attention with grouped heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from jaxmodel import ops
from jaxmodel.layers.leaf import leaf
from jaxmodel.layers.linear import Initializer, linear
from jaxmodel.ops.norms import on_last
from jaxmodel.sharding import constrain


class Attention(nn.Module):
    """Self-attention with grouped heads.

    Leaves: q `[H*h, D]`, k and v `[K*h, D]`, o `[D, H*h]`, optionally biases, and optionally q_norm
    and k_norm weights `[h]`.

    Attributes:
      heads: the number of query heads H of new leaves; existing leaves have their own.
      kv_heads: the number of key heads K.
      width: the width h of a head.
      bias: whether q, k and v have biases.
      initializer: the initialiser of q, k and v.
      out_initializer: the initialiser of o.
      policy: dtypes and placement.
      out_bias: whether o has a bias; None for the same as `bias`.
      qk_norm: the RMS norm of each head's queries and keys (Henry et al., 2020), or None.
      scale: the factor of the scores; None for `1 / sqrt(h)`.
      softcap: the soft cap of the scores; see `ops.attention`.
      wide_norm: whether `qk_norm` is over all heads together, with weights `[H*h]` and `[K*h]`
        (OLMo 2, 2024).
      sinks: whether each head has an extra score that takes part in the softmax but has no value:
        the leaf sinks `[H]` (gpt-oss, 2025).
    """

    heads: int
    kv_heads: int
    width: int
    bias: bool
    initializer: Initializer
    out_initializer: Initializer
    policy: ops.Policy
    out_bias: bool | None = None
    qk_norm: Callable[..., nn.Module] | None = None
    scale: float | None = None
    softcap: float | None = None
    wide_norm: bool = False
    sinks: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: dict[str, Any],
        cache: Any,
        layer: jax.Array | int,
        window: Any = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Return the mixed activations, and the cache with this layer written.

        Args:
          x: the normalised activations.
          context: values that are computed once for all layers: `seen` if there is no cache, and,
            if the model has them, `rope` tables and a `bias` `[#B, H, T, S]` of the scores.
          cache: see `ops.KVCache`, or None.
          layer: the index of the layer in the cache.
          window: see `ops.AttentionMask`.
        """
        outputs = {
            "q": self.heads * self.width,
            "k": self.kv_heads * self.width,
            "v": self.kv_heads * self.width,
        }
        flat = linear(self, x, outputs, self.initializer, self.bias, self.policy)
        if self.qk_norm is not None and self.wide_norm:
            flat = [
                self.qk_norm(name="q_norm")(flat[0]),
                self.qk_norm(name="k_norm")(flat[1]),
                flat[2],
            ]
        q, k, v = (y.reshape(*y.shape[:2], -1, self.width) for y in flat)
        q, k, v = (
            constrain(y, f"BT{n}h", self.policy.axes) for y, n in ((q, "H"), (k, "K"), (v, "K"))
        )
        if self.qk_norm is not None and not self.wide_norm:
            q = self.qk_norm(name="q_norm")(q)
            k = self.qk_norm(name="k_norm")(k)
        if "rope" in context:
            q = ops.rotate(q, context["rope"])
            k = ops.rotate(k, context["rope"])
        if cache is None:
            seen = context["seen"]
            k = k.transpose(0, 2, 1, 3)
            v = v.transpose(0, 2, 1, 3)
        else:
            k, v, seen, cache = cache.update(layer, k, v)
        if window is not None:
            seen = dataclasses.replace(seen, window=window)
        bias = context.get("bias")
        sinks = leaf(self, "sinks", self.initializer, (self.heads,)) if self.sinks else None
        how: dict[str, Any] = {
            "scale": self.scale,
            "softcap": self.softcap,
            "bias": bias,
            "sinks": sinks,
        }
        mixed = ops.attention(q, k, v, seen, self.policy, **how)
        o = leaf(self, "o", self.out_initializer, (x.shape[-1], mixed.shape[2] * self.width))
        y = ops.einsum("BTHh,D(Hh)->BTD", mixed, o, self.policy)
        if self.bias if self.out_bias is None else self.out_bias:
            y = y + on_last(
                leaf(self, "o_bias", nn.initializers.zeros, y.shape[-1:]).astype(y.dtype), y.ndim
            )
        return y, cache
