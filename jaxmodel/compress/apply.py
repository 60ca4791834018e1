"""Applying a recipe to a parameter tree, and the report on the result."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodel import report, rng, tree
from jaxmodel.adapt.adapters import split_adapters
from jaxmodel.axes import Axes, roles as of_roles
from jaxmodel.brief import briefly
from jaxmodel.compress.draft import run_chain
from jaxmodel.compress.method import Chain
from jaxmodel.compress.observe import Stats
from jaxmodel.compress.recipe_file import to_record
from jaxmodel.compress.recipes import ByRole, Recipe, as_recipe
from jaxmodel.compress.stats import names_of, places, stats_of
from jaxmodel.compress.transforms.transform import measured_on, transformed, write_transforms
from jaxmodel.errors import InputError
from jaxmodel.hub import Bundle
from jaxmodel.leaves import decode
from jaxmodel.leaves.leaf import check_weights
from jaxmodel.models.model import Inputs
from jaxmodel.progress import progress
from jaxmodel.report import html, shown
from jaxmodel.report.table import percent, size
from jaxmodel.text_form import write


@briefly
@dataclasses.dataclass(frozen=True)
class Report:
    """The result of compression in numbers.

    Attributes:
      bytes_before: bytes of all buffers of the tree before compression.
      bytes_after: bytes of all buffers afterwards: codes, scales, masks and uncompressed leaves.
      bits_per_weight: stored bits per weight of the whole tree afterwards.
      leaves: one record for each leaf: path, method (text of its chain), shape (of one layer),
        layers (number of layers), bytes_before and bytes_after (of all layers), bits_per_weight and
        relative_error (root mean square of the change over that of the weights).
    """

    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    leaves: tuple[Mapping[str, Any], ...] = dataclasses.field(repr=False)

    def _repr_html_(self) -> str:
        said = f"{size(self.bytes_before)} → {size(self.bytes_after)}"
        return shown.card(
            "Report",
            {"bytes": said, "bits per weight": self.bits_per_weight},
            [html.table(self.leaves, COLUMNS)],
        )


COLUMNS = (
    report.Column("path"),
    report.Column("method", format=lambda method: method or "kept"),
    report.Column("shape", format=lambda shape: " x ".join(map(str, shape))),
    report.Column("layers"),
    report.Column("bytes_before", "before", size),
    report.Column("bytes_after", "after", size),
    report.Column("bits_per_weight", "bits per\nweight", "{:.2f}".format),
    report.Column("relative_error", "error", percent),
)
"""The columns of a table of a report's leaves."""


def apply(
    recipe: Recipe | tree.Rules,
    params: tree.Params,
    stats: Stats | None = None,
    axes: Axes | None = None,
    key: jax.Array | None = None,
) -> tuple[tree.Params, Report]:
    """Compress each leaf by the chain of methods that the recipe's rules give it.

    Args:
      recipe: a `Recipe` or its rules alone. `Recipe.compute` concerns the model and not its params:
        `recipe.adapt(model)` and `compress_bundle` apply it.
      params: the tree. Segments are split where layers get different chains or have different
        statistics, and equal neighbours are joined at the end. Adapters stay as they are, beside
        weights that get smaller.
      stats: by path of a leaf, from `observe`, for methods that want them; layers may be stacked in
        any way.
      axes: of the model, which a named recipe needs to know what is a matrix and what a table.
      key: for methods that draw; None for `jax.random.key(0)`. Each layer gets its own by its path.

    Returns:
      The compressed tree and the report.

    Raises:
      InputError: a rule or leaf without the other, a rule whose value is not a chain, statistics of
        a leaf that is not there, a method that does not take a leaf, or a named recipe without
        axes.
    """
    stats = stats or {}
    tree.check(params)
    before = tree.nbytes(params)
    base, adapters = split_adapters(params)
    recipe = as_recipe(recipe)
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
    chains |= {layer: () for path in tree.flatten(adapters) for layer in tree.layer_paths(path)}
    where = places(stats, chains)
    split = tree.split(
        params, {layer: (chain, names_of(layer, stats, where)) for layer, chain in chains.items()}
    )
    out: dict[str, Any] = {}
    rows = []
    for path, leaf in progress(tree.flatten(split).items(), "compress"):
        chain = chains[tree.layer_paths(path)[0]]
        shape = tree.layer_shape(path, leaf)
        if chain and len(shape) < 2:  # stacked, it would pass for a matrix
            raise InputError(
                f"recipe: {write(chain)!r} given for {path!r} of shape {list(shape)}; allowed: "
                "matrices"
            )
        if chain:
            check_weights(leaf, f"recipe: {write(chain)!r} is given to {path!r}")
        found = stats_of(path, stats, where) or {}
        out[path], notes = run_chain(chain, leaf, found, _keys(path, leaf.shape[:-2], key), path)
        rows.append(_row(path, chain, leaf, out[path], found, notes))
    result = tree.stack(tree.unflatten(out))
    after = tree.nbytes(result)
    return result, Report(before, after, 8 * after / max(tree.count(result), 1), tuple(rows))


