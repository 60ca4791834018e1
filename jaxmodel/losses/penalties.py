"""Penalties that keep weights small, given by rules.

Rules map paths to penalties: a frozen dataclass or its text; None, `()` or `""` for no penalty.
Layers of a segment may differ. Leaves without a penalty must be covered too, by a closing
`(".*", None)`.

>>> from jaxmodel.losses import next_token
>>> rules = [("blocks/.*/mlp/.*", "l2(1e-4)"), ("embed", L1(1e-5)), (".*", None)]
>>> loss = regularized(next_token, rules)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodel import tree
from jaxmodel.errors import InputError
from jaxmodel.leaves import Compressed
from jaxmodel.losses.contract import Loss
from jaxmodel.models import Model
from jaxmodel.schema import FromZero
from jaxmodel.text_form import Member, read_one


@dataclasses.dataclass(frozen=True)
class Penalty(Member, kind="penalty", example="l2(1e-4)"):
    """Base class of the penalties: a frozen dataclass of settings and one function.

    To add a penalty, write a subclass. Its text form is the class name in snake case, called with
    its settings.

    Attributes:
      l1: the factor of `sum |w|`.
      l2: the factor of `sum w^2`.
    """

    def __call__(self, w: Float[Array, "..."]) -> Float[Array, ""]:
        """Return the cost of a weight, given in float32."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class L1(Penalty):
    """The penalty `l1 sum |w|`, which makes weights zero (Tibshirani, 1996)."""

    l1: FromZero

    def __call__(self, w: Float[Array, "..."]) -> Float[Array, ""]:
        """Return `l1 sum |w|`."""
        return self.l1 * jnp.sum(jnp.abs(w))


@dataclasses.dataclass(frozen=True)
class L2(Penalty):
    """The penalty `l2 sum w^2`, which makes weights small (Hoerl & Kennard, 1970).

    Its gradient is `2 l2 w`.
    """

    l2: FromZero

    def __call__(self, w: Float[Array, "..."]) -> Float[Array, ""]:
        """Return `l2 sum w^2`."""
        return self.l2 * jnp.sum(w**2)


@dataclasses.dataclass(frozen=True)
class Elastic(Penalty):
    """The elastic net `l1 sum |w| + l2 sum w^2` (Zou & Hastie, 2005)."""

    l1: FromZero
    l2: FromZero

    def __call__(self, w: Float[Array, "..."]) -> Float[Array, ""]:
        """Return `l1 sum |w| + l2 sum w^2`."""
        return self.l1 * jnp.sum(jnp.abs(w)) + self.l2 * jnp.sum(w**2)


def regularized(loss: Loss, rules: tree.Rules) -> Loss:
    """Add the penalties of the weights to a loss, in training only.

    Args:
      loss: the loss of the data.
      rules: path -> `Penalty`, its text ("l1(1e-4)", "elastic(1e-4, l2=1e-3)"), or None.

    Returns:
      The loss. In training, its metrics include `penalty`, the amount added.

    Raises:
      InputError: when called, a text is not a penalty, or the leaf is compressed or of integers.
    """
    values = [(pattern, read_one(Penalty, value)) for pattern, value in rules]

    @functools.wraps(loss)  # so that a step sees which keyword arguments the loss takes
    def penalised(
        model: Model,
        params: tree.Params,
        batch: Mapping[str, Array],
        rng: Array | None = None,
        *,
        train: bool = True,
        **more: Any,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        value, metrics = loss(model, params, batch, rng, train=train, **more)
        if not train:
            return value, metrics
        penalty = penalties(values, params)
        return value + penalty, {**metrics, "penalty": penalty}

    return penalised


def penalties(rules: tree.Rules, params: tree.Params) -> Float[Array, ""]:
    """Compute the sum of the penalties of all leaves.

    >>> params = {"w": jnp.array([1.0, -2.0]), "v": jnp.array([-3.0])}
    >>> float(penalties([("w", "l2(0.5)"), ("v", "l1(2)")], params))
    8.5
    """
    by_layer = tree.assign(
        [(pattern, read_one(Penalty, value)) for pattern, value in rules], params
    )
    total = jnp.float32(0)
    for path, leaf in tree.flatten(params).items():
        found = [by_layer[layer] for layer in tree.layer_paths(path)]
        if not any(found):
            continue
        w = plain(path, leaf).astype(jnp.float32)
        if len(set(found)) == 1:  # a sum over stacked layers is the sum of theirs
            total = total + found[0](w)
        else:
            total = sum((penalty(w[i]) for i, penalty in enumerate(found) if penalty), start=total)
    return total


def plain(path: str, leaf: Any) -> Array:
    """Return the leaf if it is a plain floating-point array.

    Raises:
      InputError: the leaf is something else; the message names it.
    """
    if isinstance(leaf, Compressed) or not jnp.issubdtype(leaf.dtype, jnp.floating):
        kind = type(leaf).__name__ if isinstance(leaf, Compressed) else str(leaf.dtype)
        raise InputError(
            f"rules: the leaf {path!r} is {kind}; allowed: plain floating-point weights, and None "
            f"for the others"
        )
    return leaf
