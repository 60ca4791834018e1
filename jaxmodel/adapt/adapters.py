"""Low-rank adapters beside weights of any kind (LoRA: Hu et al., 2021; QLoRA).

    model, params = lora(model, params, [(".*/attn/(q|v)", LoRA(8)), (".*", None)], key)
    state, _ = fit(model, stream, TrainConfig(trainable=ADAPTERS), params=params)
    params, how = merge_adapters(state.params)

The adapter of a leaf `attn/q` lies beside it, under `attn/q_lora`: `down` `[rank, in]`, `up`
`[out, rank]` and `scale`, and with dropout also its rate, `dropout`. So rules, partition,
optimisers, placement and checkpoints treat it like any other leaf. The model itself does not
change: the wrapped model gives its parts an `Adapted` leaf in place of the two. On disk, adapters
are a file of their own in PEFT's layout: `hub.save_adapters`, `hub.add_adapters`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodel import tree
from jaxmodel.axes import Axes, read, roles, written
from jaxmodel.brief import briefly
from jaxmodel.errors import BELOW_ONE, InputError, at_least, within
from jaxmodel.leaves import Adapted, Compressed
from jaxmodel.leaves.adapted import PARTS, SUFFIX, read_adapters
from jaxmodel.models.model import Model, Parts, wrap
from jaxmodel.rng import fold

ADAPTERS: tree.Rules = ((f".*{SUFFIX}/(down|up)", True), (".*", False))
"""Rules that train the adapters alone. Put rules in front for a head or norms that train too."""


_PART = re.compile(f".*{SUFFIX}/(down|up|scale|dropout)")


@briefly
@dataclasses.dataclass(frozen=True)
class LoRA:
    """An adapter `scale up @ down` with `scale = alpha / rank`.

    Attributes:
      rank: number of rows of `down`.
      alpha: numerator of the scale; None for twice the rank (with `rslora`, for 16).
      rslora: use `scale = alpha / sqrt(rank)`, which suits high ranks (Kalajdzievski, 2023).
      dropout: in training, the probability that an element of the adapter's input is dropped, as in
        PEFT; the others are divided by `1 - dropout`. The weight itself sees the whole input. The
        draw depends only on the step's key, so a run can be repeated. Two kinds of adapters have no
        dropout: that of a language model's head, because losses call it without a key, and that of
        an embedding table.

    Raises:
      InputError: a rank below 1, an alpha that is not a positive number, or a dropout below 0 or
        not below 1.
    """

    rank: int = 8
    alpha: float | int | None = None
    rslora: bool = False
    dropout: float | int = 0.0

    def __post_init__(self) -> None:
        at_least("rank", self.rank)
        if self.alpha is not None and not (
            isinstance(self.alpha, int | float) and 0 < self.alpha < math.inf
        ):
            raise InputError(f"alpha: {self.alpha!r} given; allowed: a number above 0, or None")
        within("dropout", self.dropout, BELOW_ONE)

    @property
    def scale(self) -> float:
        """Return the factor of the product `up @ down`."""
        if self.rslora:
            return (16.0 if self.alpha is None else self.alpha) / math.sqrt(self.rank)
        return 2.0 if self.alpha is None else self.alpha / self.rank


def lora(
    model: Model, params: tree.Params, rules: tree.Rules | LoRA, key: jax.Array
) -> tuple[Model, tree.Params]:
    """Add adapters to a model and its parameters, without changing its outputs.

    `up` starts at zero and `down` is normal with variance `1 / in`.

    Args:
      model: a model of any family.
      params: arrays or compressed leaves. A segment is split where the rules treat its layers
        differently.
      rules: path of a weight -> `LoRA` or None; or one `LoRA` for every matrix of the layers.
      key: for `down`. The key of each layer is folded from its path, so it does not depend on how
        layers are stacked.

    Returns:
      The wrapped model, whose `rules` cover the adapters, and the parameters with adapters.

    Raises:
      InputError: an adapter for a leaf that is not a matrix or already has one, or a value that is
        no `LoRA`.

    >>> from jaxmodel.models import gpt2
    >>> model = gpt2.model(gpt2.SIZES["tiny"])
    >>> rules = [(".*/(q|v)", LoRA(4)), (".*", None)]
    >>> start = jax.jit(model.init)(jax.random.key(0))
    >>> adapted, params = lora(model, start, rules, jax.random.key(1))
    >>> {name: leaf.shape for name, leaf in params["blocks"]["0-2"]["attn"]["q_lora"].items()}
    {'down': (3, 4, 32), 'up': (3, 32, 4), 'scale': (3,)}
    """
    tree.check(params)
    base, _ = split_adapters(params)
    values = _matrices(model, base, rules) if isinstance(rules, LoRA) else tree.assign(rules, base)
    there = [
        layer
        for path in tree.flatten(params)
        if is_adapter(path)
        for layer in tree.layer_paths(path)
    ]
    params = tree.split(params, {**values, **dict.fromkeys(there)})
    leaves = tree.flatten(params)
    for path, leaf in tuple(leaves.items()):
        one = None if is_adapter(path) else values[tree.layer_paths(path)[0]]
        if one is None:
            continue
        shape = tree.layer_shape(path, leaf)
        if not isinstance(one, LoRA) or len(shape) != 2:
            raise InputError(
                f"rules: {one!r} given for {path!r} of shape {shape}; allowed: a LoRA for a "
                f"matrix, or None"
            )
        if f"{path}{SUFFIX}/down" in leaves:
            raise InputError(
                f"rules: {path!r} has an adapter already; merge it first (merge_adapters), or "
                f"give None"
            )
        leaves |= {
            f"{path}{SUFFIX}/{name}": a for name, a in _adapter(path, leaf, one, key).items()
        }
    return with_adapters(model), tree.unflatten(leaves)


def _matrices(model: Model, params: tree.Params, one: LoRA) -> dict[str, LoRA | None]:
    """Return the adapter for each layer path.

    Those of matrices in layers get one; in a model without layers, all matrices except heads.
    """
    found = {path for path, role in roles(model.axes, params).items() if role == "matrix"}
    inside = {path for path in found if tree.BLOCKS in path.split("/")}
    if not found:
        raise InputError(
            f"rules: {one!r} given, but the model has no matrices; give rules for its leaves"
        )
    paths = (layer for path in tree.flatten(params) for layer in tree.layer_paths(path))
    return {path: one if path in (inside or found) else None for path in paths}


def is_adapter(path: str) -> bool:
    """Return whether a path is that of a part of an adapter."""
    return _PART.fullmatch(path) is not None


def split_adapters(params: tree.Params) -> tuple[tree.Params, tree.Params]:
    """Split a tree into the leaves without adapters and the adapters alone."""
    leaves = tree.flatten(params)
    parts = (
        {path: leaf for path, leaf in leaves.items() if is_adapter(path) is wanted}
        for wanted in (False, True)
    )
    base, adapters = map(tree.unflatten, parts)
    return base, adapters


@functools.cache
def with_adapters(model: Model) -> Model:
    """Wrap a model so that it reads adapters wherever its parameters have them.

    `lora` returns such a model; use this for parameters that come from a checkpoint.
    """
    if any(f"{SUFFIX}/" in pattern for pattern, *_ in model.axes.rules):
        return model
    again = lambda policy: with_adapters(model.with_policy(policy))
    axes = dataclasses.replace(model.axes, rules=(*_axes(model.axes), *model.axes.rules))
    return dataclasses.replace(wrap(model, _reading), axes=axes, with_policy=again)


def _axes(axes: Axes) -> tuple[Any, ...]:
    """Return the axis rules of all adapters that a model can have.

    They are small, so every device holds all of them.
    """
    rules = []
    for pattern, text, *_ in axes.rules:
        letters = read(text).axes
        if len(letters) not in (0, 2):
            continue
        out, into = map(written, letters) if letters else "__"
        for name, own in (("down", f"_{into}"), ("up", f"{out}_"), ("scale", ""), ("dropout", "")):
            rules.append((tree.optional(f"(?:{pattern}){SUFFIX}/{name}"), own, jax.P()))
    return tuple(rules)


def merge_adapters(
    params: tree.Params, requantize: Callable[[jax.Array], Any] | None = None
) -> tuple[tree.Params, dict[str, str]]:
    """Add each adapter to its weight, and return the parameters of the plain model.

    Args:
      params: parameters with adapters.
      requantize: array -> leaf, for weights that were compressed, such as
        `compress.Rtn(bits=4, group=32)`; None to leave the sum as an array in float32.

    Returns:
      The parameters, and for each path how its weight was merged: "exact" (`w + scale up @ down`,
      computed in float32, stored in the weight's dtype), "decoded" (the same sum for the decoded
      values of a compressed weight, as an array) or "requantized".
    """
    tree.check(params)
    leaves = tree.flatten(params)
    how = {}
    for path, leaf in _adapted(leaves).items():
        leaf.check()
        dense = jax.jit(Adapted.decode)(leaf)
        how[path] = "decoded" if isinstance(leaf.base, Compressed) else "exact"
        if requantize is not None and isinstance(leaf.base, Compressed):
            dense, how[path] = requantize(dense), "requantized"
        leaves[path] = dense
    return tree.unflatten(
        {path: leaf for path, leaf in leaves.items() if not is_adapter(path)}
    ), how


def _adapter(path: str, leaf: Any, one: LoRA, key: jax.Array) -> dict[str, jax.Array]:
    out, width = leaf.shape[-2:]
    keys = [fold(key, layer) for layer in tree.layer_paths(path)]
    downs = [
        jax.random.normal(key, (one.rank, width), jnp.float32) * jnp.float32(width**-0.5)
        for key in keys
    ]
    down = jnp.stack(downs) if tree.is_stacked(path) else downs[0]
    lead = down.shape[:-2]
    rate = {"dropout": jnp.full(lead, one.dropout, jnp.float32)} if one.dropout else {}
    up = jnp.zeros((*lead, out, one.rank), jnp.float32)
    scale = jnp.full(lead, one.scale, jnp.float32)
    return {"down": down, "up": up, "scale": scale, **rate}


def _adapted(leaves: dict[str, Any]) -> dict[str, Adapted]:
    """Return the weights that have an adapter, each as an `Adapted` leaf, by path."""
    heads = dict.fromkeys(path.rsplit("/", 1)[0] for path in leaves if is_adapter(path))
    for head in heads:
        for path in (head.removesuffix(SUFFIX), *(f"{head}/{name}" for name in sorted(PARTS))):
            if path not in leaves:
                raise InputError(
                    f"params: {path!r} is missing, though there is an adapter {head!r}"
                )
    parts = {
        head.removesuffix(SUFFIX): {name: leaves[f"{head}/{name}"] for name in PARTS}
        for head in heads
    }
    return {path: Adapted(leaves[path], **adapter) for path, adapter in parts.items()}


def _reading(parts: Parts) -> Parts:
    def embed(
        params: tree.Params, inputs: Any, cache: Any = None, rng: Any = None, train: bool = False
    ) -> Any:
        return parts.embed(
            read_adapters(params, _dropout_key(rng, train)), inputs, cache, rng, train
        )

    def head(params: tree.Params, x: jax.Array, rng: Any = None, train: bool = False) -> jax.Array:
        return parts.head(read_adapters(params, _dropout_key(rng, train)), x, rng, train)

    if (block := parts.block) is None:
        return Parts(embed, None, head)

    def one(
        params: tree.Params,
        x: jax.Array,
        context: Any,
        cache: Any = None,
        layer: Any = 0,
        rng: Any = None,
        train: bool = False,
    ) -> Any:
        return block(
            read_adapters(params, _dropout_key(rng, train)), x, context, cache, layer, rng, train
        )

    return Parts(embed, one, head)


def _dropout_key(rng: Any, train: bool) -> Any:
    return fold(rng, "adapter dropout") if train and rng is not None else None