def compress_bundle(
    bundle: Bundle,
    recipe: Recipe | tree.Rules,
    name: str | None = None,
    batches: Sequence[Inputs] | None = None,
) -> tuple[Bundle, Report]:
    """Compress a bundle, set its compute dtype by the recipe, and record the recipe on its card.

    The recipe's transforms come first.

    Args:
      bundle: the model, its params and its card.
      recipe: a `Recipe` or its rules alone.
      name: the name of the recipe on the card; None for its own. The card has the rules too, except
        those of an unchanged named recipe.
      batches: inputs of the model, on which the transforms that want statistics measure them.

    Raises:
      InputError: as for `apply`; also a transform that the model's family does not allow, or
        that wants statistics without batches.
    """
    recipe = as_recipe(recipe)
    measure = None if batches is None else measured_on(list(batches))
    model, plain = transformed(bundle.model, bundle.params, recipe.transforms, measure)
    params, done = apply(dataclasses.replace(recipe, transforms=()), plain, axes=model.axes)
    said = to_record(dataclasses.replace(recipe, name=name or recipe.name))
    said = said["base"] if list(said) == ["base"] else said
    card = {**bundle.card, "recipe": said, "bits_per_weight": done.bits_per_weight}
    return dataclasses.replace(bundle, model=recipe.adapt(model), params=params, card=card), done


def _keys(path: str, lead: tuple[int, ...], key: jax.Array | None) -> jax.Array:
    """Return a key for each matrix of a leaf, the same however its layers are stacked."""
    key = jax.random.key(0) if key is None else key
    each = [rng.fold(key, layer) for layer in tree.layer_paths(path)]
    lead = lead[1:] if tree.is_stacked(path) else lead
    each = [jax.random.split(key, lead) if lead else key for key in each]
    return jnp.stack(each) if tree.is_stacked(path) else each[0]


def _row(
    path: str,
    chain: Chain,
    before: Any,
    after: Any,
    stats: Mapping[str, jax.Array],
    notes: Mapping[str, jax.Array],
) -> dict[str, Any]:
    more = {name: float(jnp.max(note)) for name, note in notes.items()}
    if chain and "gram" in stats:
        more["output_error"] = float(_output_error(before, after, stats["gram"]))
    return {
        "path": path,
        "method": write(chain),
        "shape": list(tree.layer_shape(path, after)),
        "layers": len(tree.layer_paths(path)),
        "bytes_before": tree.nbytes(before),
        "bytes_after": tree.nbytes(after),
        "bits_per_weight": 8 * tree.nbytes(after) / max(math.prod(after.shape), 1),
        "relative_error": float(_relative_error(before, after)) if chain else 0.0,
        **more,
    }


@jax.jit
def _relative_error(before: Any, after: Any) -> jax.Array:
    was = decode(before, jnp.float32)
    now = decode(after, jnp.float32)
    return jnp.sqrt(jnp.sum((was - now) ** 2) / jnp.maximum(jnp.sum(was**2), 1e-30))


@jax.jit
def _output_error(before: Any, after: Any, gram: jax.Array) -> jax.Array:
    was = decode(before, jnp.float32)
    size = lambda weight: jnp.einsum("...oi,...ij,...oj->", weight, gram, weight)
    return jnp.sqrt(size(was - decode(after, jnp.float32)) / jnp.maximum(size(was), 1e-30))
