"""Llama (Touvron et al., 2023): RMS norm, rotary positions, grouped heads, a gated feed-forward part, no biases.

>>> config = SIZES["tiny"]
>>> llama = model(config)
>>> params = llama.init(jax.random.key(0))
>>> llama.apply(params, jnp.zeros((2, 8), jnp.int32)).logits.shape
(2, 8, 256)
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxmodel import ops, tree
from jaxmodel.errors import InputError
from jaxmodel.layers import MLP, Attention, RMSNorm, init_layers, leaf
from jaxmodel.models.model import Model, Parts, check_sizes, decoder_context, token_inputs


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes that tell the members of the family apart.

    Attributes:
      vocab: tokens V.
      width: D.
      depth: layers L.
      heads: query heads H.
      kv_heads: key heads K, which divide H.
      head_width: h.
      mlp_width: F.
      context: the longest sequence that the model was made for.
      rope_base: of the rotary frequencies.
      norm_eps: of the RMS norms.
      tied: whether the head reads the embedding.
      init_scale: standard deviation of new weights.
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

    def __post_init__(self) -> None:
        check_sizes(self, ("vocab", "width", "depth", "heads", "kv_heads", "head_width", "mlp_width", "context"))
        if self.heads % self.kv_heads or self.head_width % 2:
            raise InputError(
                f"kv_heads, head_width: {self.kv_heads}, {self.head_width} given; a divisor of {self.heads} heads and an even "
                "width are needed"
            )


SIZES = {
    "tiny": Config(256, 32, 3, 4, 2, 8, 64, 128),
    "smollm2-135m": Config(49152, 576, 30, 9, 3, 64, 1536, 8192, 100000.0, tied=True),
    "llama-2-7b": Config(32000, 4096, 32, 32, 32, 128, 11008, 4096),
    "llama-3-8b": Config(128256, 4096, 32, 32, 8, 128, 14336, 8192, 500000.0),
    "llama-3-70b": Config(128256, 8192, 80, 64, 8, 128, 28672, 8192, 500000.0),
    "llama-3-405b": Config(128256, 16384, 126, 128, 8, 128, 53248, 8192, 500000.0),
}

RULES: tree.Rules = (
    ("embed", P("tensor", "fsdp")),
    (tree.optional("head"), P("tensor", "fsdp")),
    ("blocks/.*/(q|k|v|gate|up)", P("tensor", "fsdp")),
    ("blocks/.*/(o|down)", P("fsdp", "tensor")),
    (".*norm/weight", P()),
)


class _Block(nn.Module):
    config: Config
    policy: ops.Policy

    @nn.compact
    def __call__(self, x: jax.Array, context: dict[str, Any], cache: Any, layer: Any) -> tuple[jax.Array, Any]:
        c = self.config
        normal = nn.initializers.normal(c.init_scale)
        out = nn.initializers.normal(c.init_scale / (2 * c.depth) ** 0.5)
        mix = Attention(c.heads, c.kv_heads, c.head_width, False, normal, out, self.policy, name="attn")
        mlp = MLP(c.mlp_width, nn.silu, True, False, normal, out, self.policy, name="mlp")
        y, cache = mix(RMSNorm(c.norm_eps, name="attn_norm")(x), context, cache, layer)
        x = x + y
        return x + mlp(RMSNorm(c.norm_eps, name="mlp_norm")(x)), cache


class _Head(nn.Module):
    config: Config
    policy: ops.Policy

    @nn.compact
    def __call__(self, x: jax.Array, table: Any = None) -> jax.Array:
        c = self.config
        x = RMSNorm(c.norm_eps, name="norm")(x)
        if table is None:
            table = leaf(self, "head", nn.initializers.normal(c.init_scale), (c.vocab, x.shape[-1]))
        return ops.einsum("BTD,VD->BTV", x, table, dataclasses.replace(self.policy, stream="float32"))


def model(config: Config, policy: ops.Policy = ops.Policy()) -> Model:
    """The pure functions of one config; equal arguments give the same functions, so nothing is traced twice."""
    return _model(config, policy)


@functools.cache
def _model(config: Config, policy: ops.Policy) -> Model:
    block_module, head_module = _Block(config, policy), _Head(config, policy)

    def embed(
        params: tree.Params, inputs: dict[str, jax.Array], cache: Any = None, rng: Any = None, train: bool = False
    ) -> tuple[jax.Array, dict[str, Any]]:
        positions, context = decoder_context(inputs, cache)
        context["rope"] = ops.rope_tables(positions, config.head_width, config.rope_base)
        return ops.take(params["embed"], inputs["tokens"], policy), context

    def block(params: Any, x: Any, context: Any, cache: Any = None, layer: Any = 0, rng: Any = None, train: bool = False):
        x, cache = block_module.apply({"params": params}, x, context, cache, layer)
        return x, cache, {}

    def head(params: tree.Params, x: jax.Array, rng: Any = None, train: bool = False) -> jax.Array:
        own = {name: params[name] for name in ("norm", "head") if name in params}
        logits = head_module.apply({"params": own}, x, None if "head" in params else params["embed"])
        assert isinstance(logits, jax.Array)
        return logits

    def init(key: jax.Array) -> tree.Params:
        embed_key, blocks_key, head_key = jax.random.split(key, 3)
        x = jnp.zeros((1, 1, config.width), policy.stream)
        tokens = {"tokens": jnp.zeros((1, 1), jnp.int32)}
        table = config.init_scale * jax.random.normal(embed_key, (config.vocab, config.width))
        context = embed({"embed": table}, tokens)[1]
        blocks = init_layers(lambda k: dict(block_module.init(k, x, context, None, 0)["params"]), blocks_key, config.depth)
        top = head_module.init(head_key, x, table if config.tied else None)["params"]
        return {"embed": table, "blocks": blocks, **top}

    def init_cache(batch: int, capacity: int) -> ops.KVCache:
        return ops.KVCache.zeros(config.depth, batch, config.kv_heads, capacity, config.head_width, policy)

    again = functools.partial(_model, config)
    return Model(config, policy, init, Parts(embed, block, head), token_inputs, init_cache, RULES, again)
