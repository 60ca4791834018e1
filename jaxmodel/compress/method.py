"""Methods, each a frozen record that compresses one leaf, and chains of them.

A chain is a tuple of methods, applied in order. The command line takes it as text:

>>> [type(method).__name__ for method in parse("magnitude(0.5) | rtn(bits=8)")]
['Magnitude', 'Rtn']
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax

from jaxmodel import text_form
from jaxmodel.compress.draft import Draft, LeafStats, run_chain
from jaxmodel.errors import InputError
from jaxmodel.leaves.leaf import check_weights


@dataclasses.dataclass(frozen=True)
class Method(text_form.Member, kind="method", example="magnitude(0.5) | rtn(bits=8)"):
    """Base of the methods: a frozen dataclass of settings with one function.

    To add a method, write a subclass in a file of `prune` or `quantize`, and import it in the
    `__init__.py` there. The command line, the recipes and the contract tests find it by its class
    name in snake case.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    """The statistics of the contraction's input that the method wants, beside their count."""

    def step(self, draft: Draft, stats: LeafStats, key: jax.Array) -> Draft:
        """Return the draft with what the method decides. Pure and traceable.

        Args:
          draft: one matrix, with what earlier methods of the chain decided.
          stats: of what the draft's weight meets: `needs`, and `count`.
          key: for what is drawn.
        """
        raise NotImplementedError

    def __call__(
        self, leaf: Any, stats: LeafStats | None = None, key: jax.Array | None = None
    ) -> Any:
        """Compress one leaf by this method alone.

        Args:
          leaf: `[..., out, in]`, an array or a compressed leaf; leading axes are layers.
          stats: the statistics of its input (see `observe`), with the same leading axes.
          key: for what is drawn; None for `jax.random.key(0)`. Each layer gets its own.

        Returns:
          The compressed leaf.

        Raises:
          InputError: the method does not take this kind of leaf, or needs statistics that are
            missing.

        >>> parse("rtn(4)")[0](jax.numpy.ones((2, 8))).bits
        4
        """
        name = text_form.name_of(type(self))
        if len(leaf.shape) < 2:
            raise InputError(f"{name}: a leaf of shape {list(leaf.shape)}; allowed: matrices")
        check_weights(leaf, name)
        key = jax.random.key(0) if key is None else key
        lead = leaf.shape[:-2]
        keys = jax.random.split(key, lead) if lead else key
        return run_chain((self,), leaf, stats or {}, keys)[0]


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
