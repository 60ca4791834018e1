"""T5 (Raffel et al., 2019): an encoder and a decoder with RMS norms and relative positions.

The bias of relative positions is shared by all layers. The first version has a plain ReLU and a
head tied to the embedding, which it scales; version 1.1 and Flan-T5 (Chung et al., 2022) have gated
GELU and a separate head. Scores are not scaled: the initial queries are smaller instead.

>>> t5 = model(SIZES["tiny"])
>>> params = jax.jit(t5.init)(jax.random.key(0))
>>> source, tokens = jnp.zeros((2, 8), jnp.int32), jnp.zeros((2, 5), jnp.int32)
>>> jax.jit(t5.apply)(params, {"source": source, "tokens": tokens}).logits.shape
(2, 5, 256)
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxmodel import ops, tree
from jaxmodel.axes import Axes
from jaxmodel.errors import InputError, one_of
from jaxmodel.layers import MLP, Attention, RMSNorm, dropout, init_layers, leaf, repeat
from jaxmodel.layers.cross import CrossAttention
from jaxmodel.layers.feeds import CROSS_VALUES, block_feeds
from jaxmodel.layers.fuse import GROUPS
from jaxmodel.models.family import family
from jaxmodel.models.model import Model, check_sizes
from jaxmodel.models.parts import Parts
from jaxmodel.models.seq2seq import block_of, source_context, source_inputs
from jaxmodel.ops.memory import CrossAttentionCache

FORMS = {"relu": (nn.relu, False), "gated-gelu": (nn.gelu, True), "gated-silu": (nn.silu, True)}
"""Feed-forward parts: the activation, and whether there is a gate."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a member of the family.

    Attributes:
      vocab: the size V of the vocabulary of source and target.
      width: the model width D.
      encoder_depth: the number of layers of the encoder.
      depth: the number of layers L of the decoder.
      heads: the number of heads H.
      head_width: h; H * h may differ from D.
      mlp_width: the feed-forward width F.
      mlp: the feed-forward part, one of `FORMS`.
      tied: whether the head reads the embedding.
      buckets: the number of buckets of relative positions; half of them are for single distances.
      distance: the distance from which on all share the last bucket.
      norm_eps: added to the variance by the RMS norms.
      dropout: the dropout rate of what each part adds.
      init_scale: a factor of the standard deviations of new weights.
      start: the token that a target begins with.
      context: the longest source that the model was trained on; since positions are relative,
        longer ones can be read too.
      head_scale: the factor of the head's input; None for `width ** -0.5` if it is tied, else 1.
    """

    any_length: ClassVar = True  # of sources: positions are relative

    vocab: int
    width: int
    encoder_depth: int
    depth: int
    heads: int
    head_width: int
    mlp_width: int
    mlp: str = "relu"
    tied: bool = True
    buckets: int = 32
    distance: int = 128
    norm_eps: float = 1e-6
    dropout: float = 0.0
    init_scale: float = 1.0
    start: int = 0
    context: int = 512
    head_scale: float | None = None

    def __post_init__(self) -> None:
        sizes = (
            "vocab",
            "width",
            "encoder_depth",
            "depth",
            "heads",
            "head_width",
            "mlp_width",
            "buckets",
            "distance",
            "context",
        )
        check_sizes(self, sizes)
        one_of("mlp", self.mlp, FORMS)
        if self.buckets < 4 or self.distance <= self.buckets // 2:
            raise InputError(
                f"buckets, distance: {self.buckets}, {self.distance} given; allowed: at least 4 "
                "buckets, and a distance of more than half of them"
            )

    def untied(self) -> Config:
        """Return the config of the same model whose head has a leaf of its own."""
        return dataclasses.replace(self, tied=False, head_scale=self.scale)

    @property
    def scale(self) -> float:
        """The factor of the head's input."""
        return (
            self.head_scale
            if self.head_scale is not None
            else self.width**-0.5
            if self.tied
            else 1.0
        )


SIZES = {
    "tiny": Config(256, 32, 2, 3, 4, 8, 64, buckets=8, distance=6, head_scale=0.5),
    "tiny-gated": Config(256, 32, 1, 2, 4, 12, 64, "gated-gelu", False, buckets=8, distance=6),
    "t5-small": Config(32128, 512, 6, 6, 8, 64, 2048),
    "t5-base": Config(32128, 768, 12, 12, 12, 64, 3072),
    "t5-v1.1-small": Config(32128, 512, 8, 8, 6, 64, 1024, "gated-gelu", False),
    "flan-t5-small": Config(32128, 512, 8, 8, 6, 64, 1024, "gated-gelu", False),
}


