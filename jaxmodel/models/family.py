"""`family`: what makes an architecture of a config and a function; the package's own files and a
user's are declared alike.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from jaxmodel import ops
from jaxmodel.errors import InputError
from jaxmodel.models.model import Model


@runtime_checkable
class Build(Protocol):
    """The function that a family's models are made by."""

    def __call__(self, config: Any, policy: ops.Policy = ...) -> Model:
        """Return the model of one config; equal arguments give the same functions, so nothing is
        traced twice.
        """
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """An architecture.

    Attributes:
      name: as `Model.family` says it.
      Config: the frozen dataclass of its sizes.
      SIZES: configs by name.
      model: config, policy -> Model.
      module: dotted, where it is declared.
    """

    name: str
    Config: type[Any]
    SIZES: Mapping[str, Any]
    model: Build
    module: str


KNOWN: dict[str, Family] = {}
"""Those that were declared so far; `models.families()` imports the package's own first."""


def family(
    config: type[Any], sizes: Mapping[str, Any] | None = None, *, name: str = ""
) -> Callable[[Callable[[Any, ops.Policy], Model]], Build]:
    """Declare a family: a decorator for `model(config, policy) -> Model`.

    Models of equal configs and policies are one object, know their family, and have `with_policy`.
    So a bundle of them can be saved and loaded, its head be replaced, its widths be compared, in a
    process where this declaration was run.

    Args:
      config: the frozen dataclass that `model` takes first; its fields are plain values, tuples or
        such dataclasses.
      sizes: configs by name, `tiny` first.
      name: of the family; "" for that of the file.

    Raises:
      InputError: a config that is no frozen dataclass, or a name that another file has taken.

    >>> from jaxmodel.models import gpt2
    >>> model = gpt2.model(gpt2.SIZES["tiny"])
    >>> model.family, model is gpt2.model(gpt2.SIZES["tiny"], model.policy), KNOWN["gpt2"].Config is gpt2.Config
    ('gpt2', True, True)
    """
    if not dataclasses.is_dataclass(config) or not config.__dataclass_params__.frozen:  # pyright: ignore
        raise InputError(f"config: {config!r} given; allowed: a frozen dataclass")

    def declare(make: Callable[[Any, ops.Policy], Model]) -> Build:
        called = name or make.__module__.rpartition(".")[2]
        if called == "__main__":
            raise InputError(
                "name: none given; a family that is declared in a notebook or a script needs one"
            )
        if called in KNOWN and KNOWN[called].module != make.__module__:
            raise InputError(
                f"name: {called!r} is the family of {KNOWN[called].module}; allowed: another name"
            )

        @functools.cache
        def built(config: Any, policy: ops.Policy) -> Model:
            model = make(config, policy)
            return dataclasses.replace(
                model, family=called, with_policy=functools.partial(built, config)
            )

        @functools.wraps(make)
        def build(config: Any, policy: ops.Policy = ops.Policy()) -> Model:
            return built(config, policy)

        KNOWN[called] = Family(called, config, dict(sizes or {}), build, make.__module__)
        return build

    return declare


def build_of(model: Model) -> Build | None:
    """Return the function that made a model, for another of its family; None for one of no family,
    or one that was wrapped.
    """
    known = KNOWN.get(model.family)
    return (
        known.model
        if known is not None and known.model(model.config, model.policy) is model
        else None
    )
