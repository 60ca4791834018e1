"""Fine-tuning of few weights: low-rank adapters beside weights of any kind (LoRA, QLoRA), and a new head on a trained body.

    model, params = lora(model, params, [(".*/attn/(q|v)", LoRA(8)), (".*", None)], key)
    state, _ = fit(model, stream, TrainConfig(trainable=ADAPTERS), params=state.params)
    params, how = merge_adapters(state.params)

An adapter of a leaf `attn/q` lies beside it, under `attn/q_lora`: `down` `[rank, in]`, `up` `[out, rank]` and `scale`. So rules,
partition, optimisers, placement and checkpoints know it as any leaf, and the model itself does not change: the wrapped one hands
its parts an `Adapted` leaf in place of the two.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodel import tree
from jaxmodel.errors import InputError, at_least
from jaxmodel.leaves import Adapted, Compressed
from jaxmodel.models import Model
from jaxmodel.models.model import Parts, wrap

SUFFIX = "_lora"
ADAPTERS: tree.Rules = ((f".*{SUFFIX}/(down|up)", True), (".*", False))
"""What trains: the adapters alone. Put rules in front for a head or norms that train too."""


@dataclasses.dataclass(frozen=True)
class LoRA:
    """An adapter `scale up @ down` with `scale = alpha / rank`.

    Attributes:
      rank: rows of `down`.
      alpha: None for twice the rank.

    Raises:
      InputError: a rank below 1.
    """

    rank: int = 8
    alpha: float | None = None

    def __post_init__(self) -> None:
        at_least("rank", self.rank)

    @property
    def scale(self) -> float:
        """What the product is multiplied with."""
        return 2.0 if self.alpha is None else self.alpha / self.rank


def lora(model: Model, params: tree.Params, rules: tree.Rules, key: jax.Array) -> tuple[Model, tree.Params]:
    """The model and its parameters with adapters, which change nothing yet: `up` is zero, `down` normal with variance `1 / in`.

    Args:
      model: of any family.
      params: of arrays or compressed leaves; split where the rules tell layers of a segment apart.
      rules: path -> `LoRA` or None.
      key: of `down`; each layer's is folded from its path, so it is the same however layers are stacked.

    Returns:
      The wrapped model, whose `rules` cover the adapters, and the parameters with them.

    Raises:
      InputError: an adapter for what is no matrix, or a value that is no `LoRA`.

    >>> from jaxmodel.models import gpt2
    >>> model = gpt2.model(gpt2.SIZES["tiny"])
    >>> adapted, params = lora(model, model.init(jax.random.key(0)), [(".*/(q|v)", LoRA(4)), (".*", None)], jax.random.key(1))
    >>> {name: leaf.shape for name, leaf in params["blocks"]["0-2"]["attn"]["q_lora"].items()}
    {'down': (3, 4, 32), 'up': (3, 32, 4), 'scale': (3,)}
    """
    params, values = tree.match(rules, params)
    leaves = tree.flatten(params)
    for path, leaf in tuple(leaves.items()):
        one = values[path]
        if one is None:
            continue
        shape = tree.layer_shape(path, leaf)
        if not isinstance(one, LoRA) or len(shape) != 2:
            raise InputError(f"rules: {one!r} given for {path!r} of shape {shape}; allowed: a LoRA for a matrix, or None")
        leaves |= {f"{path}{SUFFIX}/{name}": a for name, a in _adapter(path, leaf, one, key).items()}
    return with_adapters(model), tree.unflatten(leaves)


@functools.cache
def with_adapters(model: Model) -> Model:
    """The model reading adapters where its parameters have them: what `lora` gives, for parameters that come from a
    checkpoint."""
    adapter = tree.optional(f".*{SUFFIX}/(down|up|scale)")
    wrapped = wrap(model, _reading)
    again = lambda policy: with_adapters(model.with_policy(policy))
    return dataclasses.replace(wrapped, rules=((adapter, jax.P()), *model.rules), with_policy=again)


def merge_adapters(
    params: tree.Params, requantize: Callable[[jax.Array], Any] | None = None
) -> tuple[tree.Params, dict[str, str]]:
    """The parameters with each adapter added to its weight, for the plain model.

    Args:
      params: with adapters.
      requantize: array -> leaf, for weights that were compressed, such as `compress.Rtn(bits=4, group=32)`; None to leave the sum
        as it is, in float32.

    Returns:
      The parameters, and by path how a weight was merged: "exact" (`w + scale up @ down`, computed in float32, in the weight's
      dtype), "decoded" (the same of what a compressed weight stands for, as an array) or "requantized".
    """
    leaves, how = tree.flatten(params), {}
    for path, leaf in _adapted(leaves).items():
        dense = jax.jit(Adapted.decode)(leaf)
        how[path] = "decoded" if isinstance(leaf.base, Compressed) else "exact"
        if requantize is not None and isinstance(leaf.base, Compressed):
            dense, how[path] = requantize(dense), "requantized"
        leaves[path] = dense
    return tree.unflatten({path: leaf for path, leaf in leaves.items() if not _is_adapter(path)}), how


def transplant(fresh: tree.Params, trained: tree.Params) -> tuple[tree.Params, list[str]]:
    """Fresh parameters with every leaf of trained ones that has a place there: a new head (of other classes, say) on a trained
    body.

    Args:
      fresh: of the new model.
      trained: of another; its layers may be stacked otherwise.

    Returns:
      The parameters, and the layer paths that stayed fresh, for rules: what else is there may be frozen.

    Raises:
      InputError: nothing of the trained parameters has a place.

    >>> fresh = {"body": jnp.zeros((2, 2)), "head": jnp.zeros((3, 2))}
    >>> params, left = transplant(fresh, {"body": jnp.ones((2, 2)), "head": jnp.ones((10, 2))})
    >>> left, float(params["body"].sum())
    (['head'], 4.0)
    """
    given, wanted = tree.flatten(tree.unstack(trained)), tree.flatten(tree.unstack(fresh))
    fits = [path for path, leaf in wanted.items() if path in given and given[path].shape == leaf.shape]
    if not fits:
        raise InputError("trained: none of its leaves has the path and shape of a fresh one; allowed: those of the same family")
    whole = tree.stack(tree.unflatten({path: given[path] if path in fits else leaf for path, leaf in wanted.items()}))
    return whole, [path for path in wanted if path not in fits]


def _adapter(path: str, leaf: Any, one: LoRA, key: jax.Array) -> dict[str, jax.Array]:
    out, width = leaf.shape[-2:]
    keys = [jax.random.fold_in(key, zlib.crc32(layer.encode())) for layer in tree.layer_paths(path)]
    downs = [jax.random.normal(key, (one.rank, width), jnp.float32) * jnp.float32(width**-0.5) for key in keys]
    down = jnp.stack(downs) if tree.is_stacked(path) else downs[0]
    lead = down.shape[:-2]
    return {"down": down, "up": jnp.zeros((*lead, out, one.rank), jnp.float32), "scale": jnp.full(lead, one.scale, jnp.float32)}


def _is_adapter(path: str) -> bool:
    return path.rsplit("/", 1)[0].endswith(SUFFIX)


def _adapted(leaves: dict[str, Any]) -> dict[str, Adapted]:
    """The weights that have an adapter, with it, by path."""
    heads = dict.fromkeys(path.rsplit("/", 1)[0] for path in leaves if _is_adapter(path))
    parts = {head.removesuffix(SUFFIX): {name: leaves[f"{head}/{name}"] for name in ("down", "up", "scale")} for head in heads}
    return {path: Adapted(leaves[path], **adapter) for path, adapter in parts.items()}


def _read(params: tree.Params) -> tree.Params:
    """A tree, or that of one layer, with `Adapted` leaves in place of weights and adapters."""
    out: tree.Params = {name: _read(node) if isinstance(node, dict) else node for name, node in params.items()}
    for name in [name for name in out if name.endswith(SUFFIX)]:
        base = name.removesuffix(SUFFIX)
        out[base] = Adapted(out[base], **out.pop(name))
    return out


def _reading(parts: Parts) -> Parts:
    def first(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda params, *args, **options: function(_read(params), *args, **options)

    return Parts(first(parts.embed), None if parts.block is None else first(parts.block), first(parts.head))
