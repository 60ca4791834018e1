"""Fine-tuning: another head on a body that has learnt, and rules for what trains and how fast.

>>> import optax
>>> from jaxmodel.adapt import scale_updates
>>> from jaxmodel.models import vit
>>> old = vit.model(vit.SIZES["tiny"])
>>> model, params = replace_head(old, jax.jit(old.init)(jax.random.key(0)), 3, jax.random.key(1))
>>> params["head"]["classes"].shape
(3, 32)
>>> rules = last_layers(params, 1)  # for TrainConfig(trainable=rules): the head and the last of three layers
>>> [tree.assign(rules, params)[path] for path in ("head/classes", "blocks/2/attn/q", "blocks/1/attn/q")]
[True, True, False]
>>> optimizer = optax.chain(optax.adamw(1e-3), scale_updates(layer_rates(params, 0.5)))
>>> tree.assign(layer_rates(params, 0.5), params)["blocks/1/attn/q"]
0.25
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array

from jaxmodel import tree
from jaxmodel.errors import InputError
from jaxmodel.models import Model
from jaxmodel.models.family import build_of

HEAD = re.compile(r"head(_bias|/.*)?")
"""The leaves of a head, in every family that has one of its own."""
_FIRST = r"(.*/)?(embed|positions|types|stem)(_[^/]*)?(/.*)?"  # what stands in front of the layers
_LAYER = re.compile(r"((?:.*/)?)blocks/(\d+)/.*")


def replace_head(
    model: Model, params: tree.Params, classes: int | Sequence[str], key: Array
) -> tuple[Model, tree.Params]:
    """The model and its parameters with a new head for other classes; all other leaves stay as they
    are.

    A `bert` of any head gets one of classes. Leaves of the body may be compressed or lie on a mesh;
    those of the head are new.

    Args:
      model: of a family whose config has `classes` or `labels`.
      params: its parameters, with whatever head, or none (see `without_projection`).
      classes: how many, or their names.
      key: of the new leaves.

    Raises:
      InputError: another family, a wrapped model, fewer than one class, or parameters of another
        body.
    """
    config: Any = model.config
    fields = set(getattr(config, "__dataclass_fields__", ()))
    if not fields & {"classes", "labels"} or not model.family:
        raise InputError(
            f"model: a config of {type(config).__module__} given; allowed: one with classes or "
            f"labels"
        )
    build = build_of(model)
    if build is None:
        raise InputError(
            "model: it is wrapped; allowed: one as its file makes it (wrap the result instead)"
        )
    names = (
        tuple(f"LABEL_{i}" for i in range(classes)) if isinstance(classes, int) else tuple(classes)
    )
    if not names:
        raise InputError(f"classes: {classes!r} given; allowed: at least one")
    if "classes" in fields:
        changed = dataclasses.replace(config, classes=len(names))
    else:
        changed = dataclasses.replace(
            config, labels=names, **({"head": "classify"} if "head" in fields else {})
        )
    new = build(changed, model.policy)
    fresh: Any = jax.jit(lambda key: _heads(new.init(key), True))(
        key
    )  # of a large model, only the head is made
    tree.check(params)
    body = _heads(params, False)
    needed: Any = jax.eval_shape(new.init, key)
    have, need = (
        {layer for path in tree.flatten(t) for layer in tree.layer_paths(path)}
        for t in (body, _heads(needed, False))
    )
    if unlike := sorted(have ^ need):
        kind = "too many" if unlike[0] in have else "missing"
        raise InputError(
            f"params: the leaf {unlike[0]!r} is {kind}; needed is the body of the model"
        )
    return new, tree.combine(body, fresh)


def last_layers(params: tree.Params, count: int) -> tree.Rules:
    """Rules of what trains (`TrainConfig.trainable`): the head, and the last `count` layers with
    the norm behind them.

    With 0 only the head learns, a *linear probe*. To unfreeze gradually (Howard & Ruder, 2018)
    train in stages, each from the parameters of the one before, with a growing count.

    Args:
      params: with layers under `blocks`, unless the count is 0.
      count: at least 0; at most as many layers as there are.

    Raises:
      InputError: a count out of range.
    """
    tree.check(params)
    deepest = _depths(params)
    most = min(deepest.values(), default=0)
    if not 0 <= count <= most:
        raise InputError(f"count: {count} given; allowed: 0 to {most}, the number of layers")
    rules: list[tuple[str, bool]] = [(tree.optional(tree.MEASURED), False), (HEAD.pattern, True)]
    for at, depth in deepest.items():
        rules += [(rf"{re.escape(at)}blocks/{i}/.*", True) for i in range(depth - count, depth)]
    return (*rules, (tree.optional(r"(?!.*blocks/)(.*/)?norm/.*"), count > 0), (".*", False))


def layer_rates(params: tree.Params, decay: float) -> tree.Rules:
    """Rules path -> factor of the learning rate, for `adapt.scale_updates`: `decay^(L - l)` for
    layer l of L, and 1 behind them.

    What stands in front of the layers (embeddings) has `decay^(L + 1)`: a layer counts from 1 then
    (Howard & Ruder, 2018; in this form Clark et al., 2020). Of a model with two stacks each counts
    by itself.

    Args:
      params: with layers under `blocks`.
      decay: above 0, at most 1; 0.65 to 0.9 are usual.

    Raises:
      InputError: a decay out of range, or no layers.
    """
    if not 0 < decay <= 1:
        raise InputError(f"decay: {decay} given; allowed: above 0 and at most 1")
    tree.check(params)
    deepest = _depths(params)
    if not deepest:
        raise InputError(
            "params: no layers under 'blocks'; give adapt.scale_updates rules of your own"
        )
    rules: list[tuple[str, float]] = []
    for at, depth in deepest.items():
        rules += [
            (tree.optional(rf"{re.escape(at)}blocks/{i}/.*"), decay ** (depth - i))
            for i in range(depth)
        ]
    return (*rules, (tree.optional(_FIRST), decay ** (max(deepest.values()) + 1)), (".*", 1.0))


def _depths(params: tree.Params) -> dict[str, int]:
    """How many layers stand under each `blocks`, by what is in front of that in a path."""
    found: dict[str, int] = {}
    for path in tree.flatten(params):
        for layer in tree.layer_paths(path):
            if match := _LAYER.fullmatch(layer):
                found[match[1]] = max(found.get(match[1], 0), int(match[2]) + 1)
    return found


def _heads(params: tree.Params, wanted: bool) -> tree.Params:
    """The leaves of the head, or all others."""
    return tree.unflatten(
        {
            path: leaf
            for path, leaf in tree.flatten(params).items()
            if bool(HEAD.fullmatch(path)) == wanted
        }
    )


def transplant(fresh: tree.Params, trained: tree.Params) -> tuple[tree.Params, list[str]]:
    """Fresh parameters with every leaf of trained ones that has a place there: a new head (of other
    classes, say) on a trained body.

    Args:
      fresh: of the new model.
      trained: of another; its layers may be stacked otherwise.

    Returns:
      The parameters, and the layer paths that stayed fresh, for rules: what else is there may be
      frozen.

    Raises:
      InputError: nothing of the trained parameters has a place.

    >>> import jax.numpy as jnp
    >>> fresh = {"body": jnp.zeros((2, 2)), "head": jnp.zeros((3, 2))}
    >>> params, left = transplant(fresh, {"body": jnp.ones((2, 2)), "head": jnp.ones((10, 2))})
    >>> left, float(params["body"].sum())
    (['head'], 4.0)
    """
    given = tree.flatten(tree.unstack(trained))
    wanted = tree.flatten(tree.unstack(fresh))
    fits = [
        path for path, leaf in wanted.items() if path in given and given[path].shape == leaf.shape
    ]
    if not fits:
        raise InputError(
            "trained: none of its leaves has the path and shape of a fresh one; allowed: those of "
            "the same family"
        )
    whole = tree.stack(
        tree.unflatten(
            {path: given[path] if path in fits else leaf for path, leaf in wanted.items()}
        )
    )
    return whole, [path for path in wanted if path not in fits]
