"""Vision transformer (Dosovitskiy et al., 2020): the patches of an image are tokens.

A norm precedes each part. DINOv2 (Oquab et al., 2023) scales what each part adds, classifies by the
class token and the mean of the patches, and reads images of any size.

>>> vit = model(SIZES["tiny"])
>>> params = jax.jit(vit.init)(jax.random.key(0))
>>> jax.jit(vit.apply)(params, jnp.zeros((2, 16, 16, 3))).logits.shape
(2, 10)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxmodel import ops, tree
from jaxmodel.axes import Axes
from jaxmodel.errors import InputError, one_of
from jaxmodel.layers import ACTIVATIONS, BLOCK_AXES, LayerNorm, init_layers
from jaxmodel.layers.encoder import AttentionPool, EncoderBlock, PooledHead
from jaxmodel.layers.feeds import block_feeds
from jaxmodel.layers.fuse import GROUPS
from jaxmodel.layers.patches import Patches
from jaxmodel.models.family import family
from jaxmodel.models.model import Model, check_sizes
from jaxmodel.models.parts import Parts, encoder_layer

POOLS = ("class", "mean", "both", "attention")


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a member of the family.

    Attributes:
      image: the side of the (square) images in pixels.
      patch: the side of a patch; the rest of an image that fills no patch is not read.
      width: the model width D.
      depth: the number of layers L.
      heads: the number of heads H, a divisor of D.
      mlp_width: the feed-forward width F.
      labels: the names of the classes; () for a model whose `apply` returns the pooled vector
        `[B, D]`.
      channels: the number of channels of the images.
      pool: what represents the image: "class", a separate token; "mean" of the patches (Zhai et
        al., 2021); "both", concatenated; or "attention" of a learnt query to the patches and a
        feed-forward part (Lee et al., 2019; SigLIP).
      pool_dense: whether a dense layer with tanh follows.
      activation: a name of `layers.ACTIVATIONS`.
      qkv_bias: whether q, k and v have biases.
      patch_bias: whether the map of the patches has a bias.
      embed_norm: whether a norm follows the positions (CLIP).
      norm_eps: added to the variance by the layer norms.
      init_scale: the standard deviation of new weights.
      problem: the meaning of the logits, named as HF's `problem_type`; see `predict_fn`.
      layer_scale: whether each component of a part's result has a learnt factor (Touvron et al.,
        2021).
      any_size: whether images of other sizes are read, with interpolated positions.
      gated: whether the feed-forward part has a gate (DINOv2's giant one).
    """

    image: int
    patch: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    labels: tuple[str, ...] = ()
    channels: int = 3
    pool: str = "class"
    pool_dense: bool = False
    activation: str = "gelu"
    qkv_bias: bool = True
    patch_bias: bool = True
    embed_norm: bool = False
    norm_eps: float = 1e-12
    init_scale: float = 0.02
    problem: str = ""
    layer_scale: bool = False
    any_size: bool = False
    gated: bool = False

    def __post_init__(self) -> None:
        check_sizes(self, ("image", "patch", "width", "depth", "heads", "mlp_width", "channels"))
        if self.patch > self.image:
            raise InputError(
                f"patch: {self.patch} given; allowed: at most the image's {self.image} pixels"
            )
        if self.width % self.heads:
            raise InputError(
                f"heads: {self.heads} given; allowed: a divisor of the width {self.width}"
            )
        one_of("pool", self.pool, POOLS)
        one_of("activation", self.activation, ACTIVATIONS)


def numbered(count: int) -> tuple[str, ...]:
    """Return labels for classes without names.

    >>> numbered(2)
    ('LABEL_0', 'LABEL_1')
    """
    return tuple(f"LABEL_{i}" for i in range(count))


_DINO: dict[str, Any] = {"layer_scale": True, "any_size": True, "norm_eps": 1e-6}

