"""ModernBERT (Warner et al., 2024): an encoder of long texts.

It has a head for masked tokens, for classes, or for embeddings; rotary positions, local attention
in most layers (with another base of the rotation), a gated feed-forward part, norms before each
part (for the first layer's attention it is the embedding's norm), and, unless the config says
otherwise, no biases except those of the last map.

>>> modernbert = model(SIZES["tiny"])
>>> params = jax.jit(modernbert.init)(jax.random.key(0))
>>> jax.jit(modernbert.apply)(params, jnp.zeros((2, 8), jnp.int32)).logits.shape
(2, 8, 256)
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
from jaxmodel.layers import (
    ACTIVATIONS,
    BLOCK_AXES,
    MLP,
    Attention,
    LayerNorm,
    init_layers,
    leaf,
    linear,
)
from jaxmodel.layers.feeds import block_feeds
from jaxmodel.layers.fuse import GROUPS
from jaxmodel.models.family import family
from jaxmodel.models.model import Model, check_sizes, encoder_sees, positions_of, token_inputs
from jaxmodel.models.parts import Parts, Windowed
from jaxmodel.models.sentences import check_pooling, pool
from jaxmodel.ops.norms import on_last

HEADS = ("mlm", "classify", "embed")
POOLS = ("class", "mean")
_POOLINGS = {"class": "cls", "mean": "mean"}


@dataclasses.dataclass(frozen=True)
class Config(Windowed):
    """The sizes of a member of the family.

    Attributes:
      vocab: the size V of the vocabulary.
      width: the model width D.
      depth: the number of layers L.
      heads: the number of heads H, a divisor of D.
      mlp_width: the feed-forward width F.
      context: the longest sequence that the model was made for.
      head: what `apply` returns: "mlm", logits `[B, T, V]` of every token; "classify", logits
        `[B, C]`; "embed", one vector `[B, D]` pooled from the last activations.
      labels: the names of the classes, for the head "classify".
      pool: what the head "classify" reads: "class", the first token, or "mean" of all.
      windows: the attention windows, used by the layers in turn: a token is seen at a smaller
        distance than this; 0 for all tokens.
      rope_base: the base of the rotary frequencies in layers that see all tokens.
      local_rope_base: the base in other layers.
      activation: the activation of the gate, a name of `layers.ACTIVATIONS`.
      head_activation: the activation of the heads.
      norm_eps: added to the variance by the layer norms.
      init_scale: the standard deviation of new weights.
      pooling: how the head "embed" pools a text: names of `sentences.POOLINGS`, whose results are
        concatenated.
      attention_bias: whether q, k, v and o have biases.
      mlp_bias: whether gate, up and down have biases.
      norm_bias: whether the norms have biases.
      head_bias: whether the dense layer of the heads has a bias.
      vocab_bias: whether the logits of tokens have a bias.
      tied: whether the logits of the head "mlm" are by the embedding; else by a table of its own.
    """

    vocab: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    context: int
    head: str = "mlm"
    labels: tuple[str, ...] = ()
    pool: str = "class"
    windows: tuple[int, ...] = (0, 65, 65)
    rope_base: float = 160000.0
    local_rope_base: float = 10000.0
    activation: str = "gelu"
    head_activation: str = "gelu"
    norm_eps: float = 1e-5
    init_scale: float = 0.02
    pooling: tuple[str, ...] = ("mean",)
    attention_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False
    head_bias: bool = False
    vocab_bias: bool = True
    tied: bool = True

    def __post_init__(self) -> None:
        check_sizes(self, ("vocab", "width", "depth", "heads", "mlp_width", "context"))
        check_pooling(self.pooling)
        if self.width % (2 * self.heads):
            raise InputError(
                f"heads: {self.heads} given; allowed: a divisor of half the width {self.width}"
            )
        self.check_windows()
        for name, allowed in {
            "head": HEADS,
            "pool": POOLS,
            "activation": ACTIVATIONS,
            "head_activation": ACTIVATIONS,
        }.items():
            one_of(name, getattr(self, name), allowed)
        if bool(self.labels) != (self.head == "classify"):
            needed = "at least one" if self.head == "classify" else "none"
            raise InputError(
                f"labels: {len(self.labels)} given; the head {self.head!r} needs {needed}"
            )


SIZES = {
    "tiny": Config(256, 32, 3, 4, 64, 128, windows=(0, 3)),
    "tiny-classify": Config(
        *(256, 48, 3, 4, 64, 128, "classify", ("no", "yes", "maybe", "never"), "mean", (0, 3)),
        **dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias", "head_bias"), True),
    ),
    "tiny-embed": Config(256, 32, 3, 4, 64, 128, "embed", windows=(0, 3)),
    "modernbert-base": Config(50368, 768, 22, 12, 1152, 8192),
    "modernbert-large": Config(50368, 1024, 28, 16, 2624, 8192),
}


def axes(config: Config) -> Axes:
    """Return the axes of the leaves."""
    heads = {
        "mlm": (
            ("head/dense", "DD", P("tensor", "fsdp")),
            (tree.optional("head/dense_bias"), "D"),
            ("head/norm/(weight|bias)", "D"),
            (tree.optional("head/words"), "VD"),
            (tree.optional("head/bias"), "V"),
        ),
        "classify": (
            ("head/dense", "F0D"),
            (tree.optional("head/dense_bias"), "F0"),
            ("head/norm/(weight|bias)", "F0"),
            ("head/classes", "cF0"),
            ("head/classes_bias", "c"),
        ),
        "embed": (),
    }
    return Axes(
        (("embed", "VD table"), *heads[config.head], *BLOCK_AXES),
        sizes=(("h", config.width // config.heads),),
        ordered=("V", "D") if config.head == "embed" else ("V",),
        fixed=("F0",),  # the head normalises them
        fused=GROUPS,
        feeds=(
            *block_feeds(up=True),
            ("norm/(weight|bias)", "head/dense"),
            ("head/norm/(weight|bias)", "head/(words|classes)"),
        ),
        norm_mean=True,
    )


class _Block(nn.Module):
    config: Config
    policy: ops.Policy
    first: bool

    @nn.compact
    def __call__(self, x: jax.Array, context: dict[str, Any], layer: Any) -> jax.Array:
        c = self.config
        normal = nn.initializers.normal(c.init_scale)
        out = nn.initializers.normal(c.init_scale / (2 * c.depth) ** 0.5)
        everything = jnp.iinfo(jnp.int32).max
        window = jnp.asarray([w or everything for w in c.window_of_layers()], jnp.int32)[layer]
        near = lambda local, far: jnp.where(window < everything, local, far)
        context = {**context, "rope": jax.tree.map(near, context["local_rope"], context["rope"])}
        mix = Attention(
            *(c.heads, c.heads, c.width // c.heads, c.attention_bias, normal, out, self.policy),
            name="attn",
        )
        y = x if self.first else LayerNorm(c.norm_eps, c.norm_bias, name="attn_norm")(x)
        x = x + mix(y, context, None, 0, window)[0]
        mlp = MLP(
            c.mlp_width,
            ACTIVATIONS[c.activation],
            True,
            c.mlp_bias,
            normal,
            out,
            self.policy,
            name="mlp",
        )
        return x + mlp(LayerNorm(c.norm_eps, c.norm_bias, name="mlp_norm")(x))


class _Head(nn.Module):
    """A dense layer, an activation and a norm, then logits.

    The logits are those of tokens, by the embedding, or of classes.
    """

    config: Config
    policy: ops.Policy

    @nn.compact
    def __call__(self, x: jax.Array, table: Any = None) -> jax.Array:
        c = self.config
        wide = dataclasses.replace(self.policy, activation_dtype="float32")
        normal = nn.initializers.normal(c.init_scale)
        y = ACTIVATIONS[c.head_activation](
            linear(self, x, {"dense": x.shape[-1]}, normal, c.head_bias, self.policy)[0]
        )
        y = LayerNorm(c.norm_eps, c.norm_bias, name="norm")(y)
        if c.head == "classify":
            return linear(
                self, y.astype(jnp.float32), {"classes": len(c.labels)}, normal, True, wide
            )[0]
        table = table if c.tied else leaf(self, "words", normal, (c.vocab, x.shape[-1]))
        logits = ops.einsum("BTD,VD->BTV", y, table, wide)
        if not c.vocab_bias:
            return logits
        return logits + on_last(
            leaf(self, "bias", nn.initializers.zeros, (c.vocab,)).astype(jnp.float32), logits.ndim
        )


@family(Config, SIZES)
def model(config: Config, policy: ops.Policy = ops.Policy()) -> Model:
    """Return the model of one config.

    Equal arguments give the same functions, so nothing is traced twice.

    Inputs are `tokens` `[B, T]` and, if wanted, `mask`, `positions`; with the head "mlm" also
    `segments`.
    """
    c = config
    norm_module = LayerNorm(c.norm_eps, c.norm_bias)
    head_module = _Head(config, policy)
    block_modules = {first: _Block(c, policy, first) for first in (False, True)}

    def embed(
        params: tree.Params,
        inputs: dict[str, jax.Array],
        cache: Any = None,
        rng: Any = None,
        train: bool = False,
    ) -> tuple[jax.Array, dict[str, Any]]:
        tokens = inputs["tokens"]
        positions = positions_of(inputs)
        turned = c.width // c.heads
        context = {
            "seen": encoder_sees(inputs, c.head),
            "rope": ops.rope_tables(positions, turned, c.rope_base),
            "local_rope": ops.rope_tables(positions, turned, c.local_rope_base),
        }
        x: Any = norm_module.apply(
            {"params": params["embed_norm"]}, ops.embed(params["embed"], tokens, policy)
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
        x = block_modules["attn_norm" not in params].apply({"params": params}, x, context, layer)
        mask = context["seen"].valid
        # rows of zeros, by which the head, which sees only x, recognises padding
        if c.head != "mlm" and mask is not None:
            x = jnp.where(mask[..., None], x, jnp.zeros((), x.dtype))
        return x, cache, {}

    def head(params: tree.Params, x: jax.Array, rng: Any = None, train: bool = False) -> jax.Array:
        y: Any = norm_module.apply({"params": params["norm"]}, x)
        if c.head == "mlm":
            logits: Any = head_module.apply({"params": params["head"]}, y, params["embed"])
            return logits
        one = pool(
            y, jnp.any(x != 0, axis=-1), c.pooling if c.head == "embed" else (_POOLINGS[c.pool],)
        )
        if c.head == "embed":
            return one
        logits = head_module.apply({"params": params["head"]}, one[:, None])
        return logits[:, 0]

    def init(key: jax.Array) -> tree.Params:
        keys = jax.random.split(key, 4)
        table = c.init_scale * jax.random.normal(keys[0], (c.vocab, c.width))
        x = jnp.zeros((1, 1, c.width), policy.activation_dtype)
        norm = lambda: {
            "weight": jnp.ones(c.width),
            **({"bias": jnp.zeros(c.width)} if c.norm_bias else {}),
        }
        params: tree.Params = {"embed": table, "embed_norm": norm(), "norm": norm()}
        context = embed(params, {"tokens": jnp.zeros((1, 1), jnp.int32)})[1]
        one = lambda first: lambda k: dict(block_modules[first].init(k, x, context, 0)["params"])
        rest = init_layers(one(False), keys[2], c.depth - 1, 1) if c.depth > 1 else {}
        params["blocks"] = {**init_layers(one(True), keys[1], 1), **rest}
        if c.head != "embed":
            params["head"] = dict(head_module.init(keys[3], x, table)["params"])
        return params

    return Model(config, policy, init, Parts(embed, block, head), token_inputs, None, axes(config))
