"""What files and programs of other people may take: the one home of these limits, and the one way
to raise them.

A file can claim any size, a tokenizer can multiply a text, a chat template can loop. What goes
beyond a limit is refused in one line, which names it. To raise one, call `allow` in Python, or set
the environment variable `JAXMODEL_LIMITS`:

    JAXMODEL_LIMITS=pixels=2e8,template_seconds=60 jaxmodel generate my-model --chat --prompt
    "Hello"
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from jaxmodel.errors import InputError, unknown

VARIABLE = "JAXMODEL_LIMITS"


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits.

    Attributes:
      json_bytes: of a JSON file, a vocabulary or another text that is read whole.
      file_seconds: that a process of its own may take to try a file which a library could stumble
        over, for every 256 MiB.
      file_memory: bytes that this process may take.
      pixels: of an image.
      tokenizer_seconds: for every 100,000 characters or ids of a call, and at least once. What is
        late is refused; the library cannot be stopped, and ends its work in a thread of its own.
      tokenizer_growth: the factor by which a tokenizer's steps may make a text longer.
      tokenizer_characters: that the tokens of a text to be decoded may have.
      template_seconds: for one chat.
      template_memory: bytes of the process in which templates run, Python included.
      template_characters: that a template may write.
    """

    json_bytes: int | float = 2**26
    file_seconds: int | float = 20.0
    file_memory: int | float = 2 * 2**30
    pixels: int | float = 2**26
    tokenizer_seconds: int | float = 10.0
    tokenizer_growth: int | float = 100.0
    tokenizer_characters: int | float = 2**28
    template_seconds: int | float = 10.0
    template_memory: int | float = 2**30
    template_characters: int | float = 2**24


def allow(**more: int | float) -> Limits:
    """Set limits of this process, by their names; the others stay.

    Returns:
      All limits, as they are now.

    Raises:
      InputError: a name that is none, or no number above 0.

    >>> before = limits()
    >>> allow(pixels=2e8).pixels
    200000000.0
    >>> _ = allow(**dataclasses.asdict(before))
    """
    global _now
    _now = _changed(limits(), more, "limits")
    return _now


def limits() -> Limits:
    """Return the limits of this process: the usual ones, those of the environment, and what `allow`
    set.
    """
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
    """Return how a limit is raised, for an error that one of these limits makes."""
    several = " or ".join(f"{name}=..." for name in names)
    return f"jaxmodel.limits.allow({several}) or {VARIABLE} raises it"


_now: Limits | None = None


def _changed(old: Limits, more: dict[str, Any], where: str) -> Limits:
    names = [field.name for field in dataclasses.fields(Limits)]
    made: dict[str, float] = {}
    for name, value in more.items():
        if name not in names:
            raise unknown(where, name, names)
        try:
            made[name] = float(value)
        except (TypeError, ValueError):
            made[name] = 0.0
        if not made[name] > 0:
            raise InputError(f"{where}: {name}={value} given; allowed: a number above 0")
    return dataclasses.replace(old, **made)
