"""`family`: a decorator that declares an architecture from a config and a function.

The package's own files and a user's use it alike.
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
    """The function that makes the models of a family."""

    def __call__(self, config: Any, policy: ops.Policy = ...) -> Model:
        """Return the model of one config.

        Equal arguments give the same functions, so nothing is traced twice.
        """
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """An architecture.

    Attributes:
      name: the name that `Model.family` holds.
      Config: the frozen dataclass of its sizes.
      SIZES: configs by name.
      model: the function (config, policy) -> Model.
      module: the dotted name of the module that declares it.
    """

    name: str
    Config: type[Any]
    SIZES: Mapping[str, Any]
    model: Build
    module: str


KNOWN: dict[str, Family] = {}
"""The families declared so far; `models.families()` imports the package's own first."""


def family(
    config: type[Any], sizes: Mapping[str, Any] | None = None, *, name: str = ""
) -> Callable[[Callable[[Any, ops.Policy], Model]], Build]:
    """Declare a family by decorating its function `model(config, policy) -> Model`.

    Models with equal configs and policies are one object, know their family, and have
    `with_policy`. So, in a process that has run the declaration, their bundles can be saved and
    loaded, their heads replaced, and their widths compared.

    Args:
      config: the frozen dataclass that `model` takes first; its fields are plain values, tuples or
        such dataclasses.
      sizes: configs by name, `tiny` first.
      name: the name of the family; "" for that of the file.

    Raises:
      InputError: the config is not a frozen dataclass, or another file has taken the name.

    >>> from jaxmodel.models import gpt2
    >>> model = gpt2.model(gpt2.SIZES["tiny"])
    >>> model.family, KNOWN["gpt2"].Config is gpt2.Config
    ('gpt2', True)
    >>> model is gpt2.model(gpt2.SIZES["tiny"], model.policy)
    True
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
    """Return the function that made a model, for making another of its family.

    It is None for a model of no family, or one that was wrapped.
    """
    known = KNOWN.get(model.family)
    return (
        known.model
        if known is not None and known.model(model.config, model.policy) is model
        else None
    )
