"""Statistics by the path of a layer: those of `observe`, restacked to fit the leaf at hand."""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp

from jaxmodel import tree
from jaxmodel.compress.observe import Stats
from jaxmodel.errors import InputError, nearest

# layer path -> path in the statistics, position in its segment
type Places = dict[str, tuple[str, int]]


def places(stats: Stats, layers: Iterable[str]) -> Places:
    """Find the statistics of each layer's leaf; if two entries hold a layer, the later one counts.

    Args:
      stats: statistics from `observe`.
      layers: all layer paths of the params.

    Raises:
      InputError: statistics of a leaf that is not among the layers.
    """
    found = {layer: (path, i) for path in stats for i, layer in enumerate(tree.layer_paths(path))}
    known = set(layers)
    for layer, (path, _) in found.items():
        if layer not in known:
            close = "".join(nearest(layer, known, 1))
            raise InputError(
                f"stats: {path!r} is not a leaf of these params"
                + (f"; nearest: {close}" if close else "")
            )
    return found


def names_of(layer: str, stats: Stats, where: Places) -> frozenset[str]:
    """Return the names of the statistics that exist for a layer's leaf.

    Layers that differ in this are not compressed as one leaf.
    """
    return frozenset(stats[where[layer][0]]) if layer in where else frozenset()


def stats_of(path: str, stats: Stats, where: Places) -> dict[str, jax.Array] | None:
    """Return the statistics of the leaf at `path`, stacked like its layers, or None."""

    def one(layer: str) -> dict[str, jax.Array]:
        source, i = where[layer]
        return {name: a[i] if tree.is_stacked(source) else a for name, a in stats[source].items()}

    layers = tree.layer_paths(path)
    if layers[0] not in where:
        return None
    if all(where[layer][0] == path for layer in layers):
        return dict(stats[path])
    each = [one(layer) for layer in layers]
    return (
        jax.tree.map(lambda *arrays: jnp.stack(arrays), *each) if tree.is_stacked(path) else each[0]
    )
