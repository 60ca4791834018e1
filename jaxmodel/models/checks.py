"""Whether parameters are a model's, before JAX sees them."""

from __future__ import annotations

import functools
from typing import Any

import jax

from jaxmodel import axes, tree
from jaxmodel.errors import InputError
from jaxmodel.models.model import Model


def check_params(model: Model, params: Any) -> None:
    """Refuse parameters that are not this model's, as far as it shows without running it.

    Raises:
      InputError: as `tree.check`; or a part that the model needs is missing, or a leaf outside of the layers has other axes.
    """
    tree.check(params)
    whole, sets = _shapes(model)
    if missing := [name for name in whole if name not in params]:
        raise InputError(f"params: {missing[0]!r} is missing; {', '.join(params) or 'nothing'} given")
    given, needed = tree.flatten(params), tree.flatten(whole)
    fewer = lambda path: needed[path].shape[-1] - given[path].shape[-1] if path in given and given[path].shape else 0
    for path, leaf in needed.items():
        if path not in given or tree.BLOCKS in path.split("/"):
            continue
        there = given[path].shape
        alike = [{fewer(other) for other in paths} for paths in sets if path in paths]
        if len(there) != len(leaf.shape) or (there[-1:] != leaf.shape[-1:] and not any(len(one) == 1 for one in alike)):
            raise InputError(f"params: {path!r} of shape {list(there)} given; the model needs {list(leaf.shape)}")


@functools.cache
def _shapes(model: Model) -> tuple[tree.Params, list[set[str]]]:
    """The shapes of the model's own parameters; and of each group of units, which may be fewer than the config says, the paths of
    the leaves outside of the layers that have them in their last axis."""
    whole = jax.eval_shape(model.init, jax.random.key(0))
    last = {path: len(leaf.shape) - 1 for path, leaf in tree.flatten(whole).items() if tree.BLOCKS not in path.split("/")}
    sets = [group for group in axes.groups(model.axes, whole).values() if not group.ordered]
    return whole, [{one.path for one in group.members if last.get(one.path) == one.axis} for group in sets]
