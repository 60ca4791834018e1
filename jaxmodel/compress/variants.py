"""Variants of a model to compare: unchanged, in bfloat16, and by each named recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from jaxmodel import leaves, tree
from jaxmodel.compress.bundles import compress_bundle
from jaxmodel.compress.recipes import RECIPES
from jaxmodel.errors import InputError, one_of
from jaxmodel.hub import Bundle
from jaxmodel.models.model import Inputs

VERSIONS = ("f32", "bf16", *RECIPES)


def variants(
    bundle: Bundle,
    names: Sequence[str] = VERSIONS,
    *,
    batches: Sequence[Inputs] | None = None,
) -> dict[str, Callable[[], Bundle]]:
    """Return functions that make the named variants of a bundle, for `evaluate.compare`.

    Nothing is made before they are called.

    Args:
      bundle: a bundle with plain float32 weights.
      names: `f32`, `bf16` or names of recipes in `RECIPES`.
      batches: for the recipes that want to know the inputs; see `compress_bundle`.

    Raises:
      InputError: a name that is not known, or a bundle that is compressed already.
    """
    for name in names:
        one_of("names", name, VERSIONS)
    tree.check(bundle.params)
    if any(isinstance(leaf, leaves.Compressed) for leaf in tree.flatten(bundle.params).values()):
        called = bundle.card.get("name", "the bundle")
        raise InputError(
            f"model: {called!r} is already compressed; allowed: plain weights, to compare variants "
            "of them"
        )

    def make(name: str) -> Bundle:
        if name in RECIPES:
            recipe = RECIPES[name]
            return compress_bundle(bundle, recipe, batches=batches if recipe.needs else None)[0]
        if name == "f32":
            # a new object, so that what it caches for running is freed with it
            return dataclasses.replace(bundle)
        model = bundle.model.with_policy(
            dataclasses.replace(bundle.model.policy, compute_dtype="bfloat16")
        )
        return dataclasses.replace(bundle, model=model, params=tree.cast(bundle.params, "bfloat16"))

    return {name: lambda name=name: make(name) for name in names}
