"""GPT-2 (Radford et al., 2019) and the sizes of GPT-3.

Layer norm precedes each part; positions are learnt, there are biases, and the head
is tied unless the config says otherwise.

>>> gpt2 = model(SIZES["tiny"])
>>> params = jax.jit(gpt2.init)(jax.random.key(0))
>>> jax.jit(gpt2.apply)(params, jnp.zeros((2, 8), jnp.int32)).logits.shape
(2, 8, 256)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodel import ops, tree
from jaxmodel.axes import Axes
from jaxmodel.errors import InputError, at_least, one_of
from jaxmodel.layers import ACTIVATIONS, BLOCK_AXES, MLP, Attention, LayerNorm, init_layers
from jaxmodel.layers.feeds import block_feeds
from jaxmodel.layers.fuse import GROUPS
from jaxmodel.models.family import family
from jaxmodel.models.model import Model, check_sizes, decoder_context, token_inputs
from jaxmodel.models.parts import Parts


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a member of the family.

    Attributes:
      vocab: the size V of the vocabulary.
      width: the model width D.
      depth: the number of layers L.
      heads: the number of heads H, a divisor of D.
      context: the longest sequence, which is the number of learnt positions.
      norm_eps: added to the variance by the layer norms.
      init_scale: the standard deviation of new weights.
      activation: the activation of the feed-forward part, a name of `layers.ACTIVATIONS`.
      mlp_width: F; 0 for four times the width.
      tied: whether the head reads the embedding.
    """

    vocab: int
    width: int
    depth: int
    heads: int
    context: int
    norm_eps: float = 1e-5
    init_scale: float = 0.02
    activation: str = "gelu_tanh"
    mlp_width: int = 0
    tied: bool = True

    def __post_init__(self) -> None:
        check_sizes(self, ("vocab", "width", "depth", "heads", "context"))
        if self.width % self.heads:
            raise InputError(
                f"heads: {self.heads} given; allowed: a divisor of the width {self.width}"
            )
        one_of("activation", self.activation, ACTIVATIONS)
        at_least("mlp_width", self.mlp_width, 0)


SIZES = {
    "tiny": Config(256, 32, 3, 4, 128),
    "gpt2": Config(50257, 768, 12, 12, 1024),
    "gpt2-medium": Config(50257, 1024, 24, 16, 1024),
    "gpt2-large": Config(50257, 1280, 36, 20, 1024),
    "gpt2-xl": Config(50257, 1600, 48, 25, 1024),
    # GPT-3 (Brown et al., 2020), with full attention in every layer. Where the paper's table has a
    # width that its heads do not divide (XL, 13B), the width or the heads are adjusted.
    "gpt3-small": Config(50257, 768, 12, 12, 2048),
    "gpt3-medium": Config(50257, 1024, 24, 16, 2048),
    "gpt3-large": Config(50257, 1536, 24, 16, 2048),
    "gpt3-xl": Config(50257, 2048, 24, 16, 2048),
    "gpt3-2.7b": Config(50257, 2560, 32, 32, 2048),
    "gpt3-6.7b": Config(50257, 4096, 32, 32, 2048),
    "gpt3-13b": Config(50257, 5120, 40, 40, 2048),
    "gpt3-175b": Config(50257, 12288, 96, 96, 2048),
}


def axes(config: Config) -> Axes:
    """Return the axes of the leaves."""
    tables = (("embed", "VD table"), ("positions", "tD table"))
    head = (tree.optional("head"), "VD")
    return Axes(
        (*tables, head, *BLOCK_AXES),
        (("h", config.width // config.heads),),
        fused=GROUPS,
        feeds=(*block_feeds(up=config.activation == "relu"), ("norm/(weight|bias)", "head")),
        norm_mean=True,
    )


class _Block(nn.Module):
    config: Config
    policy: ops.Policy

    @nn.compact
    def __call__(
        self, x: jax.Array, context: dict[str, Any], cache: Any, layer: Any
    ) -> tuple[jax.Array, Any]:
        c = self.config
        normal = nn.initializers.normal(c.init_scale)
        out = nn.initializers.normal(c.init_scale / (2 * c.depth) ** 0.5)
        mix = Attention(
            c.heads, c.heads, c.width // c.heads, True, normal, out, self.policy, name="attn"
        )
        mlp = MLP(
            c.mlp_width or 4 * c.width,
            ACTIVATIONS[c.activation],
            False,
            True,
            normal,
            out,
            self.policy,
            name="mlp",
        )
        y, cache = mix(LayerNorm(c.norm_eps, name="attn_norm")(x), context, cache, layer)
        x = x + y
        return x + mlp(LayerNorm(c.norm_eps, name="mlp_norm")(x)), cache


@family(Config, SIZES)
def model(config: Config, policy: ops.Policy = ops.Policy()) -> Model:
    """Return the model of one config.

    Equal arguments give the same functions, so nothing is traced twice.
    """
    block_module = _Block(config, policy)
    norm_module = LayerNorm(config.norm_eps)
    wide = dataclasses.replace(policy, activation_dtype="float32")

    def embed(
        params: tree.Params,
        inputs: dict[str, jax.Array],
        cache: Any = None,
        rng: Any = None,
        train: bool = False,
    ) -> tuple[jax.Array, dict[str, Any]]:
        positions, context = decoder_context(inputs, cache)
        x = ops.embed(params["embed"], inputs["tokens"], policy) + ops.embed(
            params["positions"], positions, policy, "SD"
        )
        return x, context

    def block(
        params: Any,
        x: Any,
        context: Any,
        cache: Any = None,
        layer: Any = 0,
        rng: Any = None,
        train: bool = False,
    ):
        x, cache = block_module.apply({"params": params}, x, context, cache, layer)
        return x, cache, {}

    def head(params: tree.Params, x: jax.Array, rng: Any = None, train: bool = False) -> jax.Array:
        normed = norm_module.apply({"params": params["norm"]}, x)
        assert isinstance(normed, jax.Array)
        table = params["head"] if "head" in params else params["embed"]
        return ops.einsum("BTD,VD->BTV", normed, table, wide)

    def init(key: jax.Array) -> tree.Params:
        embed_key, position_key, blocks_key, head_key = jax.random.split(key, 4)
        x = jnp.zeros((1, 1, config.width), policy.activation_dtype)
        tokens = {"tokens": jnp.zeros((1, 1), jnp.int32)}
        params: tree.Params = {
            "embed": config.init_scale * jax.random.normal(embed_key, (config.vocab, config.width)),
            "positions": config.init_scale
            / 2
            * jax.random.normal(position_key, (config.context, config.width)),
            "norm": norm_module.init(head_key, x)["params"],
        }
        if not config.tied:
            shape = config.vocab, config.width
            params["head"] = config.init_scale * jax.random.normal(head_key, shape)
        context = embed(params, tokens)[1]
        blocks = init_layers(
            lambda k: dict(block_module.init(k, x, context, None, 0)["params"]),
            blocks_key,
            config.depth,
        )
        return {**params, "blocks": blocks}

    def init_cache(batch: int, capacity: int) -> ops.KVCache:
        return ops.KVCache.zeros(
            config.depth, batch, config.heads, capacity, config.width // config.heads, policy
        )

    return Model(
        config, policy, init, Parts(embed, block, head), token_inputs, init_cache, axes(config)
    )
