"""Recurrent encoder and decoder (Sutskever et al., 2014) with attention.

The attention is that of Bahdanau et al. (2014) or Luong et al. (2015). The encoder reads the source
in both directions; its last states are the decoder's first. The decoder's last layer reads the
encoder's outputs: at each step before its cell (additive), after all cells (multiplicative), or not
at all.

>>> rnn = model(SIZES["tiny"])
>>> params = jax.jit(rnn.init)(jax.random.key(0))
>>> source, tokens = jnp.zeros((2, 8), jnp.int32), jnp.zeros((2, 5), jnp.int32)
>>> jax.jit(rnn.apply)(params, {"source": source, "tokens": tokens}).logits.shape
(2, 5, 256)
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
from jaxmodel.layers import dropout, init_layers, leaf, repeat
from jaxmodel.layers.recurrent import BahdanauAttention, LuongAttention, Recurrent
from jaxmodel.models.family import family
from jaxmodel.models.model import Model, check_sizes
from jaxmodel.models.parts import Parts
from jaxmodel.models.seq2seq import source_context, source_inputs
from jaxmodel.ops.norms import on_last
from jaxmodel.ops.recurrent import GATES, STATES, StateCache, check_cell

ATTENTION = ("none", "additive", "multiplicative")


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a member of the family.

    Attributes:
      vocab: the size V of the vocabulary of source and target, which have separate tables.
      width: the width D of embeddings, states and memory; even, because each direction of the
        encoder has half of it.
      depth: the number of layers of the encoder, and of the decoder; the last state of an encoder
        layer is the first of the same decoder layer.
      cell: "lstm" or "gru".
      attention: one of `ATTENTION`.
      dropout: the dropout rate of the input of each layer (Zaremba et al., 2014).
      start: the token that a target begins with.
      context: the longest source or target that the model was made for.
    """

    vocab: int
    width: int
    depth: int
    cell: str = "lstm"
    attention: str = "additive"
    dropout: float = 0.0
    start: int = 0
    context: int = 512

    def __post_init__(self) -> None:
        check_sizes(self, ("vocab", "width", "depth", "context"))
        check_cell("cell", self.cell)
        one_of("attention", self.attention, ATTENTION)
        if self.width % 2:
            raise InputError(f"width: {self.width} given; allowed: an even number")


SIZES = {
    "tiny": Config(256, 32, 2),
    "tiny-gru": Config(256, 32, 3, "gru", "multiplicative"),
    "sutskever-2014": Config(80000, 1000, 4, attention="none"),
    "bahdanau-2014": Config(30000, 1000, 1, "gru", "additive"),
    "luong-2015": Config(50000, 1000, 4, "lstm", "multiplicative", 0.2),
}
"""The papers' cells, depths and widths.

Here, sources are read in both directions, and source and target have the same vocabulary.
"""


def axes(config: Config) -> Axes:
    """Return the axes of the leaves.

    Each direction of an encoder layer has its own units, `C0` and `C1` in the first. Concatenated,
    they are the input of the next layer, and the units of the decoder layer that starts with their
    state. A cache holds the states of all layers side by side, so there are always as many.
    """
    gates = GATES[config.cell]
    both = [f"C{2 * i}+C{2 * i + 1}" for i in range(config.depth)]
    rules = [("encoder/embed", "VD0 table"), ("embed", "VD1 table")]
    for i, units in enumerate(both):
        before = f"[{both[i - 1]}]" if i else ""
        for name, own in zip(("forward", "backward"), units.split("+"), strict=True):
            rules += _cell_axes(f"encoder/blocks/{i}/{name}", f"(g{own})", before or "D0", own)
        rules += _cell_axes(
            f"blocks/{i}/cell", f"[{'+'.join([units] * gates)}]", before or "D1", f"[{units}]"
        )
    top = both[-1]
    keys = "F" if config.attention == "additive" else f"[{top}]"
    reading = (
        (tree.optional("blocks/.*/cell/context"), f"[{'+'.join([top] * gates)}][{top}]"),
        (tree.optional("blocks/.*/attn/query"), f"F[{top}]"),
        (tree.optional("blocks/.*/attn/memory_k"), f"{keys}[{top}]"),
        (tree.optional("blocks/.*/attn/score"), "F", P()),
        (tree.optional("blocks/.*/mix"), f"F0[{top}+{top}]"),
    )
    head = (("head", f"V[{top}]" if config.attention == "none" else "VF0"), ("head_bias", "V"))
    return Axes((*rules, *reading, *head), (("g", gates),), fixed=("C",))


def _cell_axes(path: str, gates: str, before: str, own: str) -> list[Any]:
    return [
        (f"{path}/input", gates + before),
        (f"{path}/state", gates + own),
        (f"{path}/(input|state)_bias", gates, P()),
    ]


_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-1, out_axis=-2)


