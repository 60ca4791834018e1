"""Parts that the encoders share: a block without a cache, and heads for one vector per row."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodel import ops, tree
from jaxmodel.layers.attention import Attention
from jaxmodel.layers.cross import CrossAttention
from jaxmodel.layers.leaf import leaf
from jaxmodel.layers.linear import linear
from jaxmodel.layers.mlp import MLP
from jaxmodel.layers.norm import LayerNorm
from jaxmodel.ops.norms import on_last


def _quick_gelu(x: Array) -> Array:
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": _quick_gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
"""Activation functions by name.

They are GELU (Hendrycks & Gimpel, 2016), its approximations by tanh and by a sigmoid, ReLU, and
SiLU (Swish).
"""

BLOCK_AXES = (
    ("(.*/)?blocks/.*/attn/(q|k|v)", "(Kh)D"),
    ("(.*/)?blocks/.*/attn/o", "D(Kh)"),
    (tree.optional("(.*/)?blocks/.*/attn/(q|k|v)_bias"), "(Kh)"),
    (tree.optional("(.*/)?blocks/.*/attn/o_bias"), "D"),
    ("(.*/)?blocks/.*/mlp/(gate|up)", "FD"),
    ("(.*/)?blocks/.*/mlp/down", "DF"),
    (tree.optional("(.*/)?blocks/.*/mlp/(gate|up)_bias"), "F"),
    (tree.optional("(.*/)?blocks/.*/mlp/down_bias"), "D"),
    (".*norm/(weight|bias)", "D"),
)
"""The axes (see `jaxmodel.axes`) of attention, a feed-forward part, and norms over the width."""


class EncoderBlock(nn.Module):
    """Attention, then a feed-forward part, each with a residual connection and a layer norm.

    Leaves: attn, mlp, attn_norm, mlp_norm. The norm comes before each part, or after each sum
    (`post_norm`: Vaswani et al., 2017; BERT).

    Attributes:
      heads: H of new leaves, which divide D.
      mlp_width: F of new leaves.
      activation: a name of `ACTIVATIONS`.
      norm_eps: added to the variance by the layer norms.
      post_norm: whether the norms come after each sum.
      init_scale: standard deviation of new weights.
      out_scale: standard deviation of new weights that write to the residual stream.
      policy: dtypes and placement.
      qkv_bias: whether q, k and v have biases.
      layer_scale: whether the result of each part is multiplied by the leaves attn_scale and
        mlp_scale `[D]`.
      gated: whether the feed-forward part has a gate.
    """

    heads: int
    mlp_width: int
    activation: str
    norm_eps: float
    post_norm: bool
    init_scale: float
    out_scale: float
    policy: ops.Policy
    qkv_bias: bool = True
    layer_scale: bool = False
    gated: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], context: dict[str, Any]) -> Float[Array, "B T D"]:
        """Return the activations after the block.

        Args:
          x: activations.
          context: has `seen`, which positions see which.
        """
        normal = nn.initializers.normal(self.init_scale)
        out = nn.initializers.normal(self.out_scale)
        width = x.shape[-1] // self.heads
        attention = Attention(
            self.heads,
            self.heads,
            width,
            self.qkv_bias,
            normal,
            out,
            self.policy,
            out_bias=True,
            name="attn",
        )
        mix = lambda y: attention(y, context, None, 0)[0]
        mlp = MLP(
            self.mlp_width,
            ACTIVATIONS[self.activation],
            self.gated,
            True,
            normal,
            out,
            self.policy,
            name="mlp",
        )
        attn_norm, mlp_norm = (
            LayerNorm(self.norm_eps, name=name) for name in ("attn_norm", "mlp_norm")
        )

        def scaled(part: str, y: Array) -> Array:
            if not self.layer_scale:
                return y
            return y * on_last(
                leaf(self, f"{part}_scale", nn.initializers.ones, y.shape[-1:]).astype(y.dtype),
                y.ndim,
            )

        if self.post_norm:
            x = attn_norm(x + scaled("attn", mix(x)))
            return mlp_norm(x + scaled("mlp", mlp(x)))
        x = x + scaled("attn", mix(attn_norm(x)))
        return x + scaled("mlp", mlp(mlp_norm(x)))


class AttentionPool(nn.Module):
    """One vector for all positions: attention of a learnt query, then a feed-forward part.

    Leaves: query `[D]`, attn (as `CrossAttention` has them), norm, mlp (Lee et al., 2019).

    Attributes:
      heads: H of new leaves, which divide D.
      mlp_width: F of new leaves.
      activation: a name of `ACTIVATIONS`.
      norm_eps: added to the variance by the layer norm.
      init_scale: standard deviation of new weights.
      policy: dtypes and placement.
    """

    heads: int
    mlp_width: int
    activation: str
    norm_eps: float
    init_scale: float
    policy: ops.Policy

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        """Return one vector for each row."""
        normal = nn.initializers.normal(self.init_scale)
        width = x.shape[-1]
        policy = self.policy
        query = on_last(leaf(self, "query", normal, (width,)).astype(x.dtype), x.ndim)
        attention = CrossAttention(
            self.heads, width // self.heads, True, normal, normal, policy, name="attn"
        )
        given = {"memory": x, "memory_mask": jnp.ones(x.shape[:2], jnp.bool_)}
        y = attention(jnp.broadcast_to(query, (x.shape[0], 1, width)), given, None, 0)[0]
        mlp = MLP(
            self.mlp_width,
            ACTIVATIONS[self.activation],
            False,
            True,
            normal,
            normal,
            policy,
            name="mlp",
        )
        return (y + mlp(LayerNorm(self.norm_eps, name="norm")(y)))[:, 0]


class PooledHead(nn.Module):
    """A head from one vector of each row to float32 logits.

    It is a dense layer with an activation (if `pool`), then a linear map to classes (if there are
    any). Leaves: pool `[D, D]` and pool_bias, classes `[C, D]` and classes_bias.

    Attributes:
      pool: whether there is a dense layer.
      classes: C of new leaves; 0 to return the vector itself.
      init_scale: standard deviation of new weights.
      policy: dtypes and placement.
      activation: the activation after the dense layer.
    """

    pool: bool
    classes: int
    init_scale: float
    policy: ops.Policy
    activation: Callable[[Array], Array] = jnp.tanh

    @nn.compact
    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B C"]:
        """Return the logits, or the vector if there are no classes."""
        wide = dataclasses.replace(self.policy, activation_dtype="float32")
        normal = nn.initializers.normal(self.init_scale)
        y = x[:, None].astype(jnp.float32)
        if self.pool:
            y = self.activation(linear(self, y, {"pool": y.shape[-1]}, normal, True, wide)[0])
        if self.classes:
            y = linear(self, y, {"classes": self.classes}, normal, True, wide)[0]
        return y[:, 0]
