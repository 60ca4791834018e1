"""`apply`: a recipe over a parameter tree, and the report of what it did."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodel import tree
from jaxmodel.compress.method import Chain, text_of
from jaxmodel.compress.recipes import COMPUTE, Recipe
from jaxmodel.hub import Bundle
from jaxmodel.leaves import decode
from jaxmodel.report import progress


@dataclasses.dataclass(frozen=True)
class Report:
    """What compression did.

    Attributes:
      bytes_before: of all buffers of the tree.
      bytes_after: likewise, after.
      bits_per_weight: of the whole tree after.
      leaves: one record each: path, method, shape, bytes_before, bytes_after, bits_per_weight, relative_error (the root mean
        square change over the root mean square weight).
    """

    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    leaves: tuple[Mapping[str, Any], ...]


def apply(recipe: Recipe, params: tree.Params, stats: Mapping[str, Any] | None = None) -> tuple[tree.Params, Report]:
    """Compress each leaf by the chain of methods that the recipe's rules give it.

    Args:
      recipe: rules, path -> tuple of methods; the empty tuple leaves a leaf as it is.
      params: the tree. Segments are split where layers get different chains, and equal neighbours are joined at the end.
      stats: by path of a leaf, from `observe`, for methods that want them.

    Returns:
      The compressed tree and the report.

    Raises:
      InputError: a rule or leaf without the other, or a method that does not take a leaf.
    """
    before = tree.nbytes(params)
    split, chains = tree.match(recipe, params)
    by_layer = {layer: value for path, value in (stats or {}).items() for layer in [path, *tree.layer_paths(path)]}
    out: dict[str, Any] = {}
    rows = []
    for path, leaf in progress(tree.flatten(split).items(), "compress"):
        out[path] = run_chain(chains[path], leaf, by_layer.get(path, by_layer.get(tree.layer_paths(path)[0])))
        rows.append(_row(path, chains[path], leaf, out[path]))
    result = tree.stack(tree.unflatten(out))
    after = tree.nbytes(result)
    return result, Report(before, after, 8 * after / tree.count(result), tuple(rows))


def compress_bundle(bundle: Bundle, recipe: Recipe, name: str) -> tuple[Bundle, Report]:
    """A bundle made smaller, with what else its recipe wants (see `recipes.COMPUTE`) and the fact on its card."""
    params, report = apply(recipe, bundle.params)
    model, compute = bundle.model, COMPUTE.get(name)
    if compute is not None:
        model = model.with_policy(dataclasses.replace(model.policy, compute=compute))
    card = {**bundle.card, "recipe": name, "bits_per_weight": report.bits_per_weight}
    return dataclasses.replace(bundle, model=model, params=params, card=card), report


def run_chain(chain: Chain, leaf: Any, stats: Any = None) -> Any:
    """One leaf through a chain of methods."""
    for method in chain:
        leaf = method(leaf, stats)
    return leaf


def _row(path: str, chain: Chain, before: Any, after: Any) -> dict[str, Any]:
    size = 1
    for n in after.shape:
        size *= n
    return {
        "path": path,
        "method": text_of(chain),
        "shape": list(tree.layer_shape(path, after)),
        "layers": len(tree.layer_paths(path)),
        "bytes_before": tree.nbytes(before),
        "bytes_after": tree.nbytes(after),
        "bits_per_weight": 8 * tree.nbytes(after) / size,
        "relative_error": float(_relative_error(before, after)) if chain else 0.0,
    }


@jax.jit
def _relative_error(before: Any, after: Any) -> jax.Array:
    was, now = decode(before, jnp.float32), decode(after, jnp.float32)
    return jnp.sqrt(jnp.sum((was - now) ** 2) / jnp.maximum(jnp.sum(was**2), 1e-30))