class _Encoder(nn.Module):
    config: Config
    policy: ops.Policy

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        c = self.config
        ends = []
        start = jnp.zeros((x.shape[0], STATES[c.cell], c.width // 2), jnp.float32)
        for name in ("forward", "backward"):
            run = Recurrent(c.cell, c.width // 2, _INIT, self.policy, name == "backward", name=name)
            ends.append(run(x, start, mask)[:2])
        shown, last = (jnp.concatenate(both, axis=-1) for both in zip(*ends, strict=True))
        return shown, last


class _Block(nn.Module):
    config: Config
    policy: ops.Policy
    reads: bool  # whether it reads the memory: the last layer, if there is attention

    @nn.compact
    def __call__(
        self, x: jax.Array, context: dict[str, Any], cache: Any, layer: Any
    ) -> tuple[jax.Array, Any]:
        c = self.config
        keys = None
        found = None
        start = (context["start"] if cache is None else cache.state)[layer]
        mask = context.get("mask")
        run = Recurrent(c.cell, c.width, _INIT, self.policy, name="cell")
        if not self.reads:
            y, last, _ = run(x, start, mask)
        else:
            memory, valid, keys = _memory(context, cache)
            if c.attention == "additive":
                read, keys = BahdanauAttention(c.width, _INIT, self.policy, name="attn")(
                    memory, valid, keys, c.width
                )
                y, last, found = run(x, start, mask, read)
            else:
                y, last, _ = run(x, start, mask)
                found, keys = LuongAttention(c.width, _INIT, self.policy, name="attn")(
                    y, memory, valid, keys
                )
            assert found is not None
            both = jnp.concatenate([found, y], axis=-1)
            y = jnp.tanh(
                ops.einsum(
                    "BTI,DI->BTD",
                    both,
                    leaf(self, "mix", _INIT, (c.width, both.shape[-1])),
                    self.policy,
                )
            )
        return y, None if cache is None else cache.remember(layer, last, keys)


def _memory(context: dict[str, Any], cache: Any) -> tuple[Any, Any, Any]:
    """Return the memory, where it is not padding, and the keys if an earlier call made them."""
    if "memory" in context:
        return context["memory"], context["memory_mask"], None
    return cache.memory, cache.valid, cache.keys


@family(Config, SIZES)
def model(config: Config, policy: ops.Policy = ops.Policy()) -> Model:
    """Return the model of one config.

    Equal arguments give the same functions, so nothing is traced twice.
    """
    encoder_module = _Encoder(config, policy)
    plain = _Block(config, policy, False)
    top = _Block(config, policy, True)
    wide = dataclasses.replace(policy, activation_dtype="float32")

    def encode_layer(params: Any, x: jax.Array, mask: jax.Array) -> Any:
        return encoder_module.apply({"params": params}, x, mask)

    def encoder_block(
        params: Any,
        x: Any,
        context: Any,
        cache: Any = None,
        layer: Any = 0,
        rng: Any = None,
        train: bool = False,
    ):
        x = dropout(x, config.dropout, rng if train else None)
        shown, last = encode_layer(params, x, context["mask"])
        return shown, jax.lax.dynamic_update_slice(cache, last[None], (layer, 0, 0, 0)), {}

    def embed(
        params: tree.Params,
        inputs: dict[str, jax.Array],
        cache: Any = None,
        rng: Any = None,
        train: bool = False,
    ) -> tuple[jax.Array, dict[str, Any]]:
        def encode(source: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
            states = jnp.zeros(
                (config.depth, source.shape[0], STATES[config.cell], config.width), jnp.float32
            )
            x = ops.embed(params["encoder"]["embed"], source, policy)
            blocks = params["encoder"]["blocks"]
            how = {"remat": policy.remat, "unroll": policy.unroll}
            x, states, _ = repeat(
                encoder_block, blocks, x, {"mask": mask}, states, rng, train, **how
            )
            return {"memory": x, "start": states}

        _, context = source_context(inputs, cache, encode)
        if "mask" in inputs:
            context["mask"] = inputs["mask"].astype(jnp.bool_)
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
        x = dropout(x, config.dropout, rng if train else None)
        x, cache = (top if "attn" in params else plain).apply(
            {"params": params}, x, context, cache, layer
        )  # pyright: ignore
        return x, cache, {}

    def head(params: tree.Params, x: jax.Array, rng: Any = None, train: bool = False) -> jax.Array:
        logits = ops.einsum("BTD,VD->BTV", x, params["head"], wide)
        return logits + on_last(params["head_bias"].astype(jnp.float32), 3)

    def init(key: jax.Array) -> tree.Params:
        keys = jax.random.split(key, 6)
        d = config.depth
        x = jnp.zeros((1, 1, config.width), policy.activation_dtype)
        mask = jnp.ones((1, 1), jnp.bool_)
        start = jnp.zeros((d, 1, STATES[config.cell], config.width), jnp.float32)
        context = {"memory": x, "memory_mask": mask, "start": start}
        table = lambda k: jax.random.normal(k, (config.vocab, config.width)) * config.width**-0.5
        layer = lambda module: lambda k: dict(module.init(k, x, context, None, 0)["params"])
        below = d if config.attention == "none" else d - 1
        blocks = init_layers(layer(plain), keys[2], below) if below else {}
        blocks |= {str(d - 1): layer(top)(keys[3])} if below < d else {}
        ends = init_layers(lambda k: dict(encoder_module.init(k, x, mask)["params"]), keys[4], d)
        return {
            "encoder": {"embed": table(keys[0]), "blocks": ends},
            "embed": table(keys[1]),
            "blocks": blocks,
            "head": table(keys[5]),
            "head_bias": jnp.zeros(config.vocab, jnp.float32),
        }

    def init_cache(batch: int, capacity: int) -> StateCache:
        return StateCache.zeros(
            config.cell, config.depth, batch, config.width, policy.activation_dtype
        )

    return Model(
        config, policy, init, Parts(embed, block, head), source_inputs, init_cache, axes(config)
    )
