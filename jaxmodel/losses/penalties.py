"""What keeps weights small: penalties by rules.

Rules are path -> penalty, a frozen dataclass or its text; None, `()` or `""` for nothing. Layers of
a segment may differ. Whatever is not given a value must be given none, by a closing `(".*", None)`.

>>> from jaxmodel.losses import next_token
>>> loss = regularized(next_token, [("blocks/.*/mlp/.*", "l2(1e-4)"), ("embed", L1(1e-5)), (".*", None)])
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
from jaxmodel.text_form import read_chain


@dataclasses.dataclass(frozen=True)
class Penalty:
    """Base of the penalties: a frozen dataclass of settings, all at least 0, and one function.

    A new one is a subclass; its text form is the class name in lower case, called with its
    settings.
    """

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not isinstance(value, int | float) or not value >= 0:
                raise InputError(
                    f"{type(self).__name__.lower()}: {name} is {value!r}; allowed: a number of at "
                    f"least 0"
                )

    def __call__(self, w: Float[Array, "..."]) -> Float[Array, ""]:
        """What a weight in float32 costs."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class L1(Penalty):
    """`l1 sum |w|`, which makes weights zero (Tibshirani, 1996)."""

    l1: int | float

    def __call__(self, w: Float[Array, "..."]) -> Float[Array, ""]:
        return self.l1 * jnp.sum(jnp.abs(w))


@dataclasses.dataclass(frozen=True)
class L2(Penalty):
    """`l2 sum w^2`, which makes them small; its gradient is `2 l2 w` (Hoerl & Kennard, 1970)."""

    l2: int | float

    def __call__(self, w: Float[Array, "..."]) -> Float[Array, ""]:
        return self.l2 * jnp.sum(w**2)


@dataclasses.dataclass(frozen=True)
class Elastic(Penalty):
    """`l1 sum |w| + l2 sum w^2`: the elastic net (Zou & Hastie, 2005)."""

    l1: int | float
    l2: int | float

    def __call__(self, w: Float[Array, "..."]) -> Float[Array, ""]:
        return self.l1 * jnp.sum(jnp.abs(w)) + self.l2 * jnp.sum(w**2)


def regularized(loss: Loss, rules: tree.Rules) -> Loss:
    """A loss with what the weights cost added to it, in training only.

    Args:
      loss: of the data.
      rules: path -> `Penalty`, its text ("l1(1e-4)", "elastic(1e-4, l2=1e-3)"), or None.

    Returns:
      The loss. In training its metrics have `penalty`, what was added.

    Raises:
      InputError: when called, a text that is no penalty, or a penalty of a compressed leaf or one
        of whole numbers.
    """
    values = [(pattern, parsed(value, Penalty)) for pattern, value in rules]

    @functools.wraps(loss)  # so that a step sees which keywords it takes
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
    """The sum of what each leaf costs.

    >>> float(penalties([("w", "l2(0.5)"), ("v", "l1(2)")], {"w": jnp.array([1.0, -2.0]), "v": jnp.array([-3.0])}))
    8.5
    """
    by_layer = tree.assign([(pattern, parsed(value, Penalty)) for pattern, value in rules], params)
    total = jnp.float32(0)
    for path, leaf in tree.flatten(params).items():
        found = [by_layer[layer] for layer in tree.layer_paths(path)]
        if not any(found):
            continue
        w = plain(path, leaf).astype(jnp.float32)
        if len(set(found)) == 1:  # sums do not mind the axis of layers
            total = total + found[0](w)
        else:
            total = sum((penalty(w[i]) for i, penalty in enumerate(found) if penalty), start=total)
    return total


# ------------------------------------------------------------------------------------ the text form


def parsed[T](value: Any, base: type[T]) -> T | None:
    """A rule's value as a member of `base`: itself, from its text, or None for None, `()` and `""`.

    >>> parsed("elastic(1e-4, l2=0.1)", Penalty)
    Elastic(l1=0.0001, l2=0.1)

    Raises:
      InputError: neither, or settings that it does not take.
    """
    if value is None or value == () or isinstance(value, base):
        return value or None
    argument = base.__name__.lower()
    if not isinstance(value, str):
        raise InputError(
            f"{argument}: {value!r} given; allowed: {', '.join(_members(base))} as a text or an "
            f"object, or None"
        )
    found = read_chain(argument, value, _members(base), " or ".join(_forms(base)))
    if len(found) > 1:
        raise InputError(f"{argument}: {value!r} given; allowed: one of {', '.join(_forms(base))}")
    return found[0] if found else None


def plain(path: str, leaf: Any) -> Array:
    """The leaf, if it is a plain floating-point array.

    Raises:
      InputError: it is not; the message names it.
    """
    if isinstance(leaf, Compressed) or not jnp.issubdtype(leaf.dtype, jnp.floating):
        kind = type(leaf).__name__ if isinstance(leaf, Compressed) else str(leaf.dtype)
        raise InputError(
            f"rules: the leaf {path!r} is {kind}; allowed: plain floating-point weights, and None "
            f"for the others"
        )
    return leaf


def _members[T](base: type[T]) -> dict[str, type[T]]:
    return {cls.__name__.lower(): cls for cls in base.__subclasses__()}


def _forms(base: Any) -> list[str]:
    return [
        f"{name}({', '.join(f.name for f in dataclasses.fields(cls))})"
        for name, cls in _members(base).items()
    ]
