"""Fine-tuning: a new head on a trained body, and rules for what trains and how fast.

>>> import optax
>>> from jaxmodel.adapt import scale_by_path
>>> from jaxmodel.models import vit
>>> old = vit.model(vit.SIZES["tiny"])
>>> model, params = replace_head(old, jax.jit(old.init)(jax.random.key(0)), 3, jax.random.key(1))
>>> params["head"]["classes"].shape
(3, 32)
>>> rules = last_layers(model, params, 1)  # for TrainConfig(trainable=rules): of three layers one
>>> trains = tree.assign(rules, params)
>>> [trains[path] for path in ("head/classes", "blocks/2/attn/q", "blocks/1/attn/q")]
[True, True, False]
>>> optimizer = optax.chain(optax.adamw(1e-3), scale_by_path(layer_rates(model, params, 0.5)))
>>> tree.assign(layer_rates(model, params, 0.5), params)["blocks/1/attn/q"]
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
from jaxmodel.axes import heads, role_of, trainable
from jaxmodel.errors import FACTOR, InputError, within
from jaxmodel.models import Model
from jaxmodel.models.family import build_of
from jaxmodel.models.reads import reads

_LAYER = re.compile(r"((?:.*/)?)blocks/(\d+)/.*")


def replace_head(
    model: Model, params: tree.Params, classes: int | Sequence[str], key: Array
) -> tuple[Model, tree.Params]:
    """Return a model and its parameters with a new head for other classes.

    All other leaves stay as they are. A `bert` with any head gets a classification head. Leaves of
    the body may be compressed or lie on a mesh; those of the head are new.

    Args:
      model: a model of a family whose config has `classes` or `labels`.
      params: its parameters, with any head or none (see `without_projection`).
      classes: the number of classes, or their names.
      key: for the new leaves.

    Raises:
      InputError: another family, a wrapped model, fewer than one class, or parameters of another
        body.
    """
    config: Any = model.config
    fields = set(getattr(config, "__dataclass_fields__", ()))
    if not fields & {"classes", "labels"} or not model.family:
        raise InputError(
            f"model: a config of {type(config).__module__} given; allowed: a config with classes "
            "or labels"
        )
    build = build_of(model)
    if build is None:
        raise InputError(
            "model: a wrapped model given; allowed: a model as its family makes it (wrap the "
            "result instead)"
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
    tree.check(params)
    body = _without_head(model, params)
    needed: Any = jax.eval_shape(new.init, key)
    head = heads(new.axes, needed)

    def init_head(key: Array) -> dict[str, Array]:
        whole = tree.flatten(new.init(key))
        return {path: whole[path] for path in head}

    fresh = jax.jit(init_head)(key)  # of a large model, only the head is made
    have, need = (
        {layer for path in tree.flatten(t) for layer in tree.layer_paths(path)}
        for t in (body, _without_head(new, needed))
    )
    if unlike := sorted(have ^ need):
        kind = "too many" if unlike[0] in have else "missing"
        raise InputError(
            f"params: the leaf {unlike[0]!r} is {kind}; allowed: the parameters of the model's body"
        )
    return new, tree.combine(body, tree.unflatten(fresh))


def last_layers(model: Model, params: tree.Params, count: int) -> tree.Rules:
    """Return rules that train the head, the last `count` layers and what stands behind them.

    They are for `TrainConfig.trainable`. With 0 only the head learns, a *linear probe*. To unfreeze
    gradually (Howard & Ruder, 2018), train in stages with a growing count, each from the parameters
    of the one before.

    Args:
      model: its axes say which leaves are the head, its trace which stand behind the layers.
      params: parameters with layers under `blocks`, unless the count is 0.
      count: from 0 to the number of layers.

    Raises:
      InputError: a count out of range.
    """
    tree.check(params)
    deepest = _depths(params)
    most = min(deepest.values(), default=0)
    if not 0 <= count <= most:
        raise InputError(f"count: {count} given; allowed: 0 to {most}, the number of layers")
    trains = trainable(model.axes)
    paths = {layer for path in tree.flatten(params) for layer in tree.layer_paths(path)}
    top = heads(model.axes, params) | (_behind(model) & paths if count else set())
    rules = [(re.escape(path), False) for path in sorted(paths) if not trains(path)]
    rules += [(re.escape(path), True) for path in sorted(top) if trains(path)]
    for at, depth in deepest.items():
        rules += [(rf"{re.escape(at)}blocks/{i}/.*", True) for i in range(depth - count, depth)]
    return (*rules, (".*", False))


def layer_rates(model: Model, params: tree.Params, decay: float) -> tree.Rules:
    """Return rules path -> factor of the learning rate, smaller for the layers near the input.

    The factor is `decay^(L - l)` for layer l of L (l counts from 0), 1 for the leaves behind the
    layers and `decay^(L + 1)` for those in front of them (embeddings). If a model has two stacks,
    each counts by itself. Use the rules with `adapt.scale_by_path` (Howard & Ruder, 2018; in this
    form Clark et al., 2020).

    Args:
      model: its trace says what stands in front of the layers.
      params: parameters with layers under `blocks`.
      decay: above 0, at most 1; 0.65 to 0.9 are usual.

    Raises:
      InputError: a decay out of range, or no layers.
    """
    within("decay", decay, FACTOR)
    tree.check(params)
    deepest = _depths(params)
    if not deepest:
        raise InputError(
            "params: no layers under 'blocks'; give adapt.scale_by_path rules of your own"
        )
    rules: list[tuple[str, float]] = []
    for at, depth in deepest.items():
        rules += [
            (tree.optional(rf"{re.escape(at)}blocks/{i}/.*"), decay ** (depth - i))
            for i in range(depth)
        ]
    paths = {layer for path in tree.flatten(params) for layer in tree.layer_paths(path)}
    outside = {path for path in paths if not _LAYER.fullmatch(path)}
    first = decay ** (max(deepest.values()) + 1)
    rules += [(re.escape(path), first) for path in sorted(outside - _behind(model))]
    return (*rules, (".*", 1.0))


def _behind(model: Model) -> set[str]:
    """Return the leaves behind some layers; a table is looked up, which is in front of them."""
    role = role_of(model.axes)
    return {
        path
        for path, read in reads(model).items()
        if not _LAYER.fullmatch(path)
        and role(path, (1, 1)) != "table"
        and any(map(_LAYER.fullmatch, read.always))
    }


def _depths(params: tree.Params) -> dict[str, int]:
    """Return the number of layers under each `blocks`, keyed by the prefix of the path."""
    found: dict[str, int] = {}
    for path in tree.flatten(params):
        for layer in tree.layer_paths(path):
            if match := _LAYER.fullmatch(layer):
                found[match[1]] = max(found.get(match[1], 0), int(match[2]) + 1)
    return found


def _without_head(model: Model, params: tree.Params) -> tree.Params:
    head = heads(model.axes, params)
    return tree.unflatten(
        {path: leaf for path, leaf in tree.flatten(params).items() if path not in head}
    )


def load_matching(fresh: tree.Params, trained: tree.Params) -> tuple[tree.Params, list[str]]:
    """Copy every trained leaf that fits into fresh parameters.

    A leaf fits if both trees have its path with the same shape. This puts a new head (of other
    classes, say) on a trained body.

    Args:
      fresh: parameters of the new model.
      trained: parameters of another model; its layers may be stacked differently.

    Returns:
      The parameters, and the paths (one for each layer) of the leaves that stayed fresh. Rules can
      freeze all others.

    Raises:
      InputError: no trained leaf fits.

    >>> import jax.numpy as jnp
    >>> fresh = {"body": jnp.zeros((2, 2)), "head": jnp.zeros((3, 2))}
    >>> params, left = load_matching(fresh, {"body": jnp.ones((2, 2)), "head": jnp.ones((10, 2))})
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
            "trained: no leaf has the path and shape of a leaf of the new model; allowed: "
            "parameters of the same family"
        )
    whole = tree.stack(
        tree.unflatten(
            {path: given[path] if path in fits else leaf for path, leaf in wanted.items()}
        )
    )
    return whole, [path for path in wanted if path not in fits]
