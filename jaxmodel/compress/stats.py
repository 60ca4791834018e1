"""Statistics by the path of a layer: those of `observe`, restacked to fit the leaf at hand."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodel import tree
from jaxmodel.compress.observe import Stats
from jaxmodel.errors import InputError, nearest
from jaxmodel.ops.probe import histogram

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


def usable(stats: Mapping[str, jax.Array]) -> tuple[dict[str, jax.Array], str]:
    """Return statistics that a method can use, and what was wrong with those given.

    Those of a matrix that saw no input (an expert to which no token was sent, a table), or that are
    not finite, become those of one token with equal inputs, so that methods decide by the weights
    alone.

    Args:
      stats: of a leaf, with its leading axes.

    Returns:
      The statistics, and why they were replaced: "" where they were not.
    """
    fixed, counts = _usable(dict(stats))
    total, unseen, infinite = (int(n) for n in np.asarray(counts))
    of = "" if total == 1 else f"{{}} of {total}: "
    said = [
        of.format(n) + what
        for n, what in ((unseen, "no inputs"), (infinite, "statistics not finite"))
        if n
    ]
    return fixed, "; ".join(said)


@jax.jit
def _usable(stats: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], jax.Array]:
    equal = {
        "gram": lambda a: jnp.eye(a.shape[-1]),
        "histogram": lambda a: histogram(jnp.ones(1)),
    }
    sizes = {"gram": 2, "square": 1, "histogram": 1, "gradient": 2, "fisher": 2, "movement": 2}
    sizes = {name: sizes.get(name, 0) for name in stats}
    finite = [
        jnp.all(jnp.isfinite(a), axis=tuple(range(a.ndim - sizes[name], a.ndim)))
        for name, a in stats.items()
    ]
    fine = functools.reduce(jnp.logical_and, finite)
    seen = stats["count"] > 0 if "count" in stats else jnp.ones_like(fine)

    def one(name: str, a: jax.Array) -> jax.Array:
        keep = (seen & fine).reshape(*fine.shape, *[1] * sizes[name])
        value = equal[name](a) if name in equal else jnp.ones(a.shape[a.ndim - sizes[name] :])
        return jnp.where(keep, a, jnp.broadcast_to(value, a.shape).astype(a.dtype))

    counts = jnp.stack([jnp.int32(fine.size), jnp.sum(~seen), jnp.sum(seen & ~fine)])
    return {name: one(name, a) for name, a in stats.items()}, counts


def statistic(name: str, path: str, stats: Stats, where: Places) -> jax.Array:
    """Return a statistic of the input of a leaf.

    Raises:
      InputError: it was not measured.
    """
    found = stats_of(path, stats, where)
    if found is None or name not in found:
        raise InputError(
            f"stats: {name!r} of the input of {path!r} was not measured; give batches to "
            f"compress_bundle, or stats from observe(..., statistics=[{name!r}])"
        )
    return found[name]
