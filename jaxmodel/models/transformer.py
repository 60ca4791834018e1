"""The Transformer (Vaswani et al., 2017): an encoder and a decoder with sinusoidal positions.

One embedding serves all three tables. As in the paper, a norm follows each sum; `pre_norm` puts it
before each part (Xiong et al., 2020), and one after each stack.

>>> transformer = model(SIZES["tiny"])
>>> params = jax.jit(transformer.init)(jax.random.key(0))
>>> source, tokens = jnp.zeros((2, 8), jnp.int32), jnp.zeros((2, 5), jnp.int32)
>>> jax.jit(transformer.apply)(params, {"source": source, "tokens": tokens}).logits.shape
(2, 5, 256)
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmodel import ops, tree
from jaxmodel.axes import Axes
from jaxmodel.errors import InputError
from jaxmodel.layers import BLOCK_AXES, MLP, Attention, LayerNorm, dropout, init_layers, repeat
from jaxmodel.layers.cross import CrossAttention
from jaxmodel.layers.feeds import CROSS_VALUES, block_feeds
from jaxmodel.layers.fuse import GROUPS
from jaxmodel.models.family import family
from jaxmodel.models.model import Model, check_sizes
from jaxmodel.models.parts import Parts
from jaxmodel.models.seq2seq import block_of, source_context, source_inputs
from jaxmodel.ops.memory import CrossAttentionCache
from jaxmodel.ops.norms import on_last


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a member of the family.

    Attributes:
      vocab: the size V of the vocabulary of source and target, which share the embedding.
      width: the model width D, an even number.
      encoder_depth: the number of layers of the encoder.
      depth: the number of layers L of the decoder.
      heads: the number of heads H, a divisor of D.
      mlp_width: the feed-forward width F.
      pre_norm: whether norms come before the parts.
      attn_bias: whether the maps of attention have biases (not in the paper, but in most programs).
      dropout: the dropout rate of what each part adds, and of the embeddings.
      norm_eps: added to the variance by the layer norms.
      start: the token that a target begins with.
      context: the longest source or target that the model was made for.
      embed_scale: the factor of the embedding; None for `width ** 0.5`.
    """

    vocab: int
    width: int
    encoder_depth: int
    depth: int
    heads: int
    mlp_width: int
    pre_norm: bool = False
    attn_bias: bool = False
    dropout: float = 0.0
    norm_eps: float = 1e-5
    start: int = 0
    context: int = 512
    embed_scale: float | None = None

    def __post_init__(self) -> None:
        check_sizes(
            self, ("vocab", "width", "encoder_depth", "depth", "heads", "mlp_width", "context")
        )
        if self.width % self.heads or self.width % 2:
            raise InputError(
                f"width, heads: {self.width}, {self.heads} given; allowed: an even width that the "
                f"heads divide"
            )

    @property
    def scale(self) -> float:
        """The factor of the embedding."""
        return self.width**0.5 if self.embed_scale is None else self.embed_scale


SIZES = {
    "tiny": Config(256, 32, 2, 2, 4, 64),
    "tiny-pre": Config(256, 32, 1, 3, 4, 64, pre_norm=True, attn_bias=True),
    "base": Config(37000, 512, 6, 6, 8, 2048, dropout=0.1),
    "big": Config(37000, 1024, 6, 6, 16, 4096, dropout=0.3),
}