SIZES = {
    "tiny": Config(16, 4, 32, 3, 4, 64, numbered(10)),
    "tiny-mean": Config(
        16,
        4,
        32,
        3,
        4,
        64,
        numbered(10),
        1,
        "mean",
        qkv_bias=False,
        patch_bias=False,
        embed_norm=True,
    ),
    "tiny-dino": Config(16, 4, 32, 3, 4, 64, numbered(10), pool="both", gated=True, **_DINO),
    "tiny-features": Config(16, 8, 48, 3, 4, 64, pool_dense=True),
    "tiny-attention": Config(16, 8, 48, 3, 4, 64, pool="attention"),
    "vit-base-16": Config(224, 16, 768, 12, 12, 3072, numbered(1000)),
    "vit-large-16": Config(224, 16, 1024, 24, 16, 4096, numbered(1000)),
    "dinov2-small": Config(518, 14, 384, 12, 6, 1536, **_DINO),
    "dinov2-base": Config(518, 14, 768, 12, 12, 3072, **_DINO),
    "dinov2-large": Config(518, 14, 1024, 24, 16, 4096, **_DINO),
    "dinov2-giant": Config(518, 14, 1536, 40, 24, 4096, activation="silu", gated=True, **_DINO),
}


def axes(config: Config) -> Axes:
    """Return the axes of the leaves."""
    pooled = "[D+D]" if config.pool == "both" else "D"
    last = "F0" if config.pool_dense else pooled
    return Axes(
        (
            ("embed/patch", "Dp", P("tensor", "fsdp")),
            (tree.optional("embed/(patch_bias|class)"), "D"),
            ("embed/positions", "tD table"),
            *BLOCK_AXES,
            (tree.optional("attention_pool/query"), "D"),
            (tree.optional("attention_pool/attn/(q|memory_k|memory_v)"), "(Hh)D"),
            (tree.optional("attention_pool/attn/(q|memory_k|memory_v)_bias"), "(Hh)"),
            (tree.optional("attention_pool/attn/o"), "D(Hh)"),
            (tree.optional("attention_pool/mlp/up"), "FD"),
            (tree.optional("attention_pool/mlp/up_bias"), "F"),
            (tree.optional("attention_pool/mlp/down"), "DF"),
            (tree.optional("attention_pool/(attn/o|mlp/down)_bias"), "D"),
            (tree.optional("blocks/.*/(attn|mlp)_scale"), "D"),
            (tree.optional("head/pool"), f"F0{pooled}"),
            (tree.optional("head/pool_bias"), "F0"),
            (tree.optional("head/classes"), f"c{last}"),
            (tree.optional("head/classes_bias"), "c"),
        ),
        sizes=(("h", config.width // config.heads),),
        ordered=("V",) if config.labels else ("V", "F0" if config.pool_dense else "D"),
        fused=GROUPS,
        feeds=(
            *block_feeds(up=config.gated or config.activation == "relu"),
            ("attention_pool/attn/memory_v(_bias)?", "attention_pool/attn/o"),
            ("attention_pool/norm/(weight|bias)", "attention_pool/mlp/up"),
            ("norm/(weight|bias)", _reads_last(config)),
        ),
        norm_mean=True,
    )


def _reads_last(config: Config) -> str:
    """Return the pattern of the leaves that read the last norm."""
    if config.pool == "attention":
        return "attention_pool/attn/memory_(k|v)"
    return "head/pool" if config.pool_dense else "head/classes"


class _Head(nn.Module):
    config: Config
    policy: ops.Policy

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        x = LayerNorm(c.norm_eps, name="norm")(x)
        if c.pool == "attention":
            sizes = c.heads, c.mlp_width, c.activation, c.norm_eps, c.init_scale
            pooled = AttentionPool(*sizes, self.policy, name="attention_pool")(x)
        else:
            patches = x[:, 1:] if c.pool == "both" else x
            pooled = x[:, 0] if c.pool == "class" else jnp.mean(patches.astype(jnp.float32), axis=1)
            pooled = (
                jnp.concatenate([x[:, 0].astype(jnp.float32), pooled], axis=-1)
                if c.pool == "both"
                else pooled
            )
        return PooledHead(c.pool_dense, len(c.labels), c.init_scale, self.policy, name="head")(
            pooled
        )


class _Embed(nn.Module):
    config: Config
    policy: ops.Policy

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        c = self.config
        sizes = c.width, c.patch, c.image // c.patch
        x = Patches(
            *sizes,
            c.pool in ("class", "both"),
            c.patch_bias,
            c.init_scale,
            self.policy,
            name="embed",
        )(pixels)
        return LayerNorm(c.norm_eps, name="embed_norm")(x) if c.embed_norm else x


@family(Config, SIZES)
def model(config: Config, policy: ops.Policy = ops.Policy()) -> Model:
    """Return the model of one config.

    Equal arguments give the same functions, so nothing is traced twice.

    The input is `pixels` `[B, Y, X, C]`, float32, normalised as the model's images were.
    """
    c = config
    embed_module = _Embed(config, policy)
    head_module = _Head(config, policy)
    block_module = EncoderBlock(
        *(
            c.heads,
            c.mlp_width,
            c.activation,
            c.norm_eps,
            False,
            c.init_scale,
            c.init_scale / (2 * c.depth) ** 0.5,
            policy,
        ),
        qkv_bias=c.qkv_bias,
        layer_scale=c.layer_scale,
        gated=c.gated,
    )
    context = {"seen": ops.AttentionMask(causal=False)}

    def embed(
        params: tree.Params,
        inputs: dict[str, jax.Array],
        cache: Any = None,
        rng: Any = None,
        train: bool = False,
    ) -> tuple[jax.Array, dict[str, Any]]:
        pixels = inputs["pixels"]
        right = pixels.ndim == 4 and pixels.shape[3] == c.channels
        sides = pixels.shape[1:3] if right else ()
        if not right or (min(sides) < c.patch if c.any_size else sides != (c.image, c.image)):
            sides = f"Y, X of at least {c.patch}" if c.any_size else f"{c.image}, {c.image}"
            raise InputError(
                f"pixels: the shape {pixels.shape} given; allowed: [B, {sides}, {c.channels}]"
            )
        own = {name: params[name] for name in ("embed", "embed_norm") if name in params}
        x: Any = embed_module.apply({"params": own}, pixels)
        return x, dict(context)

    def head(params: tree.Params, x: jax.Array, rng: Any = None, train: bool = False) -> jax.Array:
        own = {name: params[name] for name in ("norm", "attention_pool", "head") if name in params}
        logits: Any = head_module.apply({"params": own}, x)
        return logits

    def init(key: jax.Array) -> tree.Params:
        embed_key, blocks_key, head_key = jax.random.split(key, 3)
        x = jnp.zeros((1, 1, c.width), policy.activation_dtype)
        first = embed_module.init(embed_key, jnp.zeros((1, c.image, c.image, c.channels)))["params"]
        blocks = init_layers(
            lambda k: dict(block_module.init(k, x, context)["params"]), blocks_key, c.depth
        )
        return {**first, "blocks": blocks, **head_module.init(head_key, x)["params"]}

    def inputs(batch: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {"pixels": jax.ShapeDtypeStruct((batch, c.image, c.image, c.channels), jnp.float32)}

    return Model(
        config,
        policy,
        init,
        Parts(embed, encoder_layer(block_module), head),
        inputs,
        None,
        axes(config),
    )


def features(model: Model, params: tree.Params, pixels: jax.Array) -> jax.Array:
    """Return the normalised activations of the last layer for each token.

    They are the patch features of DINOv2 (Oquab et al., 2023).

    Args:
      model: a model of this family.
      params: its parameters.
      pixels: float32 `[B, Y, X, C]`, normalised as the model's images were.

    Returns:
      `[B, T, D]`: first the class token, if the config has one, then the patches row by row.

    >>> small = model(SIZES["tiny"])
    >>> params = jax.jit(small.init)(jax.random.key(0))
    >>> features(small, params, jnp.zeros((2, 16, 16, 3))).shape  # a class token and 4 x 4 patches
    (2, 17, 32)
    """
    if model.family != "vit":
        raise InputError(f"model: one of the family {model.family!r} given; allowed: vit")
    hidden = model.hidden(params, {"pixels": pixels}).hidden
    normed: Any = LayerNorm(model.config.norm_eps).apply({"params": params["norm"]}, hidden)
    return normed
