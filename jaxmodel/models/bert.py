"""BERT (Devlin et al., 2018): a text encoder with a head for masked tokens, classes or embeddings.

It has a norm after each part, learnt positions and token types, biases, and exact GELU. RoBERTa
(Liu et al., 2019) and XLM-R (Conneau et al., 2020) count positions from 2; DistilBERT (Sanh et al.,
2019) has no token types, and its classifier has a ReLU.

>>> bert = model(SIZES["tiny"])
>>> params = jax.jit(bert.init)(jax.random.key(0))
>>> jax.jit(bert.apply)(params, jnp.zeros((2, 8), jnp.int32)).logits.shape
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
from jaxmodel.errors import InputError, at_least, one_of
from jaxmodel.layers import ACTIVATIONS, BLOCK_AXES, LayerNorm, init_layers, leaf, linear
from jaxmodel.layers.encoder import EncoderBlock, PooledHead
from jaxmodel.layers.feeds import block_feeds
from jaxmodel.layers.fuse import GROUPS
from jaxmodel.models.family import family
from jaxmodel.models.model import Model, check_sizes, encoder_sees, positions_of, token_inputs
from jaxmodel.models.parts import Parts, encoder_layer
from jaxmodel.models.sentences import check_pooling, pool
from jaxmodel.ops.norms import on_last

HEADS = ("mlm", "classify", "embed")
POOL_ACTIVATIONS = {"tanh": jnp.tanh, "relu": jax.nn.relu}


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a member of the family.

    Attributes:
      vocab: the size V of the vocabulary.
      width: the model width D.
      depth: the number of layers L.
      heads: the number of heads H, a divisor of D.
      mlp_width: the feed-forward width F.
      context: the longest sequence, which is the number of learnt positions.
      head: what `apply` returns: "mlm", logits `[B, T, V]` of every token; "classify", logits
        `[B, C]` from the first token; "embed", one vector `[B, D]` pooled from the last
        activations.
      labels: the names of the classes, for the head "classify".
      types: the number of token types (0 in a first text, 1 in a second); 0 for none.
      activation: a name of `layers.ACTIVATIONS`.
      norm_eps: added to the variance by the layer norms.
      init_scale: the standard deviation of new weights.
      first_position: the row of the table of positions for a text's first token.
      pool_activation: the activation after the dense layer of the head "classify", "tanh" or
        "relu".
      problem: the meaning of the logits of the head "classify", named as HF's `problem_type`; see
        `predict_fn`.
      pooling: how the head "embed" pools a text: names of `sentences.POOLINGS`, whose results are
        concatenated.
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
    types: int = dataclasses.field(default=2, metadata={"least": 0})
    activation: str = "gelu"
    norm_eps: float = 1e-12
    init_scale: float = 0.02
    first_position: int = 0
    pool_activation: str = "tanh"
    problem: str = ""
    pooling: tuple[str, ...] = ("mean",)
    tied: bool = True

    def __post_init__(self) -> None:
        check_sizes(self, ("vocab", "width", "depth", "heads", "mlp_width", "context"))
        at_least("types", self.types, 0)
        at_least("first_position", self.first_position, 0)
        if self.width % self.heads:
            raise InputError(
                f"heads: {self.heads} given; allowed: a divisor of the width {self.width}"
            )
        one_of("head", self.head, HEADS)
        one_of("activation", self.activation, ACTIVATIONS)
        one_of("pool_activation", self.pool_activation, POOL_ACTIVATIONS)
        check_pooling(self.pooling)
        if bool(self.labels) != (self.head == "classify"):
            raise InputError(
                f"labels: {len(self.labels)} given; the head {self.head!r} needs "
                f"{_wanted(self.head)}"
            )


def _wanted(head: str) -> str:
    return "at least one" if head == "classify" else "none"


_FOUR = ("no", "yes", "maybe", "never")

SIZES = {
    "tiny": Config(256, 32, 3, 4, 64, 128),
    "tiny-classify": Config(256, 48, 3, 4, 64, 128, "classify", _FOUR),
    "tiny-embed": Config(256, 32, 3, 4, 64, 128, "embed"),
    "tiny-distil": Config(
        256, 48, 3, 4, 64, 128, "classify", _FOUR, 0, first_position=2, pool_activation="relu"
    ),
    "bert-base": Config(30522, 768, 12, 12, 3072, 512),
    "bert-large": Config(30522, 1024, 24, 16, 4096, 512),
    "minilm-l6": Config(30522, 384, 6, 12, 1536, 512, "embed"),
    "roberta-base": Config(50265, 768, 12, 12, 3072, 512, types=1, norm_eps=1e-5, first_position=2),
    "roberta-large": Config(
        50265, 1024, 24, 16, 4096, 512, types=1, norm_eps=1e-5, first_position=2
    ),
    "xlm-roberta-base": Config(
        250002, 768, 12, 12, 3072, 512, types=1, norm_eps=1e-5, first_position=2
    ),
    "xlm-roberta-large": Config(
        250002, 1024, 24, 16, 4096, 512, types=1, norm_eps=1e-5, first_position=2
    ),
    "distilbert-base": Config(30522, 768, 6, 12, 3072, 512, types=0),
}


def axes(config: Config) -> Axes:
    """Return the axes of the leaves."""
    return Axes(
        (
            ("embed", "VD table"),
            ("positions", "tD table"),
            (tree.optional("types"), "sD table"),
            *BLOCK_AXES,
            (tree.optional("head/dense"), "DD", P("tensor", "fsdp")),
            (tree.optional("head/dense_bias"), "D"),
            (tree.optional("head/words"), "VD"),
            (tree.optional("head/bias"), "V"),
            (tree.optional("head/pool"), "F0D"),
            (tree.optional("head/pool_bias"), "F0"),
            (tree.optional("head/classes"), "cF0"),
            (tree.optional("head/classes_bias"), "c"),
        ),
        sizes=(("h", config.width // config.heads),),
        ordered=("V", "D") if config.head == "embed" else ("V",),
        fused=GROUPS,
        feeds=(
            *block_feeds(norms_before=False, up=config.activation == "relu"),
            ("head/norm/(weight|bias)", "head/words"),
        ),
        norm_mean=True,
    )


class _MaskedHead(nn.Module):
    """A dense layer and a norm, then logits of the tokens by the embedding or a table `words`."""

    config: Config
    policy: ops.Policy

    @nn.compact
    def __call__(self, x: jax.Array, table: Any) -> jax.Array:
        c = self.config
        y = linear(
            self, x, {"dense": x.shape[-1]}, nn.initializers.normal(c.init_scale), True, self.policy
        )[0]
        y = LayerNorm(c.norm_eps, name="norm")(ACTIVATIONS[c.activation](y))
        if not c.tied:
            normal = nn.initializers.normal(c.init_scale)
            table = leaf(self, "words", normal, (c.vocab, x.shape[-1]))
        logits = ops.einsum(
            "BTD,VD->BTV", y, table, dataclasses.replace(self.policy, activation_dtype="float32")
        )
        bias = leaf(self, "bias", nn.initializers.zeros, (c.vocab,))
        return logits + on_last(bias.astype(jnp.float32), logits.ndim)


@family(Config, SIZES)
def model(config: Config, policy: ops.Policy = ops.Policy()) -> Model:
    """Return the model of one config.

    Equal arguments give the same functions, so nothing is traced twice.

    Inputs are `tokens` `[B, T]` and, if wanted, `types` (token types, 0 where they are left out),
    `mask`, `positions`; with the head "mlm" also `segments`.
    """
    c = config
    norm_module = LayerNorm(config.norm_eps)
    block_module = EncoderBlock(
        *(c.heads, c.mlp_width, c.activation, c.norm_eps), True, c.init_scale, c.init_scale, policy
    )
    masked_head = _MaskedHead(c, policy)
    pooled_head = PooledHead(
        True, len(c.labels), c.init_scale, policy, POOL_ACTIVATIONS[c.pool_activation]
    )

    def embed(
        params: tree.Params,
        inputs: dict[str, jax.Array],
        cache: Any = None,
        rng: Any = None,
        train: bool = False,
    ) -> tuple[jax.Array, dict[str, Any]]:
        tokens = inputs["tokens"]
        seen = encoder_sees(inputs, c.head)
        positions = positions_of(inputs)
        positions = positions + c.first_position
        x = ops.embed(params["embed"], tokens, policy) + ops.embed(
            params["positions"], positions, policy, "SD"
        )
        if c.types:
            x = x + ops.embed(
                params["types"], inputs.get("types", jnp.zeros_like(tokens)), policy, "SD"
            )
        elif "types" in inputs:
            raise InputError("types: given to a model without token types; leave them out")
        normed: Any = norm_module.apply({"params": params["embed_norm"]}, x)
        return normed, {"seen": seen}

    def head(params: tree.Params, x: jax.Array, rng: Any = None, train: bool = False) -> jax.Array:
        if c.head == "embed":
            return pool(x, jnp.any(x != 0, axis=-1), c.pooling)
        own = {"params": params["head"]}
        logits = (
            pooled_head.apply(own, x[:, 0])
            if c.head == "classify"
            else masked_head.apply(own, x, params["embed"])
        )
        assert isinstance(logits, jax.Array)
        return logits

    def init(key: jax.Array) -> tree.Params:
        keys = jax.random.split(key, 6)
        rows = {"embed": c.vocab, "positions": c.first_position + c.context, "types": c.types}
        tables = {
            name: c.init_scale * jax.random.normal(k, (count, c.width))
            for (name, count), k in zip(rows.items(), keys[:3], strict=True)
            if count
        }
        x = jnp.zeros((1, 1, c.width), policy.activation_dtype)
        params = {**tables, "embed_norm": norm_module.init(keys[3], x)["params"]}
        context = embed(params, {"tokens": jnp.zeros((1, 1), jnp.int32)})[1]
        params["blocks"] = init_layers(
            lambda k: dict(block_module.init(k, x, context)["params"]), keys[4], c.depth
        )
        if c.head == "classify":
            params["head"] = dict(pooled_head.init(keys[5], x[:, 0])["params"])
        elif c.head == "mlm":
            params["head"] = dict(masked_head.init(keys[5], x, params["embed"])["params"])
        return params

    layer = encoder_layer(block_module, zero_padding=c.head == "embed")
    return Model(config, policy, init, Parts(embed, layer, head), token_inputs, None, axes(config))