def axes(config: Config) -> Axes:
    """Return the axes of the leaves.

    `H` are the heads that read the source; `D` is ordered, since the positions are fixed waves.
    """
    cross = (
        ("blocks/.*/cross/(q|memory_k|memory_v)", "(Hh)D"),
        ("blocks/.*/cross/o", "D(Hh)"),
        (tree.optional("blocks/.*/cross/(q|memory_k|memory_v)_bias"), "(Hh)"),
        (tree.optional("blocks/.*/cross/o_bias"), "D"),
    )
    rules = (("embed", "VD table"), *BLOCK_AXES, *cross)
    sizes = (("h", config.width // config.heads),)
    norms = (
        (r"(blocks/\d+)/cross_norm/(weight|bias)", r"\1/cross/q"),
        ("encoder/norm/(weight|bias)", r"blocks/\d+/cross/memory_(k|v)"),
    )
    return Axes(
        rules,
        sizes,
        ordered=("V", "D"),
        fused=GROUPS,
        feeds=(
            *block_feeds(norms_before=config.pre_norm, up=True),
            *CROSS_VALUES,
            *(norms if config.pre_norm else ()),
        ),
        norm_mean=True,
    )


class _Block(nn.Module):
    config: Config
    policy: ops.Policy
    reads: bool  # whether it reads a memory: a layer of the decoder

    @nn.compact
    def __call__(
        self, x: jax.Array, context: dict[str, Any], cache: Any, layer: Any, rng: Any = None
    ) -> tuple[jax.Array, Any]:
        c = self.config
        fan = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", in_axis=-1, out_axis=-2)
        width = c.width // c.heads

        def ready(part: str, x: jax.Array) -> jax.Array:
            return LayerNorm(c.norm_eps, name=f"{part}_norm")(x) if c.pre_norm else x

        def add(part: str, x: jax.Array, y: jax.Array) -> jax.Array:
            x = x + dropout(y, c.dropout, rng, part)
            return x if c.pre_norm else LayerNorm(c.norm_eps, name=f"{part}_norm")(x)

        mix = Attention(c.heads, c.heads, width, c.attn_bias, fan, fan, self.policy, name="attn")
        y, cache = mix(ready("attn", x), context, cache, layer)
        x = add("attn", x, y)
        if self.reads:
            read = CrossAttention(c.heads, width, c.attn_bias, fan, fan, self.policy, name="cross")
            y, cache = read(ready("cross", x), context, cache, layer)
            x = add("cross", x, y)
        mlp = MLP(c.mlp_width, nn.relu, False, True, fan, fan, self.policy, name="mlp")
        return add("mlp", x, mlp(ready("mlp", x))), cache


def sinusoids(positions: Int[Array, "B T"], width: int) -> Float[Array, "B T D"]:
    """Compute `sin(p / 10000^(2i/D))` at the channels 2i, and the cosine at 2i + 1."""
    steps = jnp.arange(0, width, 2, dtype=jnp.float32)
    rates = jnp.exp(steps * (-math.log(10000.0) / width))
    angles = positions[..., None].astype(jnp.float32) * on_last(rates, 3)
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*positions.shape, width)


@family(Config, SIZES)
def model(config: Config, policy: ops.Policy = ops.Policy()) -> Model:
    """Return the model of one config.

    Equal arguments give the same functions, so nothing is traced twice.
    """
    encoder_module = _Block(config, policy, False)
    block_module = _Block(config, policy, True)
    norm_module = LayerNorm(config.norm_eps)
    wide = dataclasses.replace(policy, activation_dtype="float32")

    def normed(params: tree.Params, x: jax.Array) -> jax.Array:
        """Normalise the output of a stack of layers that do not end in a norm."""
        if not config.pre_norm:
            return x
        y = norm_module.apply({"params": params["norm"]}, x)
        assert isinstance(y, jax.Array)
        return y

    def placed(
        params: tree.Params, tokens: jax.Array, positions: jax.Array, rng: Any, name: str
    ) -> jax.Array:
        x = ops.embed(params["embed"], tokens, wide) * config.scale + sinusoids(
            positions, config.width
        )
        return dropout(x.astype(policy.activation_dtype), config.dropout, rng, name)

    def embed(
        params: tree.Params,
        inputs: dict[str, jax.Array],
        cache: Any = None,
        rng: Any = None,
        train: bool = False,
    ) -> tuple[jax.Array, dict[str, Any]]:
        drop = rng if train else None

        def encode(source: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
            context = {"seen": ops.AttentionMask(valid=mask, causal=False)}
            x = placed(
                params, source, jnp.arange(source.shape[1], dtype=jnp.int32)[None], drop, "source"
            )
            blocks = params["encoder"]["blocks"]
            how = policy.remat, policy.microbatches, policy.unroll
            x, _, _ = repeat(block_of(encoder_module), blocks, x, context, None, rng, train, *how)
            return {"memory": normed(params["encoder"], x)}

        positions, context = source_context(inputs, cache, encode)
        return placed(params, inputs["tokens"], positions, drop, "tokens"), context

    def head(params: tree.Params, x: jax.Array, rng: Any = None, train: bool = False) -> jax.Array:
        return ops.einsum("BTD,VD->BTV", normed(params, x), params["embed"], wide)

    def init(key: jax.Array) -> tree.Params:
        embed_key, encoder_key, decoder_key = jax.random.split(key, 3)
        x = jnp.zeros((1, 1, config.width), policy.activation_dtype)
        context = {
            "seen": ops.AttentionMask(),
            "memory": x,
            "memory_mask": jnp.ones((1, 1), jnp.bool_),
        }
        blocks = lambda module, k, n: init_layers(
            lambda k: dict(module.init(k, x, context, None, 0)["params"]), k, n
        )
        norm = {"norm": norm_module.init(key, x)["params"]} if config.pre_norm else {}
        return {
            "embed": config.width**-0.5
            * jax.random.normal(embed_key, (config.vocab, config.width)),
            "encoder": {
                "blocks": blocks(encoder_module, encoder_key, config.encoder_depth),
                **norm,
            },
            "blocks": blocks(block_module, decoder_key, config.depth),
            **norm,
        }

    def init_cache(batch: int, capacity: int) -> CrossAttentionCache:
        return CrossAttentionCache.zeros(
            config.depth, batch, config.heads, capacity, config.width // config.heads, policy
        )

    return Model(
        config,
        policy,
        init,
        Parts(embed, block_of(block_module), head),
        source_inputs,
        init_cache,
        axes(config),
    )
