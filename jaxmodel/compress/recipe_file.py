"""Recipes in files, YAML or JSON, and on the cards of bundles.

    transforms: smooth(0.5) # what is done to the whole model first; several are joined by `;`
    base: int4              # a named recipe or a chain for all matrices; rules go before it
    rules:                  # pattern of whole paths: chain; the first that matches wins
      blocks/(0|29)/.*/(q|k|v|o): rtn(bits=8)
      ?head: ""             # left as it is; a pattern with `?` in front may match nothing
    compute: bfloat16       # dtype that the model computes in afterwards; default: that of the base
    name: mixed             # for the card

All keys are optional. Without a base the rules must cover every leaf.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jaxmodel import schema, tree
from jaxmodel.compress.recipes import RECIPES, ByRole, Recipe, get_recipe
from jaxmodel.compress.transforms.transform import parse_transforms, write_transforms
from jaxmodel.errors import InputError
from jaxmodel.files import read_bytes
from jaxmodel.text_form import write

SUFFIXES = (".yaml", ".yml", ".json")
MOST_BYTES = 2**16
_DEEPEST = 8
_AS_BASE = "of the base"


@dataclasses.dataclass(frozen=True)
class _File:
    transforms: str = ""
    base: str | None = None
    rules: dict[str, str] = dataclasses.field(default_factory=dict)
    compute: str | None = _AS_BASE
    name: str | None = None


def read_recipe(place: str | Path) -> Recipe:
    """Read the recipe in a file, or the one that a bundle was made with.

    Args:
      place: a YAML or JSON file as described in this module, or the folder of a bundle whose card
        holds its recipe.

    Raises:
      InputError: a missing file, a file of another form, an unknown method (with the nearest name),
        or a bundle made without a recipe.

    >>> import pathlib, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp(), "mixed.yaml")
    >>> _ = file.write_text("{base: int4, rules: {embed: rtn(bits=6)}}")
    >>> read_recipe(file).texts()[0]
    ['embed', 'rtn(bits=6)']
    """
    path = Path(place).expanduser()
    if path.is_dir():
        where = f"{path}/jaxmodel.json"
        card = schema.make(
            schema.read(path / "jaxmodel.json").get("card"), dict[str, Any], where, "card"
        )
        if (said := card.get("recipe")) is None:
            raise InputError(
                f"recipe: the bundle {str(place)!r} was not made by a recipe; allowed: a bundle "
                "that `compress` made, or a file"
            )
        if isinstance(said, str):
            return get_recipe(said)
        return from_record(said, where)
    if path.suffix.lower() == ".json":
        return from_record(schema.read(path, Any), str(path))
    try:
        raw = read_bytes(path, MOST_BYTES)
    except FileNotFoundError:
        raise InputError(
            f"recipe: there is no file {str(place)!r}; allowed: a YAML or JSON file, or a "
            f"recipe's name"
        ) from None
    except OSError as error:
        raise InputError(f"recipe: {str(place)!r} cannot be read: {error.strerror}") from None
    return from_record(parse_yaml(raw, str(path)), str(path))


def from_record(record: Any, where: str = "recipe") -> Recipe:
    """Make a recipe from a record, the form that `to_record` writes and files have.

    Args:
      record: plain data with the keys `transforms`, `base`, `rules`, `compute`, `name`.
      where: the source of the record, for errors.

    Raises:
      InputError: a record of another form, or rules that `Recipe` refuses.
    """
    said = schema.make(record, _File, where)
    if said.base is None and not said.rules:
        raise InputError(f"{where}: neither base nor rules given; allowed: one of them or both")
    try:
        base = Recipe(()) if said.base is None else get_recipe(said.base)
        rules = [
            (tree.optional(p[1:]) if p.startswith("?") else p, chain)
            for p, chain in said.rules.items()
        ]
        compute = base.compute if said.compute == _AS_BASE else said.compute
        chain = (*parse_transforms(said.transforms), *base.transforms)
        plain = not rules and not said.transforms and compute == base.compute
        name = said.name or (said.base if plain else None)
        return Recipe((*rules, *base.rules), compute, name, chain)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def to_record(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as plain data that `from_record` reads.

    Rules that equal those of a named recipe, or of a chain alone, become its `base`.

    >>> to_record(Recipe([("head", "rtn(4)"), *get_recipe("int8").rules]))
    {'base': 'int8', 'rules': {'head': 'rtn(bits=4)'}, 'compute': None}
    """
    base = next(
        (one for one in _bases(recipe) if recipe.rules[-len(one.rules) :] == one.rules), None
    )
    own = recipe.rules if base is None else recipe.rules[: -len(base.rules)]
    rules: dict[str, str] = {}
    for pattern, chain in own:
        said = f"?{pattern}" if isinstance(pattern, tree.optional) else str(pattern)
        rules.setdefault(said, write(chain))
    record: dict[str, Any] = {}
    if recipe.transforms:
        record["transforms"] = write_transforms(recipe.transforms)
    if base is not None:
        record["base"] = base.name
    if rules:
        record["rules"] = rules
    if recipe.compute != (base.compute if base is not None else None):
        record["compute"] = recipe.compute
    if recipe.name not in (None, record.get("base")):
        record["name"] = recipe.name
    return record


def _bases(recipe: Recipe) -> list[Recipe]:
    last = recipe.rules[-1][1] if recipe.rules else None
    own = [get_recipe(write(last.matrices))] if isinstance(last, ByRole) and last.matrices else []
    return [*RECIPES.values(), *own]


def parse_yaml(raw: bytes, where: str) -> Any:
    """Parse YAML as plain data.

    Anchors are refused, since a small text could expand to a lot of data; so are duplicate keys and
    deep nesting.

    Raises:
      InputError: invalid YAML, or one of these.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """A loader that refuses anchors, duplicate keys and deep nesting."""

        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            """Compose a node unless it is an anchor, an alias or too deep."""
            event: Any = self.peek_event()
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise InputError(
                    f"{where}: line {event.start_mark.line + 1} has an anchor or an alias; "
                    f"allowed: plain YAML"
                )
            self.depth += 1
            if self.depth > _DEEPEST:
                raise InputError(f"{where}: nested too deeply; allowed: {_DEEPEST} levels")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            """Construct a mapping whose keys are text, each only once."""
            seen = set()
            for key, _ in node.value:
                if not isinstance(self.construct_object(key, deep=True), str):
                    said = key.value if isinstance(key.value, str) else "a list or a mapping"
                    raise InputError(
                        f"{where}: line {key.start_mark.line + 1}: the key {said} is not a string; "
                        "quote it"
                    )
                if key.value in seen:
                    raise InputError(
                        f"{where}: line {key.start_mark.line + 1}: the key {key.value!r} is "
                        "repeated"
                    )
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(raw.decode("utf-8-sig"), Loader)
    except InputError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" in line {mark.line + 1}" if mark is not None else ""
        raise InputError(f"{where}: not YAML: {error.problem}{line}") from None
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, TypeError) as error:
        raise InputError(f"{where}: not YAML: {' '.join(str(error).split())}") from None
