"""Methods, each a frozen record that compresses one leaf, and chains of them.

A chain is a tuple of methods, applied in order. The command line takes it as text:

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

    To add a method, write a subclass in a file of this folder. The command line, the recipes and
    the contract tests find it by its class name in lower case.
    """

    def __call__(self, leaf: Any, stats: dict[str, Any] | None = None) -> Any:
        """Return the compressed leaf.

        Args:
          leaf: `[..., out, in]`: an array or the result of an earlier method of the chain. Leading
            axes are layers.
          stats: the statistics that `observe` measured for the input of this leaf, or None.

        Raises:
          InputError: the method does not take this kind of leaf, or needs statistics that are
            missing.
        """
        raise NotImplementedError


type Chain = tuple[Method, ...]


def methods() -> dict[str, type[Method]]:
    """Return every method by the name of its text form."""
    package = __name__.rsplit(".", 1)[0]
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{info.name}")
    return {cls.__name__.lower(): cls for cls in Method.__subclasses__()}


def parse(text: str) -> Chain:
    """Parse the text form of a chain: methods joined by `|`, each a call with literal arguments.

    Empty text is the empty chain.

    Raises:
      InputError: text of another form, an unknown method, or arguments that it does not take.
    """
    return read_chain("method", text, methods(), "magnitude(0.5) | rtn(bits=8)")


def text_of(chain: Chain) -> str:
    """Write a chain as text; settings with default values are omitted, except the first.

    >>> text_of(parse("magnitude(0.5) | rtn(bits=8)"))
    'magnitude(fraction=0.5) | rtn(bits=8)'
    """
    return " | ".join(write(type(method).__name__.lower(), method) for method in chain)
