"""Bounds of the norms of rows after every update, by rules: max-norm and max-min-norm."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxmodel import tree
from jaxmodel.errors import InputError
from jaxmodel.losses.penalties import plain
from jaxmodel.schema import FromZero, Positive
from jaxmodel.text_form import Member, read_one


@dataclasses.dataclass(frozen=True)
class Bound(Member, kind="bound", example="max_norm(3)"):
    """Base class of the bounds: a frozen dataclass with the range of a row's norm.

    See `bounds`.

    Attributes:
      low: the least norm.
      high: the largest norm.
    """

    def bounds(self) -> tuple[float, float]:
        """Return the least and the largest norm."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class MaxNorm(Bound):
    """Rows with a norm of at most `high` (Srebro et al., 2005)."""

    high: Positive

    def bounds(self) -> tuple[float, float]:
        """Return 0 and `high`."""
        return 0.0, self.high


@dataclasses.dataclass(frozen=True)
class MaxMinNorm(Bound):
    """Rows with a norm from `low` to `high`; a row of zeros, which has no direction, stays."""

    low: FromZero
    high: Positive

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low > self.high:
            self.refuse("low", f"at most high, which is {self.high!r}")

    def bounds(self) -> tuple[float, float]:
        """Return `low` and `high`."""
        return self.low, self.high


def project(rules: tree.Rules) -> optax.GradientTransformation:
    """Change updates so that after `p + u` the norm of each row is in bounds, up to rounding.

    It is the last transformation of a chain. A row is a vector along the last axis: the weights
    `[out, in]` of one output, or a whole vector. A row whose norm is within the bounds gets its
    update bit for bit.

    Args:
      rules: path -> `Bound`, its text ("max_norm(3)", "max_min_norm(0.5, 2)"), or None, for the
        leaves that train. Layers of a segment may differ.

    Raises:
      InputError: a text is not a bound; when used, a bound is given for a compressed leaf, or there
        are no params.

    >>> optimizer = optax.chain(optax.sgd(1.0), project([("w", "max_norm(5)"), (".*", None)]))
    >>> params = {"w": jnp.array([[1.0, 0.0]]), "b": jnp.zeros(1)}
    >>> grads = {"w": jnp.array([[-5.0, -8.0]]), "b": jnp.ones(1)}
    >>> updates, _ = optimizer.update(grads, optimizer.init(params), params)
    >>> optax.apply_updates(params, updates)["w"].tolist()  # (6, 8) has a norm of 10
    [[3.0, 4.0]]
    """
    values = [(pattern, read_one(Bound, value)) for pattern, value in rules]

    def init(params: Any) -> optax.EmptyState:
        tree.assign(values, params)  # refuses wrong rules at once
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise InputError(
                "params: none given; a projection needs them: optimizer.update(updates, state, "
                "params)"
            )
        by_layer = tree.assign(values, params)
        leaves = tree.flatten(params)

        def projected(path: str, u: Any) -> Any:
            found = [by_layer[layer] for layer in tree.layer_paths(path)]
            if not any(found):
                return u
            limits = jnp.asarray(
                [bound.bounds() if bound else (0.0, math.inf) for bound in found], jnp.float32
            ).T
            p = plain(path, leaves[path])
            shape = (-1 if tree.is_stacked(path) else 1, *(1,) * (p.ndim - 1)) if p.ndim else ()
            low, high = (jnp.broadcast_to(a.reshape(shape), p.shape) for a in limits)
            return _bounded(p, u, low, high)

        return tree.map_leaves(projected, updates), state

    return optax.GradientTransformation(init, update)


def _bounded(
    p: Float[Array, "..."],
    u: Float[Array, "..."],
    low: Float[Array, "..."],
    high: Float[Array, "..."],
) -> Float[Array, "..."]:
    new = p.astype(jnp.float32) + u.astype(jnp.float32)
    norm = jnp.sqrt(jnp.sum(new**2, axis=-1, keepdims=True)) if p.ndim else jnp.abs(new)
    norm = jnp.broadcast_to(norm, p.shape)
    wanted = jnp.clip(norm, low, high)
    back = new * (wanted / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny)) - p.astype(jnp.float32)
    return jnp.where(norm == wanted, u, back.astype(u.dtype))
