"""Statistics of the input of every contraction, by differentiation of probes (`ops.probe`)."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodel import ops, tree
from jaxmodel.errors import InputError
from jaxmodel.layers.moe import real_tokens
from jaxmodel.models import Model, check_params
from jaxmodel.models.model import COUNTS, Inputs
from jaxmodel.ops.probe import zeros_for
from jaxmodel.progress import progress

# path of a leaf -> statistic -> array, stacked like the leaf
type Stats = Mapping[str, Mapping[str, jax.Array]]


def matrices(params: tree.Params, paths: str) -> tuple[tree.Params, list[str]]:
    """Find the matrices whose layer paths match a regular expression.

    Returns:
      The params, with segments split where only some layers match, and the paths of the matrices.

    Raises:
      InputError: no regular expression, or one that matches no matrix.
    """
    try:
        regex = re.compile(paths)
    except re.error as error:
        raise InputError(f"paths: {paths!r} is not a regular expression: {error}") from None
    layers = {
        layer: bool(regex.fullmatch(layer))
        for path in tree.flatten(params)
        for layer in tree.layer_paths(path)
    }
    params = tree.split(params, layers)
    leaves = tree.flatten(params)
    wanted = [
        path
        for path, leaf in leaves.items()
        if layers[tree.layer_paths(path)[0]] and len(tree.layer_shape(path, leaf)) >= 2
    ]
    if not wanted:
        raise InputError(f"paths: {paths!r} matches no matrix; e.g. {', '.join(list(leaves)[:3])}")
    return params, wanted


def observe(
    model: Model,
    params: tree.Params,
    batches: Iterable[Inputs],
    paths: str = ".*",
    statistics: Sequence[str] = ("square",),
    cap: float | None = None,
) -> Stats:
    """Sum statistics of the inputs of every matrix over batches.

    Args:
      model: the model whose `apply` is run.
      params: parameters with separate (not fused) leaves; compressed leaves are measured as they
        run. Matrices are the leaves of two axes or more (also kernels of convolutions, experts) and
        must run through `ops`.
      batches: inputs of `model.apply`, of one shape if possible (each shape compiles once). Padding
        (by `mask`, `source_mask`, `segments` of 0, and rows that only fill up, by `counts`) does
        not count.
      paths: regular expression of layer paths to measure. A Gram matrix takes `in^2` floats for
        each matrix. If those of all layers do not fit, measure some layers at a time, or use
        `calibrate`.
      statistics: names from `ops.STATISTICS`; `count` and `taken` are always included.
      cap: None, or how many times as long as the median of a batch an input may be; in `square` and
        `gram` longer ones count as that long. Some tokens (the first of a text, in many models) are
        a thousand times as long as others, and would alone decide.

    Returns:
      Path of a leaf -> statistic -> array, with the leaf's leading axes (layers, experts) in front.
      Layers are stacked like those of the params, except in segments that `paths` splits. `apply`
      accepts any stacking, so the results for some layers at a time combine as
      `{**first, **second}`.

    Raises:
      InputError: no matrix matches `paths`, there are no batches, or the input of a leaf was never
        computed.
    """
    params, wanted = matrices(params, paths)
    check_params(model, params)
    check_cap(cap)
    total: Stats | None = None
    for inputs in progress(batches, "observe"):
        found = _measured(model, tuple(wanted), tuple(statistics), cap, params, inputs)
        total = found if total is None else _added(total, found)
    if total is None:
        raise InputError("batches: none given; allowed: at least one")
    for path, found in total.items():
        if not any(np.any(np.asarray(found[name]) > 0) for name in ("count", "taken")):
            raise InputError(
                f"observe: the leaf {path!r} was never used (count 0); the output must depend on "
                "it, and not through an argmax alone"
            )
        if not all(np.isfinite(np.asarray(value)).all() for value in found.values()):
            raise InputError(
                f"observe: the statistics of {path!r} are not finite; a weight or a batch contains "
                "NaN or infinity"
            )
    return total


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _measured(
    model: Model,
    wanted: tuple[str, ...],
    statistics: tuple[str, ...],
    cap: float | None,
    params: tree.Params,
    inputs: Inputs,
) -> Stats:
    leaves = tree.flatten(params)
    inputs = apart(inputs) if isinstance(inputs, Mapping) else inputs

    def loss(zeros: Stats) -> jax.Array:
        return jnp.sum(model.apply(probed(params, zeros, cap, real_rows(inputs)), inputs).logits)

    return jax.grad(loss)({path: zeros_for(leaves[path].shape, statistics) for path in wanted})


@jax.jit
def _added(total: Stats, found: Stats) -> Stats:
    return jax.tree.map(jnp.add, total, found)


def probed(
    params: tree.Params,
    zeros: Stats,
    cap: float | None = None,
    rows: tuple[jax.Array, ...] = (),
) -> tree.Params:
    """Return the tree with probes on the leaves that there are zeros for.

    Args:
      params: the tree.
      zeros: by path.
      cap: see `observe`.
      rows: see `real_rows`.
    """

    def probe(path: str, leaf: Any) -> ops.Probe:
        masks = tuple(jnp.broadcast_to(a, (*leaf.shape[:-2], *a.shape)) for a in rows)
        return ops.Probe(leaf, zeros[path], masks or None, cap=cap)

    return tree.unflatten(
        {
            path: probe(path, leaf) if path in zeros else leaf
            for path, leaf in tree.flatten(params).items()
        }
    )


def real_rows(inputs: Inputs) -> tuple[jax.Array, ...]:
    """Return masks of what is not padding: of tokens, of the source, and of whole rows.

    A probe takes those whose shape is that of what flows into its weight, so the first two must
    differ in shape (see `apart`).
    """
    if not isinstance(inputs, Mapping):
        return ()
    tokens = real_tokens(inputs)
    source = inputs.get("source_mask")
    found = [mask.astype(jnp.bool_) for mask in (tokens, source) if mask is not None]
    rows = [jnp.any(mask, axis=1) for mask in found]
    if COUNTS in inputs:
        rows.append(inputs[COUNTS].astype(jnp.bool_))
    return (*found, functools.reduce(jnp.logical_and, rows)) if rows else ()


def apart(inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Return inputs whose source has another length than the tokens, where some are padding.

    It gets one more token, of padding.
    """
    source, tokens = inputs.get("source"), inputs.get("tokens")
    padded = {"mask", "source_mask"} & set(inputs)
    if source is None or tokens is None or source.shape != tokens.shape or not padded:
        return dict(inputs)
    mask = inputs.get("source_mask", jnp.ones(source.shape, jnp.bool_))
    longer = lambda a: jnp.pad(a, ((0, 0), (0, 1)))
    return {**inputs, "source": longer(source), "source_mask": longer(mask)}


def check_cap(cap: float | None) -> None:
    """Raise InputError if a cap is not above 0."""
    if cap is not None and not cap > 0:
        raise InputError(f"cap: {cap} given; allowed: None, or a number above 0")
