"""Applying a recipe to a parameter tree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodel import rng, tree
from jaxmodel.adapt.adapters import split_adapters
from jaxmodel.axes import Axes, roles as of_roles
from jaxmodel.compress.draft import run_chain
from jaxmodel.compress.method import Chain
from jaxmodel.compress.observe import Stats
from jaxmodel.compress.recipes import ByRole, Recipe, as_recipe
from jaxmodel.compress.report import Report, row_of
from jaxmodel.compress.stats import names_of, places, stats_of, usable
from jaxmodel.compress.transforms.transform import write_transforms
from jaxmodel.errors import InputError
from jaxmodel.leaves.leaf import check_weights
from jaxmodel.progress import progress
from jaxmodel.text_form import write


def apply(
    recipe: Recipe | tree.Rules,
    params: tree.Params,
    stats: Stats | None = None,
    axes: Axes | None = None,
    key: jax.Array | None = None,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[tree.Params, Report]:
    """Compress each leaf by the chain of methods that the recipe's rules give it.

    Args:
      recipe: a `Recipe` or its rules alone. `Recipe.compute` concerns the model and not its params:
        `recipe.adapt(model)` and `compress_bundle` apply it.
      params: the tree. Segments are split where layers get different chains or have different
        statistics, and equal neighbours are joined at the end. Adapters stay as they are, beside
        weights that get smaller.
      stats: by path of a leaf, from `observe`, for methods that want them; layers may be stacked in
        any way. A matrix whose input saw no token, or whose statistics are not finite, is
        compressed as if all inputs were equal, which the report says.
      axes: of the model, which a named recipe needs to know what is a matrix and what a table.
      key: for methods that draw; None for `jax.random.key(0)`. Each layer gets its own by its path.
      on_row: called with the record of each leaf as soon as it is compressed.

    Returns:
      The compressed tree and the report.

    Raises:
      InputError: a rule or leaf without the other, a rule whose value is not a chain, statistics of
        a leaf that is not there, a method that does not take a leaf, or a named recipe without
        axes.
    """
    stats = stats or {}
    tree.check(params)
    chains = chains_of(as_recipe(recipe), params, axes)
    where = places(stats, chains)
    split = tree.split(
        params, {layer: (chain, names_of(layer, stats, where)) for layer, chain in chains.items()}
    )
    out: dict[str, Any] = {}
    rows = []
    for path, leaf in progress(tree.flatten(split).items(), "compress"):
        found = stats_of(path, stats, where)
        out[path], row = compress_leaf(path, leaf, chains[tree.layer_paths(path)[0]], found, key)
        rows.append(row)
        if on_row is not None:
            on_row(row)
    result = tree.stack(tree.unflatten(out))
    return result, report_of(params, result, rows)


def report_of(
    before: tree.Params, after: tree.Params, rows: list[dict[str, Any]], **more: Any
) -> Report:
    """Return the report of a whole tree from the rows of its leaves."""
    total = tree.nbytes(after)
    bits = 8 * total / max(tree.count(after), 1)
    return Report(tree.nbytes(before), total, bits, tuple(rows), **more)


def chains_of(recipe: Recipe, params: tree.Params, axes: Axes | None = None) -> dict[str, Chain]:
    """Return the chain of each layer path; that of adapters is empty.

    Raises:
      InputError: a rule or leaf without the other, or a named recipe without axes.
    """
    base, adapters = split_adapters(params)
    if recipe.transforms:
        raise InputError(
            f"recipe: it has transforms, {write_transforms(recipe.transforms)}, which change the "
            "model; use compress_bundle, or `transformed` and the recipe without them"
        )
    chains = tree.assign(recipe.rules, base)
    if any(isinstance(chain, ByRole) for chain in chains.values()):
        if axes is None:
            raise InputError("axes: None given; a recipe by role needs model.axes")
        roles = of_roles(axes, base)
        chains = {
            layer: chain.of(roles[layer]) if isinstance(chain, ByRole) else chain
            for layer, chain in chains.items()
        }
    return chains | {
        layer: () for path in tree.flatten(adapters) for layer in tree.layer_paths(path)
    }


def needs_of(chain: Chain) -> tuple[str, ...]:
    """Return the statistics that the methods of a chain want."""
    return tuple(dict.fromkeys(name for method in chain for name in method.needs))


def check_leaf(path: str, leaf: Any, chain: Chain) -> None:
    """Refuse a leaf that no chain takes.

    Raises:
      InputError: a vector, or weights that are not finite floating-point numbers.
    """
    shape = tree.layer_shape(path, leaf)
    if chain and len(shape) < 2:  # stacked, it would pass for a matrix
        raise InputError(
            f"recipe: {write(chain)!r} given for {path!r} of shape {list(shape)}; allowed: matrices"
        )
    if chain:
        check_weights(leaf, f"recipe: {write(chain)!r} is given to {path!r}")


def compress_leaf(
    path: str,
    leaf: Any,
    chain: Chain,
    stats: Mapping[str, jax.Array] | None = None,
    key: jax.Array | None = None,
    held: Mapping[str, jax.Array] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Compress one leaf and return it with its row of the report.

    Args:
      path: of the leaf.
      leaf: its value, stacked as the path says.
      chain: what to do.
      stats: stacked like the leaf; None for none.
      key: as for `apply`.
      held: the statistics of held-out tokens, for the report.

    Raises:
      InputError: a leaf that the chain does not take, or missing statistics.
    """
    check_leaf(path, leaf, chain)
    fallback = ""
    used: Mapping[str, jax.Array] = {}
    given = stats or {}
    wanted = (*needs_of(chain), "count") if chain else ()
    if own := {name: given[name] for name in wanted if name in given}:
        used, fallback = usable(own)
    after, notes = run_chain(chain, leaf, used, keys_of(path, leaf.shape[:-2], key), path)
    fallback = fallback if needs_of(chain) else ""
    return after, row_of(path, chain, leaf, after, notes, stats, held, fallback)


def keys_of(path: str, lead: tuple[int, ...], key: jax.Array | None) -> jax.Array:
    """Return a key for each matrix of a leaf, the same however its layers are stacked."""
    key = jax.random.key(0) if key is None else key
    each = [rng.fold(key, layer) for layer in tree.layer_paths(path)]
    lead = lead[1:] if tree.is_stacked(path) else lead
    each = [jax.random.split(key, lead) if lead else key for key in each]
    return jnp.stack(each) if tree.is_stacked(path) else each[0]
