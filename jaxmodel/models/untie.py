"""`untied`: a model whose head no longer reads the embedding, but a leaf of its own."""

from __future__ import annotations

import dataclasses

import jax

from jaxmodel import tree
from jaxmodel.axes import assign
from jaxmodel.errors import InputError
from jaxmodel.models.family import build_of
from jaxmodel.models.model import Model


def untied(model: Model, params: tree.Params) -> tuple[Model, tree.Params]:
    """Return a model that computes the same with a head of its own, at first the embedding.

    A model whose head has its own leaf, or that has no head, stays as it is.

    Args:
      model: of a family whose configs have `tied`.
      params: its parameters.

    Raises:
      InputError: the model is not as its family made it.

    >>> from jaxmodel.models import gpt2
    >>> small = gpt2.model(gpt2.SIZES["tiny"])
    >>> params = jax.jit(small.init)(jax.random.key(0))
    >>> other, more = untied(small, params)
    >>> other.config.tied, more["head"] is params["embed"]
    (False, True)
    """
    config = model.config
    if not getattr(config, "tied", False):
        return model, params
    build = build_of(model)
    if build is None:
        raise InputError(
            "model: its head is tied, and it is not as its family made it; allowed: a model of a "
            "family, whose head can be untied"
        )
    own = getattr(config, "untied", lambda: dataclasses.replace(config, tied=False))()
    other = build(own, model.policy)
    letters = assign(other.axes, other_shapes := jax.eval_shape(other.init, jax.random.key(0)))
    leaves = tree.flatten(params)
    shapes = tree.flatten(other_shapes)
    for path in shapes:
        if path in leaves or path.startswith(f"{tree.BLOCKS}/"):
            continue
        same = [
            table
            for table in leaves
            if letters.get(table) is not None
            and letters[table].role == "table"
            and letters[table].axes == letters[path].axes
        ]
        if len(same) != 1:
            raise InputError(f"model: no single table can become the head {path!r}")
        leaves[path] = leaves[same[0]]
    return other, tree.unflatten(leaves)
