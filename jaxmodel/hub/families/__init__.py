"""File layouts of other projects, one module each, with names and configs for HF and GGUF.

Several may belong to one architecture, such as BERT's and RoBERTa's. Any other architecture, and
any config that no HF family has, is stored under its own names (`own`).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
import re
from collections.abc import Collection, Mapping
from typing import Any

from jaxmodel import models, schema, tree
from jaxmodel.errors import InputError, one_of
from jaxmodel.hub import foreign
from jaxmodel.hub.meaning import without_meaning
from jaxmodel.hub.names import Family, Name, layer_shapes
from jaxmodel.models.foreign import Foreign

OWN = "jaxmodel-"


@functools.cache
def families() -> dict[str, Family]:
    """Return every family whose files other projects write, by the name of its module."""
    names = [info.name for info in pkgutil.iter_modules(__path__)]
    return {name: importlib.import_module(f"{__name__}.{name}").FAMILY for name in names}


def family_of(model: models.Model) -> tuple[Family, dict[str, Any]]:
    """Return the family that stores a model, and its config.json.

    Raises:
      InputError: the model belongs to no family (see `models.family`) and is not a Flax module.
    """
    if isinstance(model.config, Foreign):
        return foreign.layout(model), foreign.config_of(model)
    if model.family not in models.families():
        config = type(model.config)
        raise InputError(
            f"hub: no file layout is known for the config {config.__qualname__} of "
            f"{config.__module__}; a family declared by "
            "models.family has one"
        )
    name = model.family
    bare, more = without_meaning(model.config)
    for family in sorted(
        (f for f in families().values() if f.architecture == name),
        key=lambda f: name not in f.kinds,
    ):
        theirs = family.config_to_hf(bare)
        if theirs is not None and _means(
            family, theirs, bare
        ):  # otherwise a part of the config would be lost
            return family, {**theirs, **more}
    family = own(models.families()[name])
    return family, family.config_to_hf(model.config) or {}


def _means(family: Family, theirs: dict[str, Any], config: Any) -> bool:
    try:
        return family.config_from_hf(theirs) == config
    except InputError:
        return False


def family_of_kind(
    kind: str, argument: str, gguf: bool = False, classes: Collection[str] = ()
) -> Family:
    """Return the family that reads a `model_type` (HF) or a `general.architecture` (GGUF).

    Args:
      kind: the value.
      argument: its name in the message.
      gguf: whether it is from a GGUF file.
      classes: the `architectures` of config.json; a family may claim a class by its name.

    Raises:
      InputError: no family reads it.
    """
    known = {
        k: family
        for family in families().values()
        for k in (family.gguf_kinds if gguf else family.kinds)
    }
    if not gguf and kind.removeprefix(OWN) in models.families() and kind.startswith(OWN):
        return own(models.families()[kind.removeprefix(OWN)])
    for family in families().values():
        if set(classes) & set(family.classes):
            return family
    one_of(argument, kind, known)
    return known[kind]


@functools.cache
def own(architecture: models.Family) -> Family:
    """Return the layout of an architecture under its own names.

    Tensors are named by the paths of the leaves with dots, and config.json has the fields of the
    config.
    """
    kind = OWN + architecture.name

    def names(config: Any) -> list[Name]:
        paths = [
            re.sub(r"(^|/)\d+/", r"\1{}/", path, count=1)
            for path in tree.flatten(layer_shapes(architecture.model(config)))
        ]
        return [Name(path, path.replace("/", ".")) for path in dict.fromkeys(paths)]

    def from_hf(hf: Mapping[str, Any]) -> Any:
        return schema.make(hf["config"], architecture.Config, "config.json", "config")

    def to_hf(config: Any) -> dict[str, Any]:
        return {"model_type": kind, "config": dataclasses.asdict(config)}

    return Family(architecture.name, (kind,), names, from_hf, to_hf)
