"""The default loss for a model and a batch, and the checks of a loss that a user wrote."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jaxmodel.errors import InputError
from jaxmodel.losses.contract import Loss
from jaxmodel.losses.factory import classification, regression
from jaxmodel.losses.reconstruction import autoencoder
from jaxmodel.losses.tokens import next_token
from jaxmodel.losses.views import contrastive
from jaxmodel.models import Model

CONTRACT = (
    "loss(model, params, batch, rng, *, train=True) -> (mean, {'weight': ..., ...}), or "
    "the mean alone"
)


def default_loss(model: Model, batch: Mapping[str, Any]) -> Loss:
    """Return the loss that fits what a batch holds besides the inputs of the model.

    - `labels`: `classification`
    - `targets`, integers: `next_token`
    - `targets`, floating-point: `regression()`
    - `views`: `contrastive()`
    - none, for an auto-encoder, whose target is its input: `autoencoder`

    Raises:
      InputError: the batch has none of them.

    >>> from jaxmodel.models import mlp
    >>> batch = {"features": jnp.ones((3, 2)), "labels": jnp.zeros(3, int)}
    >>> default_loss(mlp.model(mlp.Config(2, (3,), 4)), batch).__name__
    'classification'
    """
    if "labels" in batch:
        return classification
    if "targets" in batch:
        return next_token if jnp.issubdtype(batch["targets"].dtype, jnp.integer) else regression()
    if "views" in batch:
        return contrastive()
    if hasattr(model.config, "reconstruction"):
        return autoencoder
    hint = (
        "; data.Stream(data.windows(ids, length=T + 1), batch_size) makes targets of tokens"
        if "tokens" in batch
        else ""
    )
    raise InputError(
        f"loss: none given, and the batch holds {', '.join(batch) or 'nothing'}; allowed: a batch "
        f"with labels (classification) "
        f"or targets (next_token, regression), or a loss from jaxmodel.losses or your own{hint}"
    )


def checked_loss(loss: Any) -> Loss:
    """Return a user's loss in the form that `make_step` needs.

    A loss that returns only the mean, or metrics without `weight`, is taken as a mean over the
    rows.

    Raises:
      InputError: `loss` is not a function or has other arguments; when called, it reads a field
        that the batch lacks, or returns something else.

    >>> def mean_of_x(model, params, batch, rng=None, *, train=True):
    ...     return jnp.mean(batch["x"])
    >>> value, metrics = checked_loss(mean_of_x)(None, {}, {"x": jnp.ones((4, 2))}, None)
    >>> float(value), float(metrics["weight"])
    (1.0, 4.0)
    """
    if not callable(loss):
        raise InputError(
            f"loss: {loss!r:.60} given; allowed: a function, such as losses.classification, "
            f"losses.next_token or {CONTRACT}"
        )
    name = getattr(loss, "__name__", type(loss).__name__)
    try:
        signature = inspect.signature(loss)
    except (TypeError, ValueError):  # a function written in C has no signature
        made: Any = loss
        return made
    _check_arguments(name, signature)

    @functools.wraps(loss)  # with its signature, which tells whether the loss reads the state
    def call(
        model: Any, params: Any, batch: Mapping[str, Array], rng: Any = None, **named: Any
    ) -> Any:
        try:
            out = loss(model, params, batch, rng, **named)
        except KeyError as error:
            if not error.args or not isinstance(error.args[0], str) or error.args[0] in batch:
                raise
            raise InputError(
                f"batch: {', '.join(batch)} given; the loss {name} reads {error.args[0]!r}"
            ) from error
        value, metrics = out if isinstance(out, tuple) and len(out) == 2 else (out, {})
        if getattr(value, "shape", None) != () or not isinstance(metrics, Mapping):
            given = [
                f"{getattr(one, 'dtype', '')}{list(getattr(one, 'shape', []))}"
                for one in (value, metrics)
            ]
            raise InputError(
                f"loss: {name} returns {' and '.join(given)}; allowed: a scalar, and metrics: "
                f"{CONTRACT}"
            )
        if "weight" in metrics:
            return value, dict(metrics)
        rows = next(iter(batch.values())).shape[0]
        return value, {**metrics, "weight": jnp.full((), rows, jnp.float32)}

    made = call
    return made


def _check_arguments(name: str, signature: inspect.Signature) -> None:
    bind: Callable[..., Any] = signature.bind
    named = {one: None for one in ("state",) if one in signature.parameters}
    try:
        bind(None, None, None, None, train=True, **named)
    except TypeError as error:
        raise InputError(f"loss: {name}{signature} given ({error}); allowed: {CONTRACT}") from None
