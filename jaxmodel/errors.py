"""What a person gets for bad input: one line that names the argument, the value given, what is allowed."""

from __future__ import annotations

import difflib
import importlib
import numbers
from collections.abc import Iterable
from types import ModuleType


class InputError(ValueError):
    """Bad input from a person. The message is one line; the command line prints it and exits with code 2."""


def nearest(name: str, allowed: Iterable[str], count: int = 3) -> list[str]:
    """The `count` names of `allowed` closest in spelling to `name`.

    >>> nearest("smolm2", ["gpt2", "smollm2-135m"])
    ['smollm2-135m']
    """
    return difflib.get_close_matches(name, list(allowed), n=count, cutoff=0.4)


def unknown(argument: str, given: object, allowed: Iterable[str]) -> InputError:
    """The error for a name that is not one of `allowed` (to be raised by the caller).

    >>> str(unknown("recipe", "int5", ["int4", "int8"]))
    "recipe: 'int5' is not known; allowed: int4, int8 (nearest: int8, int4)"
    """
    names = sorted(allowed)
    close = nearest(str(given), names)
    hint = f" (nearest: {', '.join(close)})" if close else ""
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return InputError(f"{argument}: {given!r} is not known; allowed: {shown}{hint}")


def at_least(argument: str, value: object, least: int = 1) -> None:
    """Refuse what is no whole number of at least `least`.

    Raises:
      InputError: it is smaller, or something else (True is no number).

    >>> at_least("steps", 0)
    Traceback (most recent call last):
      ...
    jaxmodel.errors.InputError: steps: 0 given; allowed: a whole number of at least 1
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or int(value) < least:
        raise InputError(f"{argument}: {value!r} given; allowed: a whole number of at least {least}")


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say which extra brings it.

    Raises:
      InputError: the module is not installed; the message carries the install line.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise InputError(f"this needs the package {module!r}, which is not installed: pip install 'jaxmodel[{extra}]'") from None
