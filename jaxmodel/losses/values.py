"""Regression losses: functions of outputs and targets that return a value for each row.

`regression` turns them into a `Loss`. Outputs and targets are `[B, ...]`.
"""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxmodel.errors import ABOVE_ZERO, InputError, within


def squared_error(
    outputs: Float[Array, "B ..."], targets: Float[Array, "B ..."]
) -> Float[Array, " B"]:
    """Compute the mean of `(x - y)^2` over each row.

    Raises:
      InputError: outputs and targets have different shapes (so for all functions here).

    >>> squared_error(jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 0.0]])).tolist()
    [2.5]
    """
    return _rows(optax.losses.squared_error(*_pair(outputs, targets)))


def absolute_error(
    outputs: Float[Array, "B ..."], targets: Float[Array, "B ..."]
) -> Float[Array, " B"]:
    """Compute the mean of `|x - y|` over each row.

    >>> absolute_error(jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 0.0]])).tolist()
    [1.5]
    """
    x, y = _pair(outputs, targets)
    return _rows(jnp.abs(x - y))


def huber(
    outputs: Float[Array, "B ..."], targets: Float[Array, "B ..."], delta: float = 1.0
) -> Float[Array, " B"]:
    """Compute the Huber loss, with `r = |x - y|`, as a mean over each row (Huber, 1964).

    It is `r^2 / 2` where r is at most delta, else `delta (r - delta / 2)`.

    >>> huber(jnp.array([[0.5, 3.0]]), jnp.array([[0.0, 0.0]])).tolist()
    [1.3125]
    """
    within("delta", delta, ABOVE_ZERO)
    return _rows(optax.losses.huber_loss(*_pair(outputs, targets), delta=delta))


def _pair(outputs: Array, targets: Array) -> tuple[Array, Array]:
    if outputs.shape != targets.shape:  # `[B, 1]` less `[B]` would be `[B, B]`
        raise InputError(
            f"targets: the shape {list(targets.shape)} given with outputs {list(outputs.shape)}; "
            "allowed: the same shape"
        )
    return outputs.astype(jnp.float32), targets.astype(jnp.float32)


def _rows(values: Array) -> Array:
    return jnp.mean(values.reshape(values.shape[0], -1), axis=1)
