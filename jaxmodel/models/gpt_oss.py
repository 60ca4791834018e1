"""gpt-oss (OpenAI, 2025): a mixture of experts with attention sinks and windows.

The windows are in every other layer.

It has RMS norms, rotary positions scaled by YaRN, grouped heads and biases everywhere. An expert's
gate and up are clamped, and the gate multiplies `up + 1`.

>>> gpt_oss = model(SIZES["tiny"])
>>> params = jax.jit(gpt_oss.init)(jax.random.key(0))
>>> jax.jit(gpt_oss.apply)(params, jnp.zeros((2, 8), jnp.int32)).logits.shape
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
from jaxmodel.errors import InputError
from jaxmodel.layers import Attention, MoE, RMSNorm, init_layers, leaf
from jaxmodel.layers.feeds import block_feeds
from jaxmodel.layers.fuse import GROUPS
from jaxmodel.layers.moe import real_tokens
from jaxmodel.models.family import family
from jaxmodel.models.model import Model, check_sizes, decoder_context, token_inputs
from jaxmodel.models.parts import Parts, Windowed


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
      mlp_width: the width F of an expert.
      context: the longest sequence that the model was made for.
      experts: the number of experts E of each layer.
      experts_per_token: the number of experts that the router chooses for a token.
      windows: the attention windows, used by the layers in turn; 0 for all positions.
      rope_base: the base of the rotary frequencies.
      rope_scaling: the scaling for contexts longer than that of the training.
      norm_eps: added to the variance by the RMS norms.
      limit: the upper limit of the gate, and of the absolute value of up.
      steepness: the steepness of the gate, `x sigmoid(steepness x)`.
      balance: the factor of the load-balancing loss (its mean over the layers) in training.
      init_scale: the standard deviation of new weights.
    """

    vocab: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    context: int
    experts: int
    experts_per_token: int = 4
    windows: tuple[int, ...] = (128, 0)
    rope_base: float = 150000.0
    rope_scaling: ops.RopeScaling | None = None
    norm_eps: float = 1e-5
    limit: float = 7.0
    steepness: float = 1.702
    balance: float = 0.001
    init_scale: float = 0.02

    def __post_init__(self) -> None:
        check_sizes(
            self,
            (
                "vocab",
                "width",
                "depth",
                "heads",
                "kv_heads",
                "head_width",
                "mlp_width",
                "context",
                "experts",
            ),
        )
        if self.heads % self.kv_heads or self.head_width % 2:
            given = f"kv_heads, head_width: {self.kv_heads}, {self.head_width} given"
            raise InputError(
                f"{given}; allowed: a divisor of {self.heads} heads, and an even width"
            )
        self.check_windows()
        if not 1 <= self.experts_per_token <= self.experts:
            raise InputError(
                f"experts_per_token: {self.experts_per_token} given; allowed: 1 to "
                f"{self.experts}, the experts"
            )
        if self.limit <= 0 or self.balance < 0:
            raise InputError(
                f"limit, balance: {self.limit}, {self.balance} given; allowed: above 0, at least 0"
            )

    @property
    def expert_layers(self) -> int:
        """The number of layers with experts."""
        return self.depth


_YARN = ops.RopeScaling("yarn", 32.0, 4096, truncate=False)

SIZES = {
    "tiny": Config(256, 32, 3, 4, 2, 8, 64, 128, 8, 4, (3, 0)),
    "gpt-oss-20b": Config(
        201088, 2880, 24, 64, 8, 64, 2880, 131072, 32, rope_scaling=_YARN, balance=0.9
    ),
    "gpt-oss-120b": Config(
        201088, 2880, 36, 64, 8, 64, 2880, 131072, 128, rope_scaling=_YARN, balance=0.9
    ),
}


def axes(config: Config) -> Axes:
    """Return the axes of the leaves."""
    return Axes(
        (
            ("embed", "VD table"),
            ("head", "VD"),
            ("blocks/.*/attn/q", "(KGh)D"),
            ("blocks/.*/attn/(k|v)", "(Kh)D"),
            ("blocks/.*/attn/o", "D(KGh)"),
            ("blocks/.*/attn/q_bias", "(KGh)"),
            ("blocks/.*/attn/(k|v)_bias", "(Kh)"),
            ("blocks/.*/attn/o_bias", "D"),
            ("blocks/.*/attn/sinks", "(KG)", P()),
            ("blocks/.*/moe/router", "ED router", P(None, "fsdp")),
            ("blocks/.*/moe/router_bias", "E", P()),
            ("blocks/.*/moe/(gate|up)", "EFD"),
            ("blocks/.*/moe/down", "EDF"),
            ("blocks/.*/moe/(gate|up)_bias", "EF"),
            ("blocks/.*/moe/down_bias", "ED"),
            (".*norm/weight", "D"),
        ),
        sizes=(("h", config.head_width),),
        fused=GROUPS,
        feeds=(*block_feeds(), ("norm/weight", "head")),  # what `up` gives is clipped
    )