def axes(config: Config) -> Axes:
    """Return the axes of the leaves.

    All layers of a stack share the table of positions, and so their heads `K0` or `K1`.
    """
    return Axes(
        (
            ("embed", "VD table"),
            (tree.optional("head"), "VD"),
            ("encoder/positions", "bK0 table", P()),
            ("encoder/blocks/.*/attn/(q|k|v)", "(K0h)D"),
            ("encoder/blocks/.*/attn/o", "D(K0h)"),
            ("positions", "bK1 table", P()),
            ("blocks/.*/attn/(q|k|v)", "(K1h)D"),
            ("blocks/.*/attn/o", "D(K1h)"),
            ("blocks/.*/cross/(q|memory_k|memory_v)", "(Hh)D"),
            ("blocks/.*/cross/o", "D(Hh)"),
            (".*/mlp/(gate|up)", "FD"),
            (".*/mlp/down", "DF"),
            (".*norm/weight", "D"),
        ),
        sizes=(("h", config.head_width),),
        fused=GROUPS,
        feeds=(
            *block_feeds(up=True),  # beside a gate, or in front of a ReLU
            *CROSS_VALUES,
            (r"(blocks/\d+)/cross_norm/weight", r"\1/cross/q"),
            ("encoder/norm/weight", r"blocks/\d+/cross/memory_(k|v)"),
            ("norm/weight", "head"),
        ),
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
        normal = nn.initializers.normal(c.init_scale * c.width**-0.5)
        out = nn.initializers.normal(c.init_scale * (c.heads * c.head_width) ** -0.5)
        down = nn.initializers.normal(c.init_scale * c.mlp_width**-0.5)
        mix = Attention(
            c.heads, c.heads, c.head_width, False, normal, out, self.policy, scale=1.0, name="attn"
        )
        y, cache = mix(RMSNorm(c.norm_eps, name="attn_norm")(x), context, cache, layer)
        x = x + dropout(y, c.dropout, rng, "attn")
        if self.reads:
            read = CrossAttention(
                c.heads, c.head_width, False, normal, out, self.policy, scale=1.0, name="cross"
            )
            y, cache = read(RMSNorm(c.norm_eps, name="cross_norm")(x), context, cache, layer)
            x = x + dropout(y, c.dropout, rng, "cross")
        activation, gated = FORMS[c.mlp]
        mlp = MLP(c.mlp_width, activation, gated, False, normal, down, self.policy, name="mlp")
        y = mlp(RMSNorm(c.norm_eps, name="mlp_norm")(x))
        return x + dropout(y, c.dropout, rng, "mlp"), cache


class _Head(nn.Module):
    config: Config
    policy: ops.Policy

    @nn.compact
    def __call__(self, x: jax.Array, table: Any = None) -> jax.Array:
        c = self.config
        x = RMSNorm(c.norm_eps, name="norm")(x)
        if table is None:
            table = leaf(
                self,
                "head",
                nn.initializers.normal(c.init_scale * c.width**-0.5),
                (c.vocab, x.shape[-1]),
            )
        x = x if c.scale == 1 else x * jnp.asarray(c.scale, x.dtype)
        return ops.einsum(
            "BTD,VD->BTV", x, table, dataclasses.replace(self.policy, activation_dtype="float32")
        )


@functools.cache
def bucket_table(buckets: int, distance: int) -> np.ndarray:
    """Return the bucket of each distance from 0 to `distance`.

    The first half of the buckets are single distances, the others are logarithmic. The table is
    made on the host, since the logarithms of two devices would disagree at the edge between two
    buckets.

    >>> bucket_table(8, 16).tolist()
    [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, 7]
    """
    half = buckets // 2
    steps = np.arange(distance + 1)
    octave = np.log(np.maximum(steps, 1).astype(np.float32) / np.float32(half)) / np.float32(
        math.log(distance / half)
    )
    far = half + (octave * np.float32(buckets - half)).astype(np.int64)
    return np.where(steps < half, steps, np.minimum(far, buckets - 1)).astype(np.int32)


def position_bias(
    table: Any, query: Int[Array, "#B T"], key: Int[Array, "#B S"], both: bool, config: Config
) -> Float[Array, "#B H T S"]:
    """Return the bias of the scores by the distance from query to key.

    Args:
      table: the leaf `[buckets, H]`.
      query: the positions of the queries.
      key: the positions of the keys.
      both: whether keys after the query have their own buckets (half of all); otherwise they count
        as distance 0.
      config: the config, for buckets and distance.
    """
    gap = key[:, None, :] - query[:, :, None]
    buckets = config.buckets // 2 if both else config.buckets
    steps = jnp.minimum(jnp.abs(gap) if both else jnp.maximum(-gap, 0), config.distance)
    found = jnp.asarray(bucket_table(buckets, config.distance))[steps]
    if both:
        found = found + jnp.where(gap > 0, jnp.int32(buckets), jnp.int32(0))
    rows = ops.embed(table, found.reshape(found.shape[0], -1))
    return rows.reshape(*found.shape, -1).transpose(0, 3, 1, 2)


@family(Config, SIZES)
def model(config: Config, policy: ops.Policy = ops.Policy()) -> Model:
    """Return the model of one config.

    Equal arguments give the same functions, so nothing is traced twice.
    """
    encoder_module = _Block(config, policy, False)
    block_module = _Block(config, policy, True)
    norm_module = RMSNorm(config.norm_eps)
    head_module = _Head(config, policy)

    def row(length: int) -> jax.Array:
        return jnp.arange(length, dtype=jnp.int32)[None]

    def embed(
        params: tree.Params,
        inputs: dict[str, jax.Array],
        cache: Any = None,
        rng: Any = None,
        train: bool = False,
    ) -> tuple[jax.Array, dict[str, Any]]:
        drop = rng if train else None

        def encode(source: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
            places = row(source.shape[1])
            encoder = params["encoder"]
            bias = position_bias(encoder["positions"], places, places, True, config)
            context = {"seen": ops.AttentionMask(valid=mask, causal=False), "bias": bias}
            x = dropout(ops.embed(params["embed"], source, policy), config.dropout, drop, "source")
            how = policy.remat, policy.microbatches, policy.unroll
            x, _, _ = repeat(
                block_of(encoder_module), encoder["blocks"], x, context, None, rng, train, *how
            )
            x = norm_module.apply({"params": encoder["norm"]}, x)
            return {"memory": dropout(x, config.dropout, drop, "memory")}  # pyright: ignore[reportArgumentType]

        positions, context = source_context(inputs, cache, encode)
        if cache is not None:
            query = positions
            key = row(cache.capacity)
        else:
            query = key = positions if "positions" in inputs else row(positions.shape[1])
        context["bias"] = position_bias(params["positions"], query, key, False, config)
        return dropout(
            ops.embed(params["embed"], inputs["tokens"], policy), config.dropout, drop, "tokens"
        ), context

    def head(params: tree.Params, x: jax.Array, rng: Any = None, train: bool = False) -> jax.Array:
        own = {name: params[name] for name in ("norm", "head") if name in params}
        logits = head_module.apply(
            {"params": own}, x, None if "head" in params else params["embed"]
        )
        assert isinstance(logits, jax.Array)
        return logits

    def init(key: jax.Array) -> tree.Params:
        keys = jax.random.split(key, 6)
        x = jnp.zeros((1, 1, config.width), policy.activation_dtype)
        mask = jnp.ones((1, 1), jnp.bool_)
        context = {"seen": ops.AttentionMask(), "memory": x, "memory_mask": mask}
        table = config.init_scale * jax.random.normal(keys[0], (config.vocab, config.width))
        near = lambda k: (
            config.init_scale
            * config.width**-0.5
            * jax.random.normal(k, (config.buckets, config.heads))
        )
        blocks = lambda module, k, n: init_layers(
            lambda k: dict(module.init(k, x, context, None, 0)["params"]), k, n
        )
        encoder = {
            "positions": near(keys[1]),
            "blocks": blocks(encoder_module, keys[2], config.encoder_depth),
            "norm": norm_module.init(key, x)["params"],
        }
        top = head_module.init(keys[3], x, table if config.tied else None)["params"]
        decoder = {
            "positions": near(keys[4]),
            "blocks": blocks(block_module, keys[5], config.depth),
        }
        params = {"embed": table, "encoder": encoder, **decoder, **top}
        # the factor that other models apply to the scores
        scale = lambda path, a: a * config.head_width**-0.5 if path.endswith("/q") else a
        return tree.map_leaves(scale, params)

    def init_cache(batch: int, capacity: int) -> CrossAttentionCache:
        return CrossAttentionCache.zeros(
            config.depth, batch, config.heads, capacity, config.head_width, policy
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
