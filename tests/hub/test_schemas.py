"""The kinds of the keys in other people's JSON: each that is read has one, and a value of another
kind is one line.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from jaxmodel import schema
from jaxmodel.errors import InputError
from jaxmodel.hub import families, schemas
from jaxmodel.hub.bundle import read_config

GOLDENS = Path(__file__).parent / "goldens"
KEYS = {
    *schemas.Config.__annotations__,
    *schemas.Rope.__annotations__,
    "config",
}  # the last holds our own configs, as a dataclass


@functools.cache
def stored() -> dict[str, dict[str, Any]]:
    """A config.json for each kind of model that has stored numbers."""
    found = [json.loads(file.read_text()) for file in sorted(GOLDENS.glob("*/config.json"))]
    return {hf["model_type"]: hf for hf in found}


def test_every_key_that_a_family_reads_has_a_kind() -> None:
    for file in sorted(Path(families.__file__).parent.glob("*.py")):
        read = re.findall(
            r'\b(?:hf|own|text|image|rope|local|scaling)(?:\.get\(|\[)"(\w+)"', file.read_text()
        )
        assert not set(read) - KEYS, (
            f"{file.name} reads keys that stand not in hub/schemas.py: {sorted(set(read) - KEYS)}"
        )


WRONG = ("abc", [[]], {"a": []}, True, None, -1, 10**400)


@functools.cache
def fits(key: str, i: int) -> bool:
    """Whether the schema, which is one for all kinds of models, lets a value pass."""
    try:
        schema.make({key: WRONG[i]}, schemas.Config, "config.json")
    except InputError:
        return False
    return True


@pytest.mark.parametrize("kind", stored())
def test_a_value_of_another_kind(kind: str, tmp_path: Path) -> None:
    """Each key as a text, a list, an object, a yes, nothing and a number beyond all: read, or
    refused in one line.

    What the schema refuses no family sees, so that is tried with one kind of model alone.
    """
    file = tmp_path / "config.json"
    hf = stored()[kind]
    for key in sorted({*hf, *schemas.Config.__annotations__}):
        for i, wrong in enumerate(WRONG):
            if not fits(key, i) and kind != "llama":
                continue
            file.write_text(json.dumps({**hf, key: wrong}))
            try:
                read_config(tmp_path)
            except InputError as error:
                assert str(error).startswith(str(file)) and "\n" not in str(error), (
                    key,
                    wrong,
                    str(error),
                )
                assert "wrong type" not in str(error), (key, wrong, str(error))
