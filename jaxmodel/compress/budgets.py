"""Budgets: how many weights each matrix loses, where a recipe says how many all lose together."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxmodel import tree
from jaxmodel.axes import Axes
from jaxmodel.compress.apply import chains_of, keys_of
from jaxmodel.compress.draft import each_matrix, open_leaf
from jaxmodel.compress.observe import Stats
from jaxmodel.compress.prune.masks import Pruning, Scored
from jaxmodel.compress.recipes import Recipe, as_recipe
from jaxmodel.compress.stats import names_of, places, stats_of
from jaxmodel.errors import InputError, one_of
from jaxmodel.leaves.largest import ordered, score_of
from jaxmodel.optim.zeros import divide
from jaxmodel.text_form import write

KINDS = ("global", "erk", "uniform")


def budget(
    recipe: Recipe | tree.Rules,
    params: tree.Params,
    kind: Literal["global", "erk", "uniform"] = "global",
    *,
    stats: Stats | None = None,
    axes: Axes | None = None,
    key: jax.Array | None = None,
) -> Recipe:
    """Return the recipe with another division of its zeros among the matrices.

    Together they lose as many weights as by the recipe itself.

    Args:
      recipe: in which chains begin with a pruning method, for some leaves or all.
      params: the model's.
      kind: "global" compares the scores of all weights of all matrices: each method gets the same
        `threshold`, found by counting (with equal scores at the threshold, all of them stay).
        "erk" keeps more of small and narrow matrices (see `optim.densities`), "uniform" the same
        share of each.
      stats: as for `apply`, for methods that want them.
      axes: of the model, for a named recipe.
      key: as for `apply`.

    Returns:
      A recipe with a rule for each layer, for `apply` or `compress_bundle`; rules alone can be
      joined with others.

    Raises:
      InputError: a chain that does not begin with a pruning method that `kind` can divide, or no
        chain that does.

    >>> params = {"a": jnp.arange(8.0).reshape(2, 4), "b": 10 + jnp.arange(8.0).reshape(2, 4)}
    >>> budget([(".*", "magnitude(0.25)")], params).texts()[0]
    ['a', 'magnitude(fraction=0.25, threshold=4.0)']
    """
    tree.check(params)
    one_of("kind", kind, KINDS)
    recipe = as_recipe(recipe)
    chains = chains_of(recipe, params, axes)
    pruned = {
        layer: chain[0]
        for layer, chain in chains.items()
        if chain and isinstance(chain[0], Pruning) and not chain[0].idle
    }
    if not pruned:
        raise InputError("recipe: no chain begins with a method that prunes; allowed: at least one")
    for layer, method in pruned.items():
        plain = isinstance(method, Scored) and method.threshold is None and method.block is None
        if method.pattern is not None or (kind == "global" and not plain):
            raise InputError(
                f"recipe: {write((method,))!r} given for {layer!r}; a {kind} budget allows "
                "methods with a score for each weight, by a fraction, without pattern or block"
            )
    shapes = {
        layer: tree.layer_shape(path, leaf)
        for path, leaf in tree.flatten(params).items()
        for layer in tree.layer_paths(path)
        if layer in pruned
    }
    if kind == "global":
        lowest = _lowest(pruned, params, stats or {}, key)
        found = {layer: method.at(lowest) for layer, method in pruned.items()}  # pyright: ignore[reportAttributeAccessIssue]
    else:
        fractions = {layer: method.fraction for layer, method in pruned.items()}
        found = {
            layer: dataclasses.replace(pruned[layer], fraction=min(fraction, 1 - 1e-6))
            for layer, fraction in divide(shapes, fractions, kind).items()
        }
    rules = tuple(
        (re.escape(layer), (found[layer], *chain[1:]) if layer in found else chain)
        for layer, chain in chains.items()
    )
    return dataclasses.replace(recipe, rules=rules)


def _lowest(
    pruned: dict[str, Any], params: tree.Params, stats: Stats, key: jax.Array | None
) -> float:
    """Return the lowest score that stays, in 32 rounds that count, leaf by leaf."""
    known = [layer for path in tree.flatten(params) for layer in tree.layer_paths(path)]
    where = places(stats, known)
    kinds = {layer: (pruned.get(layer), names_of(layer, stats, where)) for layer in known}
    scores = []
    kept = 0.0
    for path, leaf in tree.flatten(tree.split(params, kinds)).items():
        method = pruned.get(tree.layer_paths(path)[0])
        if method is None:
            continue
        found = stats_of(path, stats, where) or {}
        for name in method.needs:
            if name not in found:
                raise InputError(f"stats: {str(method)!r} needs {name!r} of {path!r}; see observe")
        scores.append(_ordered(method, leaf, found, keys_of(path, leaf.shape[:-2], key)))
        kept += scores[-1].size * (1 - method.fraction)
    threshold = 0
    for bit in range(31, -1, -1):
        higher = threshold | (1 << bit)
        at_least = sum(int(jnp.sum(_counted(score, jnp.uint32(higher)))) for score in scores)
        threshold = higher if at_least >= round(kept) else threshold
    return score_of(threshold)


@functools.partial(jax.jit, static_argnums=0)
def _ordered(method: Scored, leaf: Any, stats: Any, keys: jax.Array) -> jax.Array:
    def one(leaf: Any, stats: Any, key: jax.Array) -> jax.Array:
        draft = open_leaf(leaf)
        score = method.score(draft, draft.seen(stats), jax.random.fold_in(key, 0))
        return ordered(score if draft.keep is None else jnp.where(draft.keep, score, -jnp.inf))

    return each_matrix(one, leaf, stats, keys)


@jax.jit
def _counted(score: jax.Array, threshold: jax.Array) -> jax.Array:
    return jnp.sum(score >= threshold, axis=(-2, -1), dtype=jnp.int32)