class _Block(nn.Module):
    config: Config
    policy: ops.Policy

    @nn.compact
    def __call__(
        self, x: jax.Array, context: dict[str, Any], cache: Any, layer: Any
    ) -> tuple[jax.Array, Any, dict[str, Any]]:
        c = self.config
        normal = nn.initializers.normal(c.init_scale)
        out = nn.initializers.normal(c.init_scale / (2 * c.depth) ** 0.5)
        everything = jnp.iinfo(jnp.int32).max
        window = jnp.asarray([w or everything for w in c.window_of_layers()], jnp.int32)[layer]
        mix = Attention(
            *(c.heads, c.kv_heads, c.head_width, True, normal, out, self.policy),
            sinks=True,
            name="attn",
        )
        y, cache = mix(RMSNorm(c.norm_eps, name="attn_norm")(x), context, cache, layer, window)
        x = x + y

        def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
            gate = jnp.minimum(gate, c.limit)
            up = jnp.clip(up, -c.limit, c.limit)
            return (up + 1) * gate * jax.nn.sigmoid(c.steepness * gate)

        sizes = c.experts, c.experts_per_token, c.mlp_width
        moe = MoE(*sizes, nn.silu, normal, out, self.policy, gated=gated, bias=True, name="moe")
        y, aux = moe(RMSNorm(c.norm_eps, name="mlp_norm")(x), context["real"])
        return x + y, cache, aux


class _Head(nn.Module):
    config: Config
    policy: ops.Policy

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        x = RMSNorm(c.norm_eps, name="norm")(x)
        table = leaf(self, "head", nn.initializers.normal(c.init_scale), (c.vocab, x.shape[-1]))
        return ops.einsum(
            "BTD,VD->BTV", x, table, dataclasses.replace(self.policy, activation_dtype="float32")
        )


@family(Config, SIZES)
def model(config: Config, policy: ops.Policy = ops.Policy()) -> Model:
    """Return the model of one config.

    Equal arguments give the same functions, so nothing is traced twice.
    """
    block_module = _Block(config, policy)
    head_module = _Head(config, policy)

    def embed(
        params: tree.Params,
        inputs: dict[str, jax.Array],
        cache: Any = None,
        rng: Any = None,
        train: bool = False,
    ):
        positions, context = decoder_context(inputs, cache)
        context["rope"] = ops.rope_tables(
            positions, config.head_width, config.rope_base, config.rope_scaling
        )
        context["real"] = real_tokens(inputs)
        return ops.embed(params["embed"], inputs["tokens"], policy), context

    def block(
        params: Any,
        x: Any,
        context: Any,
        cache: Any = None,
        layer: Any = 0,
        rng: Any = None,
        train: bool = False,
    ):
        out: Any = block_module.apply({"params": params}, x, context, cache, layer)
        return out

    def head(params: tree.Params, x: jax.Array, rng: Any = None, train: bool = False) -> jax.Array:
        logits: Any = head_module.apply(
            {"params": {name: params[name] for name in ("norm", "head")}}, x
        )
        return logits

    def init(key: jax.Array) -> tree.Params:
        embed_key, blocks_key, head_key = jax.random.split(key, 3)
        x = jnp.zeros((1, 1, config.width), policy.activation_dtype)
        table = config.init_scale * jax.random.normal(embed_key, (config.vocab, config.width))
        context = embed({"embed": table}, {"tokens": jnp.zeros((1, 1), jnp.int32)})[1]
        blocks = init_layers(
            lambda k: dict(block_module.init(k, x, context, None, 0)["params"]),
            blocks_key,
            config.depth,
        )
        return {"embed": table, "blocks": blocks, **head_module.init(head_key, x)["params"]}

    def init_cache(batch: int, capacity: int) -> ops.KVCache:
        return ops.KVCache.zeros(
            config.depth, batch, config.kv_heads, capacity, config.head_width, policy
        )

    return Model(
        config, policy, init, Parts(embed, block, head), token_inputs, init_cache, axes(config)
    )
