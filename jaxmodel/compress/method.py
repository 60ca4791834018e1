"""Methods, each a frozen record that compresses one leaf, and chains of them.

A chain is a tuple of methods, applied in order. The command line takes it as text:

>>> [type(method).__name__ for method in parse("magnitude(0.5) | rtn(bits=8)")]
['Magnitude', 'Rtn']
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax

from jaxmodel import text_form
from jaxmodel.compress.draft import Draft, LeafStats


@dataclasses.dataclass(frozen=True)
class Method(text_form.Member, kind="method", example="magnitude(0.5) | rtn(bits=8)"):
    """Base of the methods: a frozen dataclass of settings with one function.

    To add a method, write a subclass in a file of this folder, and import it in `__init__.py`. The
    command line, the recipes and the contract tests find it by its class name in snake case.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    """The statistics of the contraction's input that the method wants, beside their count."""

    def __call__(self, draft: Draft, stats: LeafStats, key: jax.Array) -> Draft:
        """Return the draft with what the method decides. Pure and traceable.

        Args:
          draft: one matrix, with what earlier methods of the chain decided.
          stats: of what the draft's weight meets: `needs`, and `count`.
          key: for what is drawn.
        """
        raise NotImplementedError


type Chain = tuple[Method, ...]


def methods() -> dict[str, type[Method]]:
    """Return every method by the name of its text form."""
    return text_form.members(Method)


def parse(text: str) -> Chain:
    """Parse the text form of a chain: methods joined by `|`, each a call with literal arguments.

    Empty text is the empty chain. `text_form.write` is the inverse.

    Raises:
      InputError: text of another form, an unknown method, or arguments that it does not take.
    """
    return text_form.read(Method, text)
