"""Limits of time and memory for files and programs of other people.

A file can claim any size, a tokenizer can multiply a text, a chat template can loop. If a limit is
exceeded, a line of error names it. To raise one, call `allow` in Python, or set the environment
variable `JAXMODEL_LIMITS`:

    export JAXMODEL_LIMITS=pixels=2e8,template_seconds=60
    jaxmodel generate my-model --chat --prompt "Hello"
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from jaxmodel.errors import InputError, one_of

VARIABLE = "JAXMODEL_LIMITS"


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits, each the largest allowed value.

    Attributes:
      json_bytes: bytes of a JSON file, a vocabulary or another text that is read into memory.
      file_seconds: seconds for each 256 MiB of a file that a child process tries to read first.
      file_memory: bytes of memory of that process.
      download_bytes: bytes of a remote file that is copied to this machine to be read (Parquet,
        ArrayRecord), in the folder for temporary files.
      pixels: pixels of an image.
      tokenizer_seconds: seconds for each 100,000 characters or ids of a call (at least once). A
        late result is refused; the library cannot be stopped and ends its work in a thread.
      tokenizer_growth: factor by which the steps of a tokenizer may lengthen a text.
      tokenizer_characters: characters of the tokens of a text to decode.
      template_seconds: seconds for one chat.
      template_memory: bytes of the process in which templates run, Python included.
      template_characters: characters that a template may write.
    """

    json_bytes: int | float = 2**26
    file_seconds: int | float = 20.0
    file_memory: int | float = 2 * 2**30
    download_bytes: int | float = 2**34
    pixels: int | float = 2**26
    tokenizer_seconds: int | float = 10.0
    tokenizer_growth: int | float = 100.0
    tokenizer_characters: int | float = 2**28
    template_seconds: int | float = 10.0
    template_memory: int | float = 2**30
    template_characters: int | float = 2**24


def allow(**more: int | float) -> Limits:
    """Set some limits of this process by name.

    Returns:
      All limits, with the changes.

    Raises:
      InputError: an unknown name, or a value that is not a number above 0.

    >>> before = limits()
    >>> allow(pixels=2e8).pixels
    200000000.0
    >>> _ = allow(**dataclasses.asdict(before))
    """
    global _now
    _now = _changed(limits(), more, "limits")
    return _now


def limits() -> Limits:
    """Return the limits of this process: defaults, those of the environment, and of `allow`."""
    global _now
    if _now is None:
        parts = [part for part in os.environ.get(VARIABLE, "").split(",") if part.strip()]
        if wrong := next((part for part in parts if "=" not in part), None):
            raise InputError(
                f"{VARIABLE}: {wrong.strip()!r} given; allowed: NAME=NUMBER, such as pixels=2e8"
            )
        _now = _changed(Limits(), dict(part.strip().split("=", 1) for part in parts), VARIABLE)
    return _now


def way(*names: str) -> str:
    """Return how to raise a limit, for the error that it causes."""
    several = " or ".join(f"{name}=..." for name in names)
    return f"jaxmodel.limits.allow({several}) or {VARIABLE} raises it"


_now: Limits | None = None


def _changed(old: Limits, more: dict[str, Any], where: str) -> Limits:
    names = [field.name for field in dataclasses.fields(Limits)]
    made: dict[str, float] = {}
    for name, value in more.items():
        one_of(where, name, names)
        try:
            made[name] = float(value)
        except (TypeError, ValueError):
            made[name] = 0.0
        if not made[name] > 0:
            raise InputError(f"{where}: {name}={value} given; allowed: a number above 0")
    return dataclasses.replace(old, **made)
