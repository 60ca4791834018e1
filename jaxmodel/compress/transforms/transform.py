"""`Transform`: what compression does to several leaves at once, before methods see each alone."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import ClassVar

import jax

from jaxmodel import rng, text_form, tree
from jaxmodel.compress.observe import Stats, observe
from jaxmodel.errors import InputError
from jaxmodel.models import Model
from jaxmodel.models.model import Inputs


@dataclasses.dataclass(frozen=True)
class Transform(text_form.Member, kind="transform", example="rotate() ; smooth(0.5)"):
    """Base of the transforms: a frozen dataclass of settings with one function.

    To add one, write a subclass in a file of `transforms`, and import it in the `__init__.py`
    there. Recipes and the contract tests find it by its class name in snake case.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    """The statistics of the inputs of `inputs` that it wants."""

    def inputs(self, model: Model, params: tree.Params) -> frozenset[str]:
        """Return the layer paths of the leaves whose inputs it wants statistics of."""
        return frozenset()

    def measure(self, model: Model, params: tree.Params, batches: Sequence[Inputs] | None) -> Stats:
        """Return the statistics that it wants, summed over batches.

        Those of `needs`, of the inputs of `inputs`; a transform that wants others replaces this.

        Args:
          model: of the parameters.
          params: stacked in any way.
          batches: inputs of the model; None where there are none.

        Raises:
          InputError: it wants some, and there are no batches.
        """
        if not self.needs or not (paths := self.inputs(model, params)):
            return {}
        pattern = "|".join(map(re.escape, sorted(paths)))
        return observe(model, params, self.given(batches), pattern, self.needs)

    def given(self, batches: Sequence[Inputs] | None) -> Sequence[Inputs]:
        """Return the batches.

        Raises:
          InputError: there are none.
        """
        if batches is None:
            raise InputError(
                f"batches: none given; {str(self)!r} needs {', '.join(self.needs)} of inputs; "
                "give batches to compress_bundle"
            )
        return batches

    def change(
        self, model: Model, params: tree.Params, stats: Stats, key: jax.Array
    ) -> tuple[Model, tree.Params]:
        """Return the model and its parameters, changed.

        Args:
          model: of the parameters.
          params: stacked in any way.
          stats: what `measure` returned.
          key: for what is drawn.

        Raises:
          InputError: the model's family does not allow it, with the reason.
        """
        raise NotImplementedError


type Transforms = tuple[Transform, ...]


def transforms() -> dict[str, type[Transform]]:
    """Return every transform by the name of its text form."""
    return text_form.members(Transform)


def parse_transforms(text: str | Iterable[str | Transform]) -> Transforms:
    """Parse transforms joined by `;`, or a list of them; empty text is none.

    Raises:
      InputError: text of another form, an unknown transform, or settings that it does not take.
    """
    parts = text.split(";") if isinstance(text, str) else list(text)
    found: list[Transform] = []
    for part in parts:
        if isinstance(part, Transform):
            found.append(part)
        elif isinstance(part, str):
            found += text_form.read(Transform, part)
        else:
            raise InputError(
                f"transforms: {part!r} given; allowed: transforms, or text such as "
                f"{Transform.example!r}"
            )
    return tuple(found)


def write_transforms(chain: Iterable[Transform]) -> str:
    """Return the text of transforms."""
    return " ; ".join(map(str, chain))


def transformed(
    model: Model,
    params: tree.Params,
    chain: Iterable[Transform],
    batches: Sequence[Inputs] | None = None,
    key: jax.Array | None = None,
) -> tuple[Model, tree.Params]:
    """Apply transforms in order; each is measured on what the earlier ones made.

    Args:
      model: of the parameters.
      params: stacked in any way.
      chain: transforms.
      batches: inputs of the model, for transforms that want statistics; None where there are none.
      key: for what is drawn; None for `jax.random.key(0)`.

    Raises:
      InputError: the model's family does not allow a transform, or one wants statistics and there
        are no batches.
    """
    tree.check(params)
    key = jax.random.key(0) if key is None else key
    for i, one in enumerate(chain):
        stats = one.measure(model, params, batches)
        own = rng.fold(jax.random.fold_in(key, i), text_form.name_of(type(one)))
        model, params = one.change(model, params, stats, own)
    return model, params
