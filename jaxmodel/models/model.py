"""`Model`: a frozen record of pure functions, and `Output`, what a model returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmodel import layers, ops, tree
from jaxmodel.errors import InputError
from jaxmodel.layers.repeat import Block
from jaxmodel.leaves.leaf import register

type Inputs = jax.Array | Mapping[str, jax.Array]


@register
class Output:
    """What `apply` returns: a pytree.

    Attributes:
      logits: `[B, T, V]` (or `[B, C]`), float32.
      hidden: `[B, T, D]`, what the head reads.
      cache: the cache after these tokens, or None.
      aux: named scalars summed over the layers (a load-balance loss).
    """

    logits: Any = None
    hidden: Any = None
    cache: Any = None
    aux: Any = dataclasses.field(default_factory=dict)


class Parts(NamedTuple):
    """The functions that `apply` is the composition of.

    embed(params, inputs, cache, rng, train) -> (x, context): activations, and what a step computes once for all layers.
    block(layer_params, x, context, cache, layer, rng, train) -> (x, cache, aux): one layer.
    head(params, x, rng, train) -> logits.
    """

    embed: Callable[..., tuple[jax.Array, dict[str, Any]]]
    block: Block
    head: Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model is its config and pure functions over a parameter tree.

    Attributes:
      config: the family's frozen `Config`.
      policy: how it computes.
      init: key -> params.
      apply: (params, inputs, cache=None, rng=None, train=False) -> Output. Inputs are a dict of `tokens` `[B, T]` and,
        if wanted, `positions`, `segments` (packed documents, 0 for padding) and `mask` (true for tokens; padding stands
        on the right). An array alone is taken as the tokens.
      parts: see `Parts`.
      init_cache: (batch, capacity) -> cache.
      rules: path -> PartitionSpec of the logical axes.
    """

    config: Any
    policy: ops.Policy
    init: Callable[[jax.Array], tree.Params]
    apply: Callable[..., Output]
    parts: Parts
    init_cache: Callable[[int, int], Any]
    rules: tree.Rules


def hidden(model: Model, params: tree.Params, inputs: Inputs, cache: Any = None, rng: Any = None, train: bool = False) -> Output:
    """`apply` without the head: `logits` is None. For a prefill, features, and losses that chunk the vocabulary."""
    return _hidden(model.parts, model.policy, params, inputs, cache, rng, train)


def check_sizes(config: Any, names: Iterable[str]) -> None:
    """Raise InputError where one of these sizes of a config is not a positive whole number."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{name} is {value!r}; allowed: a whole number of at least 1")


def compose(parts: Parts, policy: ops.Policy) -> Callable[..., Output]:
    """`apply`, as the composition of a model's parts."""

    def apply(params: tree.Params, inputs: Inputs, cache: Any = None, rng: Any = None, train: bool = False) -> Output:
        out = _hidden(parts, policy, params, inputs, cache, rng, train)
        return dataclasses.replace(out, logits=parts.head(params, out.hidden, _key(rng, _HEAD), train))  # pyright: ignore

    return apply


_EMBED, _HEAD = 2**32 - 1, 2**32 - 2  # what embed and head fold into the step's key; layer i folds in i


def _key(rng: Any, number: int) -> Any:
    return None if rng is None else jax.random.fold_in(rng, number)


def _hidden(parts: Parts, policy: ops.Policy, params: tree.Params, inputs: Inputs, cache: Any, rng: Any, train: bool) -> Output:
    named = dict(inputs) if isinstance(inputs, Mapping) else {"tokens": inputs}
    x, context = parts.embed(params, named, cache, _key(rng, _EMBED), train)
    x, cache, aux = layers.repeat(parts.block, params["blocks"], x, context, cache, rng, train, policy.remat)
    if cache is not None:
        mask = named.get("mask")
        cache = cache.advance(x.shape[1] if mask is None else jnp.sum(mask, axis=1, dtype=jnp.int32))
    return Output(hidden=x, cache=cache, aux=aux)


def decoder_context(inputs: Mapping[str, jax.Array], cache: Any) -> tuple[jax.Array, dict[str, Any]]:
    """Positions `[B, T]` and the context of a causal decoder: the mask, where there is no cache to give it."""
    tokens = inputs["tokens"]
    t = tokens.shape[1]
    if cache is not None:
        return inputs.get("positions", cache.positions(t)), {}
    positions = inputs.get("positions")
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), tokens.shape)
    return positions, {"mask": ops.causal_mask(t, inputs.get("segments"), inputs.get("mask"))}
