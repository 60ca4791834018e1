"""What the options of all verbs have in common: the first ones, and texts of the help."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from tyro.conf import arg

from jaxmodel.errors import Allowed

SOURCE = (
    "a known name (smollm2-135m, which is SmolLM2-135M-Instruct decoded from a 4-bit file), a "
    "size whose weights are on the Hugging Face hub (gpt2), a bundle folder, a .gguf file, or a "
    "hub id 'org/name' or 'org/name@revision'"
)
NAMES = (
    "english",
    "english_train",
    "pydoc",
    "tinyshakespeare",
    "wikitext2-test",
    "wikitext2-valid",
)
"""Texts that have a name, those of `data.text.NAMES`: the help does not import the package."""
TEXT = f"a UTF-8 file, '-' for standard input, or one of {', '.join(NAMES)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
    """The options of every verb.

    Attributes:
      json: Also write the results as JSON to this file; with '-' print them on standard output,
        and nothing else.
      runs: Folder in which the verb creates its run folder, <time>-<verb>/, with the options, the
        versions of the software and the results.
    """

    LEAST: ClassVar[Mapping[str, int | Allowed]] = {}
    """Option -> the smallest whole number that it allows, or its range of numbers."""

    json: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="(default: no JSON)")] = None
    runs: Annotated[str, arg(metavar="FOLDER")] = "runs"


def defaults(options: Any) -> dict[str, Any]:
    """Return the default of each option that has one."""
    return {
        field.name: field.default
        for field in dataclasses.fields(options)
        if field.default is not dataclasses.MISSING
    }
