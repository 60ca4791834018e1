"""Compressing a bundle: its params, the dtype that its model computes in, and its card."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax

from jaxmodel import data, tree
from jaxmodel.compress.apply import apply
from jaxmodel.compress.calibrate import HELD_OUT, calibrate
from jaxmodel.compress.gradients import Loss
from jaxmodel.compress.heldout import hold_out
from jaxmodel.compress.recipe_file import to_record
from jaxmodel.compress.recipes import Recipe, as_recipe
from jaxmodel.compress.report import Report
from jaxmodel.compress.texts import BY_DEFAULT, text_batches
from jaxmodel.compress.transforms.transform import transformed
from jaxmodel.errors import InputError
from jaxmodel.hub import Bundle
from jaxmodel.models.model import Inputs


def compress_bundle(
    bundle: Bundle,
    recipe: Recipe | tree.Rules,
    name: str | None = None,
    *,
    batches: Iterable[Inputs] | None = None,
    order: Literal["once", "sequential"] = "once",
    held_out: float = HELD_OUT,
    cap: float | None = None,
    loss: Loss | None = None,
    key: jax.Array | None = None,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[Bundle, Report]:
    """Compress a bundle, set its compute dtype by the recipe, and record the recipe on its card.

    The recipe's transforms come first; methods want to know the inputs of the transformed model.

    Args:
      bundle: the model, its params and its card.
      recipe: a `Recipe` or its rules alone.
      name: the name of the recipe on the card; None for its own. The card has the rules too, except
        those of an unchanged named recipe.
      batches: inputs of the model. What the recipe's transforms and methods want to know about
        them is measured. None for a recipe that wants nothing, and of a model of texts for those
        of `text_batches(bundle)`.
      order: see `calibrate`, as are `held_out`, `cap`, `loss`, `key` and `on_row`.
      held_out: the part of the batches that only judges.
      cap: None, or how many times as long as the median an input may be.
      loss: for the report, and for methods that want gradients.
      key: for methods that draw.
      on_row: called with the record of each leaf as soon as it is compressed.

    Raises:
      InputError: as for `apply` and `calibrate`; statistics are wanted, there are no batches, and
        the model reads no texts; a transform that the model's family does not allow.
    """
    recipe = as_recipe(recipe)
    given = None if batches is None else list(batches)
    text = None
    if batches is None and recipe.needs:
        text = data.load_text(BY_DEFAULT)
        try:
            given = text_batches(bundle, text)
        except InputError as error:
            raise InputError(
                f"batches: none given; the recipe needs {', '.join(recipe.needs)} of inputs, and "
                f"no text can be measured ({error}); allowed: batches of the model's inputs"
            ) from None
    elif batches is None and order != "once":
        raise InputError(f"order: {order!r} given without batches; allowed: batches too")
    seen = None if given is None else hold_out(given, held_out)[0]
    model, plain = transformed(bundle.model, bundle.params, recipe.transforms, seen, key)
    rules = dataclasses.replace(recipe, transforms=())
    if given is None:
        params, done = apply(rules, plain, axes=model.axes, key=key, on_row=on_row)
    else:
        params, done = calibrate(
            model,
            plain,
            rules,
            given,
            order=order,
            held_out=held_out,
            cap=cap,
            loss=loss,
            key=key,
            on_row=on_row,
        )
    if text is not None:
        told = {"name": text.name, "origin": text.origin, "sha256": text.sha256}
        done = dataclasses.replace(done, protocol={**done.protocol, "text": told})
    done = dataclasses.replace(done, bytes_before=tree.nbytes(bundle.params))
    said = to_record(dataclasses.replace(recipe, name=name or recipe.name))
    said = said["base"] if list(said) == ["base"] else said
    card = {**bundle.card, "recipe": said, "bits_per_weight": done.bits_per_weight}
    return dataclasses.replace(bundle, model=recipe.adapt(model), params=params, card=card), done
