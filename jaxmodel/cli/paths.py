"""Files that options name: `~` for the home folder, and `-` for standard input."""

from __future__ import annotations

import atexit
import dataclasses
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from jaxmodel.errors import InputError

READS = {
    **dict.fromkeys(
        ("data", "calibration", "heldout", "input", "system", "tools", "documents"), ""
    ),
    "recipe": ".yaml",
}
"""Options that read a file, which may be standard input -> the ending of its name."""
PATHS = {
    *READS,
    *("model", "init", "name", "folder", "config", "adapter", "out", "runs", "json", "checkpoints"),
    "versions",
}
"""Options whose values are, or may be, paths."""
MOST_BYTES = 2**30
"""Of standard input."""


def at_home(option: str, value: str) -> str:
    """Return the value of an option, with the home folder for a leading `~`.

    >>> at_home("prompt", "~/notes.txt")
    '~/notes.txt'
    >>> at_home("data", "~/notes.txt") == os.path.expanduser("~/notes.txt")
    True
    """
    return os.path.expanduser(value) if option in PATHS else value


def with_standard_input(options: Any) -> Any:
    """Return options in which what is read from `-` is there: a text, or the name of a file.

    Raises:
      InputError: `-` is given twice, to `train`, or standard input is no text or too long.
    """
    known = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    wanting = [name for name in ("prompt", *READS) if "-" in _several(known.get(name))]
    if not wanting:
        return options
    (name, *more) = wanting
    if more or _several(known[name]).count("-") > 1:
        raise InputError(
            f"--{(more or wanting)[0]}: '-' given twice; allowed: once, as there is one standard "
            f"input"
        )
    if hasattr(options, "steps"):
        raise InputError(
            f"--{name}: '-' given for a run, which must find its data again when it is resumed; "
            f"allowed: a file"
        )
    if name == "prompt":
        try:
            return dataclasses.replace(options, prompt=_standard_input(name).decode("utf-8"))
        except UnicodeDecodeError:
            raise InputError(f"--{name}: standard input is no UTF-8 text") from None
    file = spooled(name, READS[name])
    value = known[name]
    now = file if isinstance(value, str) else tuple(file if one == "-" else one for one in value)
    return dataclasses.replace(options, **{name: now})


def spooled(option: str, ending: str = "") -> str:
    """Return the name of a file with what standard input holds; it goes when the program ends."""
    content = _standard_input(option)
    room = tempfile.mkdtemp(prefix="jaxmodel-")
    atexit.register(shutil.rmtree, room, ignore_errors=True)
    path = Path(room, f"standard-input{ending}")
    path.write_bytes(content)
    return str(path)


def _standard_input(option: str) -> bytes:
    stream = getattr(sys.stdin, "buffer", None)
    if stream is None:
        raise InputError(f"--{option}: '-' given, and there is no standard input")
    content = stream.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise InputError(
            f"--{option}: standard input has more than the {MOST_BYTES:,} bytes that are read"
        )
    return content


def _several(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
