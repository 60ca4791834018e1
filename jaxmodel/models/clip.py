"""CLIP (Radford et al., 2021): an image tower and a text tower with a shared space.

The image tower is a vision transformer with a norm after its positions. The text tower is a causal
transformer that is read at the token that ends the text. Each has a linear map to the shared space;
logits are scaled cosine similarities of images and texts.

In SigLIP (Zhai et al., 2023) each pair is a yes-or-no decision: logits have a bias, and a sigmoid
turns them into probabilities. Its text tower is bidirectional and is read at the last position: pad
texts to the whole context with the tokenizer's padding token, and give no mask (for SigLIP 2 lower
the case yourself; its tokenizer files do not). Its image tower pools by attention, into the shared
space without a map.

>>> clip = model(SIZES["tiny"])
>>> params = jax.jit(clip.init)(jax.random.key(0))
>>> inputs = {"tokens": jnp.zeros((2, 8), jnp.int32), "pixels": jnp.zeros((2, 16, 16, 3))}
>>> jax.jit(clip.apply)(params, inputs).logits.shape
(2, 2)
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxmodel import ops, tree
from jaxmodel.axes import Axes
from jaxmodel.errors import InputError, one_of
from jaxmodel.layers import ACTIVATIONS, BLOCK_AXES, LayerNorm, init_layers, repeat
from jaxmodel.layers.encoder import EncoderBlock
from jaxmodel.layers.feeds import block_feeds
from jaxmodel.layers.fuse import GROUPS
from jaxmodel.models import vit
from jaxmodel.models.checks import check_inputs
from jaxmodel.models.family import family
from jaxmodel.models.model import Model, check_sizes, unpadded
from jaxmodel.models.parts import Parts, encoder_layer
from jaxmodel.ops.norms import on_last
from jaxmodel.ops.probe import every_row


@dataclasses.dataclass(frozen=True)
class Text:
    """The text tower.

    Attributes:
      vocab: the size V of the vocabulary.
      width: the model width D.
      depth: the number of layers L.
      heads: the number of heads H, a divisor of D.
      mlp_width: the feed-forward width F.
      context: the longest sequence, which is the number of learnt positions.
      end: the token at whose first occurrence a text is read; None for the largest token id (the
        first CLIP's files, and SigLIP, which reads the last position).
      activation: a name of `layers.ACTIVATIONS`.
      norm_eps: added to the variance by the layer norms.
      init_scale: the standard deviation of new weights.
    """

    vocab: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    context: int
    end: int | None = None
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    init_scale: float = 0.02

    def __post_init__(self) -> None:
        check_sizes(self, ("vocab", "width", "depth", "heads", "mlp_width", "context"))
        if self.width % self.heads:
            raise InputError(
                f"heads: {self.heads} given; allowed: a divisor of the width {self.width}"
            )
        one_of("activation", self.activation, ACTIVATIONS)


@dataclasses.dataclass(frozen=True)
class Config:
    """The two towers and what joins them.

    Attributes:
      text: the text tower.
      image: the image tower, without classes.
      shared: the width E of the shared space.
      scale: the initial logarithm of the factor of the cosines.
      sigmoid: whether the model is a SigLIP.
      bias: the initial bias of the logits of a SigLIP.
    """

    text: Text
    image: vit.Config
    shared: int
    scale: float = 2.6592
    sigmoid: bool = False
    bias: float = -10.0

    def __post_init__(self) -> None:
        check_sizes(self, ("shared",))
        if self.sigmoid and self.shared != self.image.width:
            raise InputError(
                f"shared: {self.shared} given; a SigLIP needs {self.image.width}, the width of "
                f"its image tower"
            )
        if self.image.labels:
            raise InputError(
                f"image.labels: {len(self.image.labels)} given; the image tower has no classes, "
                f"leave them out"
            )

    @property
    def vocab(self) -> int:
        """The vocabulary size of the text tower."""
        return self.text.vocab


_IMAGE: dict[str, Any] = {
    "activation": "quick_gelu",
    "patch_bias": False,
    "embed_norm": True,
    "norm_eps": 1e-5,
}

_SIGLIP: dict[str, Any] = {"activation": "gelu_tanh", "norm_eps": 1e-6}
SIGLIP_SCALE = math.log(10)
_PAIRS: dict[str, Any] = {"scale": SIGLIP_SCALE, "sigmoid": True}


def _siglip(
    width: int, depth: int, heads: int, mlp: int, image: int, patch: int, vocab: int = 32000
) -> Config:
    """Return a SigLIP with two towers of the same size."""
    tower = vit.Config(image, patch, width, depth, heads, mlp, pool="attention", **_SIGLIP)
    return Config(Text(vocab, width, depth, heads, mlp, 64, **_SIGLIP), tower, width, **_PAIRS)


SIZES = {
    "tiny": Config(Text(256, 32, 2, 4, 64, 32), vit.Config(16, 4, 64, 3, 4, 64, **_IMAGE), 4),
    "tiny-siglip": Config(
        Text(256, 32, 2, 4, 64, 32, **_SIGLIP),
        vit.Config(16, 8, 48, 3, 4, 64, pool="attention", **_SIGLIP),
        48,
        **_PAIRS,
    ),
    "clip-base-32": Config(
        Text(49408, 512, 12, 8, 2048, 77), vit.Config(224, 32, 768, 12, 12, 3072, **_IMAGE), 512
    ),
    "clip-base-16": Config(
        Text(49408, 512, 12, 8, 2048, 77), vit.Config(224, 16, 768, 12, 12, 3072, **_IMAGE), 512
    ),
    "clip-large-14": Config(
        Text(49408, 768, 12, 12, 3072, 77), vit.Config(224, 14, 1024, 24, 16, 4096, **_IMAGE), 768
    ),
    "siglip-base-16": _siglip(768, 12, 12, 3072, 224, 16),
    "siglip-large-16": _siglip(1024, 24, 16, 4096, 256, 16),
    "siglip-so400m-14": _siglip(1152, 27, 16, 4304, 384, 14),
    "siglip2-base-16": _siglip(768, 12, 12, 3072, 224, 16, 256000),
}


def axes(config: Config) -> Axes:
    """Return the axes of the leaves.

    `D0` is the width of the text tower, `D1` that of the image tower (and of a SigLIP's space).
    """
    tables = (("embed", "VD table"), ("positions", "tD table"))
    text = Axes(
        (*tables, *BLOCK_AXES),
        (("h", config.text.width // config.text.heads),),
        feeds=block_feeds(up=config.text.activation == "relu"),
    ).under("text", 0)
    image = vit.axes(config.image).under("image", 1)
    if config.sigmoid:
        own = (
            ("text_map", "D1D0", P("tensor", "fsdp")),
            ("text_map_bias", "D1"),
            ("scale|bias", ""),
        )
    else:
        own = (("text_map", "PD0"), ("image_map", "PD1"), ("scale", ""))
    plain = config.image.pool != "attention" and not config.image.pool_dense
    return Axes(
        (*text.rules, *image.rules, *own),
        (*text.sizes, *image.sizes),
        fused=GROUPS,
        feeds=(
            *text.feeds,
            *image.feeds,
            ("text/norm/(weight|bias)", "text_map"),
            *([("image/norm/(weight|bias)", "image_map")] if plain else ()),
        ),
        norm_mean=True,
    )


class Towers(NamedTuple):
    """The parts of a model as separate functions.

    They compare many texts with many images, or classify images by the names of classes.
    image(params, pixels) -> `[N, E]` and text(params, {"tokens": [M, T], "mask"}) -> `[M, E]`
    return float32 rows of length one; logits(params, image, text) -> `[N, M]` are their scaled
    products.
    """

    image: Any
    text: Any
    logits: Any


@functools.cache
def towers(config: Config, policy: ops.Policy = ops.Policy()) -> Towers:
    """Return the towers of one config; equal arguments give the same functions."""
    wide = dataclasses.replace(policy, compute_dtype="float32", activation_dtype="float32")
    image_model = vit.model(config.image, policy)
    norm_module = LayerNorm(config.text.norm_eps)
    block_module = _text_block(config.text, policy)

    def image(params: tree.Params, pixels: Float[Array, "N Y X C"]) -> Float[Array, "N E"]:
        pooled = image_model.apply(every_row(params["image"]), pixels).logits
        return _unit(
            pooled
            if config.sigmoid
            else ops.einsum("ND,ED->NE", pooled, params["image_map"], policy)
        )

    def text(params: tree.Params, inputs: dict[str, jax.Array]) -> Float[Array, "M E"]:
        tokens = inputs["tokens"]
        check_inputs(unpadded(inputs), None, config.text.vocab)
        own = params["text"]
        if tokens.shape[1] > config.text.context:
            raise InputError(
                f"tokens: {tokens.shape[1]} of a text given; allowed: at most "
                f"{config.text.context}, the context"
            )
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        x = ops.embed(own["embed"], tokens, policy) + ops.embed(
            own["positions"], positions, policy, "SD"
        )
        context = {"seen": ops.AttentionMask(valid=inputs.get("mask"), causal=not config.sigmoid)}
        how = policy.remat, policy.microbatches, policy.unroll
        x = repeat(encoder_layer(block_module), own["blocks"], x, context, None, None, False, *how)[
            0
        ]
        normed: Any = norm_module.apply({"params": own["norm"]}, x)
        if config.sigmoid:
            mapped = ops.einsum("ND,ED->NE", normed[:, -1], params["text_map"], policy)
            return _unit(mapped + on_last(params["text_map_bias"].astype(mapped.dtype), 2))
        end = config.text.end
        last = jnp.argmax(tokens if end is None else tokens == end, axis=1)
        pooled = jnp.take_along_axis(normed, last[:, None, None], axis=1)[:, 0]
        return _unit(ops.einsum("ND,ED->NE", pooled, params["text_map"], policy))

    def logits(
        params: tree.Params, image: Float[Array, "N E"], text: Float[Array, "M E"]
    ) -> Float[Array, "N M"]:
        scaled = jnp.exp(params["scale"].astype(jnp.float32)) * ops.einsum(
            "NE,ME->NM", image, text, wide
        )
        return scaled + params["bias"].astype(jnp.float32) if config.sigmoid else scaled

    return Towers(image, text, logits)


def _text_block(text: Text, policy: ops.Policy) -> EncoderBlock:
    out = text.init_scale / (2 * text.depth) ** 0.5
    return EncoderBlock(
        *(
            text.heads,
            text.mlp_width,
            text.activation,
            text.norm_eps,
            False,
            text.init_scale,
            out,
            policy,
        )
    )


def _unit(x: Float[Array, "N E"]) -> Float[Array, "N E"]:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


@family(Config, SIZES)
def model(config: Config, policy: ops.Policy = ops.Policy()) -> Model:
    """Return the model of one config.

    Equal arguments give the same functions, so nothing is traced twice.

    Inputs are `tokens` `[B, T]` (and `mask`) and `pixels` `[B, Y, X, C]`. `hidden` is `[B, 2, E]`,
    the vectors of an image and its text; logits are `[B, B]`, a row for each image. For unequal
    numbers of texts and images use `towers`.
    """
    own = towers(config, policy)
    image_model = vit.model(config.image, policy)
    block_module = _text_block(config.text, policy)
    norm_module = LayerNorm(config.text.norm_eps)

    # both stacks run in `embed`, because the part `block` is for one stack
    def embed(
        params: tree.Params,
        inputs: dict[str, jax.Array],
        cache: Any = None,
        rng: Any = None,
        train: bool = False,
    ) -> tuple[jax.Array, dict[str, Any]]:
        return jnp.stack(
            [own.image(params, inputs["pixels"]), own.text(params, inputs)], axis=1
        ), {}

    def head(params: tree.Params, x: jax.Array, rng: Any = None, train: bool = False) -> jax.Array:
        return own.logits(params, x[:, 0], x[:, 1])

    def init(key: jax.Array) -> tree.Params:
        c = config.text
        keys = jax.random.split(key, 7)
        x = jnp.zeros((1, 1, c.width), policy.activation_dtype)
        context = {"seen": ops.AttentionMask()}
        shared = config.shared
        normal = lambda key, *shape: c.init_scale * jax.random.normal(key, shape)
        text = {
            "embed": normal(keys[0], c.vocab, c.width),
            "positions": normal(keys[1], c.context, c.width) / 2,
            "blocks": init_layers(
                lambda k: dict(block_module.init(k, x, context)["params"]), keys[2], c.depth
            ),
            "norm": norm_module.init(keys[3], x)["params"],
        }
        of_image: tree.Params = {
            "image_map": config.image.width**-0.5
            * jax.random.normal(keys[5], (shared, config.image.width))
        }
        if config.sigmoid:
            of_image = {
                "text_map_bias": jnp.zeros(shared),
                "bias": jnp.full((), config.bias, jnp.float32),
            }
        return {
            "image": image_model.init(keys[4]),
            "text": text,
            "text_map": c.width**-0.5 * jax.random.normal(keys[6], (shared, c.width)),
            "scale": jnp.full((), config.scale, jnp.float32),
            **of_image,
        }

    def inputs(batch: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            "tokens": jax.ShapeDtypeStruct((batch, length), jnp.int32),
            **image_model.inputs(batch, length),
        }

    return Model(config, policy, init, Parts(embed, None, head), inputs, None, axes(config))
