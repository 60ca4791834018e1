"""`predict_fn`: a model as one function of weights and a batch.

This is all that evaluation, explanation and trust ask for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodel import tree
from jaxmodel.errors import InputError, one_of
from jaxmodel.models.model import Inputs, Model

GIVES = {
    "probabilities": jax.nn.softmax,
    "log_probabilities": jax.nn.log_softmax,
    "logits": lambda logits: logits,
}
_EACH = {**GIVES, "probabilities": jax.nn.sigmoid, "log_probabilities": jax.nn.log_sigmoid}


def says(config: Any) -> str:
    """Return what the logits of a classifier mean, by its `problem` and labels as in HF.

    It is one class "of all", "each" class by itself, or a "number".

    >>> from jaxmodel.models import bert
    >>> config = lambda labels: bert.Config(9, 4, 1, 1, 8, 8, "classify", labels)
    >>> says(config(("no", "yes"))), says(config(("toxic",)))
    ('of all', 'each')
    """
    problem = getattr(config, "problem", "")
    if problem == "regression":
        return "number"
    one = problem == "" and len(getattr(config, "labels", ())) == 1
    return "each" if one or problem == "multi_label_classification" else "of all"


def predict_fn(
    model: Model, gives: str = "probabilities"
) -> Callable[[tree.Params, Inputs], jax.Array]:
    """Return `predict(params, x)`: the outputs of a model for a batch, as in inference.

    The function is pure and not jitted: the caller may jit, vmap, differentiate or chunk it. Equal
    arguments give the same function, so nothing is traced twice. Without a `Model` (for a forest, a
    server, an ensemble) write such a function yourself.

    Args:
      model: any model.
      gives: "probabilities" (over the last axis, or for each class by itself; see `says`),
        "log_probabilities", or "logits", which are also the values of a regression and the vector
        of a model without classes.

    Returns:
      A function (params, x) -> float32 `[B, C]`, or `[B, T, V]` for a model with logits for every
      position. `x` is what `model.apply` takes: an array `[B, ...]`, or a dict.

    Raises:
      InputError: `gives` is something else, or asks a regression for probabilities.

    >>> from jaxmodel.models import gpt2
    >>> model = gpt2.model(gpt2.SIZES["tiny"])
    >>> params = jax.jit(model.init)(jax.random.key(0))
    >>> said = jax.jit(predict_fn(model))(params, jnp.zeros((2, 3), jnp.int32))
    >>> said.shape, bool(jnp.allclose(said.sum(axis=-1), 1))
    ((2, 3, 256), True)
    """
    one_of("gives", gives, GIVES)
    if gives != "logits" and says(model.config) == "number":
        raise InputError(
            f"gives: {gives!r} given for a regression; allowed: logits, which are its predictions"
        )
    return _predict_fn(model, gives)


@functools.cache
def _predict_fn(model: Model, gives: str) -> Callable[[tree.Params, Inputs], jax.Array]:
    def predict(params: tree.Params, x: Inputs) -> jax.Array:
        kinds = _EACH if says(model.config) == "each" else GIVES
        return kinds[gives](model.apply(params, x).logits.astype(jnp.float32))

    return predict
