"""Checks of parameters and inputs before JAX sees them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax.errors import ScopeParamNotFoundError
from jax.core import Tracer

from jaxmodel import axes, tree
from jaxmodel.errors import InputError, nearest
from jaxmodel.layers import unfuse


def check_params(model: Any, params: Any) -> None:
    """Refuse parameters that are not this model's, as far as that shows without running it.

    Raises:
      InputError: as `tree.check`; or a part that the model needs is missing, or a leaf outside of
        the layers has other axes.
    """
    tree.check(params)
    whole, sets = _shapes(model)
    if missing := [name for name in whole if name not in params]:
        raise InputError(
            f"params: {missing[0]!r} is missing; {', '.join(params) or 'nothing'} given"
        )
    given = tree.flatten(params)
    needed = tree.flatten(whole)
    fewer = lambda path: (
        needed[path].shape[-1] - given[path].shape[-1] if path in given and given[path].shape else 0
    )
    for path, leaf in needed.items():
        if path not in given or tree.BLOCKS in path.split("/"):
            continue
        there = given[path].shape
        alike = [{fewer(other) for other in paths} for paths in sets if path in paths]
        if len(there) != len(leaf.shape) or (
            there[-1:] != leaf.shape[-1:] and not any(len(one) == 1 for one in alike)
        ):
            raise InputError(
                f"params: {path!r} of shape {list(there)} given; the model needs {list(leaf.shape)}"
            )


@contextlib.contextmanager
def runs_on(model: Any, params: Any, layers: bool = True) -> Iterator[None]:
    """Guard code that runs a part of a model with parameters, also in jit.

    Parameters that no part would complain about are refused at once. Missing parts and other shapes
    are looked for only after a failure, because the shapes that a model needs take a trace of its
    `init`.

    Args:
      model: the model.
      params: its parameters.
      layers: whether the layers are checked; False where they are on other devices.

    Raises:
      InputError: as `check_params`.
    """
    whole = layers or not isinstance(params, dict)
    tree.check(
        params if whole else {name: node for name, node in params.items() if name != tree.BLOCKS}
    )
    try:
        yield
    except Exception as error:
        if not isinstance(error, InputError):
            check_params(model, params)
        if isinstance(error, KeyError | ScopeParamNotFoundError):
            _check_layers(model, params)
        raise


def _check_layers(model: Any, params: tree.Params) -> None:
    """Refuse parameters in which a layer lacks a leaf; layers with fused maps are not checked."""
    given, needed = (
        [layer for path in tree.flatten(one) for layer in tree.layer_paths(path)]
        for one in (unfuse(params), _shapes(model)[0])
    )
    if missing := [path for path in needed if path not in set(given)]:
        raise InputError(
            f"params: {missing[0]!r} is missing; nearest: "
            f"{', '.join(nearest(missing[0], given)) or 'nothing'}"
        )


def check_ids(name: str, ids: Any, vocab: int) -> None:
    """Refuse token ids outside of a vocabulary; traced ids are not checked.

    Raises:
      InputError: names the id.

    >>> check_ids("windows", np.array([[3, -7]]), 5)
    Traceback (most recent call last):
      ...
    jaxmodel.errors.InputError: windows: the token id -7 given; allowed: 0 to 4
    """
    if not _here(ids):
        return
    wrong = np.asarray(ids)[(np.asarray(ids) < 0) | (np.asarray(ids) >= vocab)]
    if wrong.size:
        raise InputError(f"{name}: the token id {wrong[0]} given; allowed: 0 to {vocab - 1}")


def _here(a: Any) -> bool:
    """Return whether the values of an array are known now, in this process."""
    return not isinstance(a, Tracer) and getattr(a, "is_fully_addressable", True)


def check_inputs(inputs: Mapping[str, Any], cache: Any = None, vocab: int | None = None) -> None:
    """Refuse unknown token ids, pixels that are not finite, and a cache for another batch size.

    Traced ids and pixels are not checked, so under `jit` this costs nothing.

    Args:
      inputs: the inputs of a model by name, with zeros in the padding.
      cache: its cache, if it has one.
      vocab: the size of its vocabulary, if it has one.

    Raises:
      InputError: says what was given.
    """
    for name in ("tokens", "source"):
        if vocab is not None and name in inputs:
            check_ids(name, inputs[name], vocab)
    pixels = inputs.get("pixels")
    if (
        pixels is not None
        and _here(pixels)
        and (bad := np.argwhere(~np.isfinite(np.asarray(pixels)))).size
    ):
        raise InputError(
            f"pixels: row {bad[0][0]} has numbers that are NaN or infinite; allowed: finite ones"
        )
    if (
        cache is not None
        and "tokens" in inputs
        and (rows := len(inputs["tokens"])) != len(cache.length)
    ):
        raise InputError(f"cache: made for {len(cache.length)} rows; {rows} given")


@functools.cache
def _shapes(model: Any) -> tuple[tree.Params, list[set[str]]]:
    """Return the shapes of the model's parameters, and the leaves that share units.

    For each group of units, of which there may be fewer than the config says, the second result
    holds the paths of the leaves outside of the layers that have these units in their last axis.
    """
    whole = jax.eval_shape(model.init, jax.random.key(0))
    last = {
        path: len(leaf.shape) - 1
        for path, leaf in tree.flatten(whole).items()
        if tree.BLOCKS not in path.split("/")
    }
    sets = [group for group in axes.groups(model.axes, whole).values() if not group.fixed]
    return whole, [
        {one.path for one in group.members if last.get(one.path) == one.axis} for group in sets
    ]
