"""Llama (Touvron et al., 2023) and decoders that its config covers.

These are Mistral, Mixtral, Qwen 2 and 3, Gemma 2 and 3, SmolLM 2 and 3, OLMo 2 and 3, Granite 3,
Phi 3 and 4.

Llama has RMS norm, rotary positions, grouped heads and a gated feed-forward part. Mistral (Jiang et
al., 2023) adds a window of attention, Mixtral (2024) experts, Qwen 2 (2024) biases of q, k and v,
Qwen 3 (2025) norms of queries and keys, Gemma (2024, 2025) norms after each part, soft caps, and
windows in most layers. OLMo 2 (2024) normalises only the results of the parts, and all queries of a
token together; SmolLM3 (2025) does not rotate queries and keys in every fourth layer; Granite
(2024) scales residuals and logits.

>>> config = SIZES["tiny"]
>>> llama = model(config)
>>> params = jax.jit(llama.init)(jax.random.key(0))
>>> jax.jit(llama.apply)(params, jnp.zeros((2, 8), jnp.int32)).logits.shape
(2, 8, 256)
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxmodel import ops, tree
from jaxmodel.axes import Axes
from jaxmodel.errors import FROM_ZERO, InputError, one_of, within
from jaxmodel.layers import ACTIVATIONS, MLP, Attention, MoE, RMSNorm, init_layers, leaf
from jaxmodel.layers.feeds import block_feeds
from jaxmodel.layers.fuse import GROUPS
from jaxmodel.layers.moe import real_tokens
from jaxmodel.models.family import family
from jaxmodel.models.model import Model, check_sizes, decoder_context, token_inputs
from jaxmodel.models.parts import Parts, Windowed, pattern


@dataclasses.dataclass(frozen=True)
class Config(Windowed):
    """The sizes of a member of the family.

    Attributes:
      vocab: the size V of the vocabulary.
      width: the model width D.
      depth: the number of layers L.
      heads: the number of query heads H.
      kv_heads: the number of key heads K, a divisor of H.
      head_width: the width h of a head.
      mlp_width: the feed-forward width F.
      context: the longest sequence that the model was made for.
      rope_base: the base of the rotary frequencies.
      norm_eps: added to the variance by the RMS norms.
      tied: whether the head reads the embedding.
      init_scale: the standard deviation of new weights.
      rope_scaling: the scaling for contexts longer than that of the training.
      windows: the attention windows, used by the layers in turn; 0 for all positions, () for all
        positions in every layer.
      local_rope_base: the base of the rotary frequencies in layers with a window; None for
        `rope_base` with its scaling.
      qkv_bias: whether q, k and v have biases.
      o_bias: whether o has a bias.
      mlp_bias: whether gate, up and down have biases.
      qk_norm: whether each head's queries and keys are normalised.
      activation: the activation of the gate, a name of `layers.ACTIVATIONS`.
      norm_offset: added to the weight of every norm.
      post_norms: whether the result of each part is normalised too.
      embed_scale: a factor of the embedding.
      query_scale: the factor of the scores; None for `head_width ** -0.5`.
      attn_softcap: the soft cap of the scores, or None.
      logit_softcap: the soft cap of the logits, or None.
      experts: the number of experts E of each layer; 0 for one feed-forward part without a router.
      experts_per_token: the number of experts that the router chooses for a token.
      balance: the factor of the load-balancing loss (its mean over the layers) in training.
      expert_width: the width F of an expert; 0 for `mlp_width`.
      norm_topk: whether the weights of the chosen experts sum to one; else they are those of
        the softmax over all.
      dense_layers: in a mixture of experts, the layers with a single feed-forward part of
        `mlp_width`.
      rotary_width: the number of components of a head that are rotated; 0 for all.
      still: whether layers, in turn as for `windows`, do not rotate queries and keys; () for none.
      pre_norms: whether the input of each part is normalised.
      wide_qk_norm: whether `qk_norm` is over all heads of a token together.
      residual_scale: a factor of the result of each part.
      logit_divisor: a divisor of the logits.
    """

    vocab: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    context: int
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    tied: bool = False
    init_scale: float = 0.02
    rope_scaling: ops.RopeScaling | None = None
    windows: tuple[int, ...] = ()
    local_rope_base: float | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    activation: str = "silu"
    norm_offset: float = 0.0
    post_norms: bool = False
    embed_scale: float = 1.0
    query_scale: float | None = None
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    experts: int = 0
    experts_per_token: int = 2
    balance: float = 0.01
    expert_width: int = 0
    norm_topk: bool = True
    dense_layers: tuple[int, ...] = ()
    rotary_width: int = 0
    still: tuple[bool, ...] = ()
    pre_norms: bool = True
    wide_qk_norm: bool = False
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    o_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        check_sizes(
            self,
            ("vocab", "width", "depth", "heads", "kv_heads", "head_width", "mlp_width", "context"),
        )
        if self.heads % self.kv_heads or self.head_width % 2:
            given = f"kv_heads, head_width: {self.kv_heads}, {self.head_width} given"
            raise InputError(
                f"{given}; allowed: a divisor of {self.heads} heads, and an even width"
            )
        one_of("activation", self.activation, ACTIVATIONS)
        self.check_windows()
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            raise InputError(
                f"experts_per_token: {self.experts_per_token} given; allowed: 1 to "
                f"{self.experts}, the experts"
            )
        if any(not isinstance(layer, int) or layer < 0 for layer in self.dense_layers) or (
            self.dense_layers and not self.experts
        ):
            raise InputError(
                f"dense_layers: {self.dense_layers} given; allowed: indices of layers, in a model "
                "with experts"
            )
        if self.rotary_width % 2 or not 0 <= self.rotary_width <= self.head_width:
            raise InputError(
                f"rotary_width: {self.rotary_width} given; allowed: even numbers up to "
                f"{self.head_width}; 0 for all"
            )
        if not self.pre_norms and not self.post_norms:
            raise InputError(
                "pre_norms: False given without post_norms; each part needs a norm before or "
                "after it"
            )
        if self.mlp_bias and self.experts:
            raise InputError("mlp_bias: True given for a model with experts, which have no biases")
        within("balance", self.balance, FROM_ZERO)

    def of_layers(self, layers: Sequence[int]) -> Config:
        """Return the config of the model that has only these layers, in this order."""
        return dataclasses.replace(
            super().of_layers(layers),
            dense_layers=tuple(n for n, i in enumerate(layers) if i in self.dense_layers),
            still=pattern(tuple(self.still[i % len(self.still)] for i in layers if self.still)),
        )

    @property
    def expert_layers(self) -> int:
        """The number of layers with experts."""
        return len(set(range(self.depth)) - set(self.dense_layers)) if self.experts else 0


def _gemma(*sizes: Any, **more: Any) -> Config:
    """Return a size of Gemma, whose embedding is scaled by the root of the width."""
    given: dict[str, Any] = {"tied": True, "norm_eps": 1e-6, "query_scale": 256**-0.5} | more
    same: dict[str, Any] = {
        "activation": "gelu_tanh",
        "norm_offset": 1.0,
        "post_norms": True,
        "embed_scale": sizes[1] ** 0.5,
    }
    return Config(*sizes, **given, **same)


_LLAMA31 = ops.RopeScaling("llama3", 8.0, 8192)
_GEMMA3: dict[str, Any] = {"rope_base": 1e6, "local_rope_base": 10000.0, "qk_norm": True}
_GEMMA_LONG: dict[str, Any] = {"rope_scaling": ops.RopeScaling("linear", 8.0)}
_ALL = {
    "local_rope_base": 1000.0,
    "qk_norm": True,
    "qkv_bias": True,
    "attn_softcap": 5.0,
    "logit_softcap": 3.0,
}
_QWEN_MOE: dict[str, Any] = {
    "qk_norm": True,
    "experts": 128,
    "experts_per_token": 8,
    "balance": 0.001,
}
_OLMO: dict[str, Any] = {
    "qk_norm": True,
    "wide_qk_norm": True,
    "pre_norms": False,
    "post_norms": True,
}
_OLMO3 = _OLMO | {
    "rope_scaling": ops.RopeScaling("yarn", 8.0, 8192),
    "windows": (4096,) * 3 + (0,),
    "local_rope_base": 500000.0,
}
_GRANITE: dict[str, Any] = {"query_scale": 0.015625, "residual_scale": 0.22}
_STILL = (False,) * 3 + (True,)
_TOGETHER: dict[str, Any] = {
    "windows": (3, 0),
    "still": (False, True),
    "rotary_width": 4,
    "residual_scale": 0.5,
    "logit_divisor": 2.0,
    **dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), True),
}
_SPARSE: dict[str, Any] = {
    "experts": 4,
    "expert_width": 48,
    "norm_topk": False,
    "dense_layers": (1,),
}

SIZES = {
    "tiny": Config(256, 32, 3, 4, 2, 8, 64, 128),
    "tiny-gemma": _gemma(
        256, 32, 3, 4, 2, 8, 64, 128, norm_eps=1e-5, query_scale=None, windows=(3, 0), **_ALL
    ),
    "tiny-moe": Config(256, 32, 3, 4, 2, 8, 64, 128, experts=4),
    "tiny-olmo": Config(256, 32, 3, 4, 2, 8, 64, 128, **_OLMO, **_TOGETHER),
    "tiny-sparse": Config(256, 32, 3, 4, 2, 8, 64, 128, **_SPARSE),
    "smollm2-135m": Config(49152, 576, 30, 9, 3, 64, 1536, 8192, 100000.0, tied=True),
    "llama-2-7b": Config(32000, 4096, 32, 32, 32, 128, 11008, 4096),
    "llama-3-8b": Config(128256, 4096, 32, 32, 8, 128, 14336, 8192, 500000.0),
    "llama-3-70b": Config(128256, 8192, 80, 64, 8, 128, 28672, 8192, 500000.0),
    "llama-3-405b": Config(128256, 16384, 126, 128, 8, 128, 53248, 8192, 500000.0),
    "llama-3.1-8b": Config(
        128256, 4096, 32, 32, 8, 128, 14336, 131072, 500000.0, rope_scaling=_LLAMA31
    ),
    "mistral-7b": Config(32000, 4096, 32, 32, 8, 128, 14336, 32768, windows=(4096,)),
    "mixtral-8x7b": Config(
        32000, 4096, 32, 32, 8, 128, 14336, 32768, 1000000.0, experts=8, balance=0.02
    ),
    "qwen2-0.5b": Config(
        151936, 896, 24, 14, 2, 64, 4864, 32768, 1000000.0, 1e-6, tied=True, qkv_bias=True
    ),
    "qwen2-7b": Config(152064, 3584, 28, 28, 4, 128, 18944, 32768, 1000000.0, 1e-6, qkv_bias=True),
    "qwen3-0.6b": Config(
        151936, 1024, 28, 16, 8, 128, 3072, 40960, 1000000.0, 1e-6, tied=True, qk_norm=True
    ),
    "qwen3-8b": Config(151936, 4096, 36, 32, 8, 128, 12288, 40960, 1000000.0, 1e-6, qk_norm=True),
    "qwen3-30b-a3b": Config(
        151936, 2048, 48, 32, 4, 128, 6144, 40960, 1e6, 1e-6, **_QWEN_MOE, expert_width=768
    ),
    "qwen3-235b-a22b": Config(
        151936, 4096, 94, 64, 4, 128, 12288, 40960, 1e6, 1e-6, **_QWEN_MOE, expert_width=1536
    ),
    "gemma-2-2b": _gemma(
        256000,
        2304,
        26,
        8,
        4,
        256,
        9216,
        8192,
        windows=(4096, 0),
        attn_softcap=50.0,
        logit_softcap=30.0,
    ),
    "gemma-3-1b": _gemma(
        262144, 1152, 26, 4, 1, 256, 6912, 32768, windows=(512,) * 5 + (0,), **_GEMMA3
    ),
    "gemma-3-4b": _gemma(
        262208,
        2560,
        34,
        8,
        4,
        256,
        10240,
        131072,
        windows=(1024,) * 5 + (0,),
        **_GEMMA3,
        **_GEMMA_LONG,
    ),
    "gemma-3-12b": _gemma(
        262208,
        3840,
        48,
        16,
        8,
        256,
        15360,
        131072,
        windows=(1024,) * 5 + (0,),
        **_GEMMA3,
        **_GEMMA_LONG,
    ),
    "olmo-2-1b": Config(100352, 2048, 16, 16, 16, 128, 8192, 4096, 500000.0, 1e-6, **_OLMO),
    "olmo-2-7b": Config(100352, 4096, 32, 32, 32, 128, 11008, 4096, 500000.0, 1e-6, **_OLMO),
    "olmo-3-7b": Config(100278, 4096, 32, 32, 32, 128, 11008, 65536, 500000.0, 1e-6, **_OLMO3),
    "smollm3-3b": Config(
        128256, 2048, 36, 16, 4, 128, 11008, 65536, 5e6, 1e-6, tied=True, still=_STILL
    ),
    "granite-3.3-2b": Config(
        49159,
        2048,
        40,
        32,
        8,
        64,
        8192,
        131072,
        1e7,
        tied=True,
        embed_scale=12.0,
        **_GRANITE,
        logit_divisor=8.0,
    ),
    "phi-3-mini-4k": Config(32064, 3072, 32, 32, 32, 96, 8192, 4096, windows=(2047,)),
    "phi-4": Config(100352, 5120, 40, 40, 10, 128, 17920, 16384, 250000.0),
}


def axes(config: Config) -> Axes:
    """Return the axes of the leaves."""
    queries, keys = ("(KGh)", "(Kh)") if config.wide_qk_norm else ("h", "h")
    return Axes(
        (
            ("embed", "VD table"),
            (tree.optional("head"), "VD"),
            ("blocks/.*/attn/q", "(KGh)D"),
            ("blocks/.*/attn/(k|v)", "(Kh)D"),
            ("blocks/.*/attn/o", "D(KGh)"),
            (tree.optional("blocks/.*/attn/q_bias"), "(KGh)"),
            (tree.optional("blocks/.*/attn/(k|v)_bias"), "(Kh)"),
            (tree.optional("blocks/.*/attn/o_bias"), "D"),
            (tree.optional("blocks/.*/attn/q_norm/weight"), queries, P()),
            (tree.optional("blocks/.*/attn/k_norm/weight"), keys, P()),
            (tree.optional("blocks/.*/mlp/(gate|up)"), "FD"),
            (tree.optional("blocks/.*/mlp/down"), "DF"),
            (tree.optional("blocks/.*/mlp/(gate|up)_bias"), "F"),
            (tree.optional("blocks/.*/mlp/down_bias"), "D"),
            (tree.optional("blocks/.*/moe/router"), "ED router", P(None, "fsdp")),
            (tree.optional("blocks/.*/moe/(gate|up)"), "EFD"),
            (tree.optional("blocks/.*/moe/down"), "EDF"),
            (".*norm/weight", "D"),
        ),
        sizes=(("h", config.head_width),),
        fused=GROUPS,
        feeds=(*block_feeds(norms_before=config.pre_norms, up=True), ("norm/weight", "head")),
        fixed=("K", "G") if config.wide_qk_norm else (),  # all heads have one norm
        norm_offset=config.norm_offset,
    )


class _Block(nn.Module):
    config: Config
    policy: ops.Policy
    sparse: bool

    @nn.compact
    def __call__(
        self, x: jax.Array, context: dict[str, Any], cache: Any, layer: Any
    ) -> tuple[jax.Array, Any, dict[str, Any]]:
        c = self.config
        aux = {}
        normal = nn.initializers.normal(c.init_scale)
        out = nn.initializers.normal(c.init_scale / (2 * c.depth) ** 0.5)
        norm = functools.partial(RMSNorm, c.norm_eps, c.norm_offset)
        before = lambda part, x: norm(name=f"{part}_norm")(x) if c.pre_norms else x

        def added(part: str, y: jax.Array) -> jax.Array:
            y = norm(name=f"{part}_post_norm")(y) if c.post_norms else y
            return y if c.residual_scale == 1 else y * jnp.asarray(c.residual_scale, y.dtype)

        mix = Attention(
            *(c.heads, c.kv_heads, c.head_width, c.qkv_bias, normal, out, self.policy),
            out_bias=c.o_bias,
            qk_norm=norm if c.qk_norm else None,
            wide_norm=c.wide_qk_norm,
            scale=c.query_scale,
            softcap=c.attn_softcap,
            name="attn",
        )
        act = ACTIVATIONS[c.activation]
        context, window = _of_layer(c, context, layer)
        y, cache = mix(before("attn", x), context, cache, layer, window)
        x = x + added("attn", y)
        y = before("mlp", x)
        if self.sparse:
            width = c.expert_width or c.mlp_width
            moe = MoE(
                c.experts,
                c.experts_per_token,
                width,
                act,
                normal,
                out,
                self.policy,
                c.norm_topk,
                name="moe",
            )
            y, aux = moe(y, context["real"])
        else:
            y = MLP(c.mlp_width, act, True, c.mlp_bias, normal, out, self.policy, name="mlp")(y)
        return x + added("mlp", y), cache, aux


def _of_layer(config: Config, context: dict[str, Any], layer: Any) -> tuple[dict[str, Any], Any]:
    """Return the context and the window of one layer, whose index is traced in a scan."""
    windows = config.window_of_layers()
    window = None
    rope = context["rope"]
    if any(windows):
        everything = jnp.iinfo(jnp.int32).max
        window = jnp.asarray([w or everything for w in windows], jnp.int32)[layer]
        if config.local_rope_base is not None:
            rope = jax.tree.map(
                lambda near, far: jnp.where(window < everything, near, far),
                context["local_rope"],
                rope,
            )
    if any(config.still):
        still = jnp.asarray([config.still[i % len(config.still)] for i in range(config.depth)])[
            layer
        ]
        rope = jnp.where(still, 0.0, rope[0]), jnp.where(still, 1.0, rope[1])
    return {**context, "rope": rope}, window


class _Head(nn.Module):
    config: Config
    policy: ops.Policy

    @nn.compact
    def __call__(self, x: jax.Array, table: Any = None) -> jax.Array:
        c = self.config
        x = RMSNorm(c.norm_eps, c.norm_offset, name="norm")(x)
        if table is None:
            table = leaf(self, "head", nn.initializers.normal(c.init_scale), (c.vocab, x.shape[-1]))
        logits = ops.einsum(
            "BTD,VD->BTV", x, table, dataclasses.replace(self.policy, activation_dtype="float32")
        )
        logits = logits if c.logit_divisor == 1 else logits / c.logit_divisor
        return (
            logits
            if c.logit_softcap is None
            else c.logit_softcap * jnp.tanh(logits / c.logit_softcap)
        )


@family(Config, SIZES)
def model(config: Config, policy: ops.Policy = ops.Policy()) -> Model:
    """Return the model of one config.

    Equal arguments give the same functions, so nothing is traced twice.
    """
    block_modules = {sparse: _Block(config, policy, sparse) for sparse in (False, True)}
    head_module = _Head(config, policy)
    turned = config.rotary_width or config.head_width

    def embed(
        params: tree.Params,
        inputs: dict[str, jax.Array],
        cache: Any = None,
        rng: Any = None,
        train: bool = False,
    ):
        positions, context = decoder_context(inputs, cache)
        context["rope"] = ops.rope_tables(positions, turned, config.rope_base, config.rope_scaling)
        if config.local_rope_base is not None:
            context["local_rope"] = ops.rope_tables(positions, turned, config.local_rope_base)
        if config.experts:
            context["real"] = real_tokens(inputs)
        x = ops.embed(params["embed"], inputs["tokens"], policy)
        return x if config.embed_scale == 1 else x * jnp.asarray(
            config.embed_scale, x.dtype
        ), context

    def block(
        params: Any,
        x: Any,
        context: Any,
        cache: Any = None,
        layer: Any = 0,
        rng: Any = None,
        train: bool = False,
    ):
        out: Any = block_modules["moe" in params].apply(
            {"params": params}, x, context, cache, layer
        )
        return out

    def head(params: tree.Params, x: jax.Array, rng: Any = None, train: bool = False) -> jax.Array:
        own = {name: params[name] for name in ("norm", "head") if name in params}
        logits: Any = head_module.apply(
            {"params": own}, x, None if "head" in params else params["embed"]
        )
        return logits

    def init(key: jax.Array) -> tree.Params:
        embed_key, blocks_key, head_key = jax.random.split(key, 3)
        x = jnp.zeros((1, 1, config.width), policy.activation_dtype)
        table = config.init_scale * jax.random.normal(embed_key, (config.vocab, config.width))
        context = embed({"embed": table}, {"tokens": jnp.zeros((1, 1), jnp.int32)})[1]
        blocks: tree.Params = {}
        for sparse, run in itertools.groupby(
            range(config.depth), lambda i: bool(config.experts) and i not in config.dense_layers
        ):
            layers = list(run)
            module = block_modules[sparse]
            of_run = jax.random.fold_in(blocks_key, layers[0]) if layers[0] else blocks_key
            one = lambda k, module=module: dict(module.init(k, x, context, None, 0)["params"])
            blocks |= init_layers(one, of_run, len(layers), layers[0])
        top = head_module.init(head_key, x, table if config.tied else None)["params"]
        return {"embed": table, "blocks": blocks, **top}

    def init_cache(batch: int, capacity: int) -> ops.KVCache:
        return ops.KVCache.zeros(
            config.depth, batch, config.kv_heads, capacity, config.head_width, policy
        )

    return Model(
        config, policy, init, Parts(embed, block, head), token_inputs, init_cache, axes(config)
    )
