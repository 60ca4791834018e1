"""`Method`: a frozen record that turns one leaf into a compressed one; chains of methods and their
text form.

A chain is a tuple of methods, applied in order. Its text form is what the command line takes:

>>> [type(method).__name__ for method in parse("magnitude(0.5) | rtn(bits=8)")]
['Magnitude', 'Rtn']
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from typing import Any

from jaxmodel.text_form import read_chain, write


@dataclasses.dataclass(frozen=True)
class Method:
    """Base of the methods: a frozen dataclass of settings with one function.

    A new method is a subclass in a file of this folder; the command line, the recipes and the
    contract tests find it by its class name in lower case.
    """

    def __call__(self, leaf: Any, stats: dict[str, Any] | None = None) -> Any:
        """The leaf, compressed.

        Args:
          leaf: `[..., out, in]`: an array, or what an earlier method of the chain made. Leading
            axes are layers.
          stats: what `observe` measured of the input of this leaf's contraction, or None.

        Raises:
          InputError: the method does not take this kind of leaf, or needs statistics that are not
            there.
        """
        raise NotImplementedError


type Chain = tuple[Method, ...]


def methods() -> dict[str, type[Method]]:
    """Every method by the name of its text form."""
    package = __name__.rsplit(".", 1)[0]
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{info.name}")
    return {cls.__name__.lower(): cls for cls in Method.__subclasses__()}


def parse(text: str) -> Chain:
    """A chain from its text: methods joined by `|`, each a call with literal arguments; empty text
    is the empty chain.

    Raises:
      InputError: not of that form, an unknown method, or arguments that it does not take.
    """
    return read_chain("method", text, methods(), "magnitude(0.5) | rtn(bits=8)")


def text_of(chain: Chain) -> str:
    """The text form of a chain; settings at their default are left out, but for the first.

    >>> text_of(parse("magnitude(0.5) | rtn(bits=8)"))
    'magnitude(fraction=0.5) | rtn(bits=8)'
    """

    return " | ".join(write(type(method).__name__.lower(), method) for method in chain)
