"""Errors for bad input: one line with the argument, the given value and what is allowed."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib
import math
import numbers
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class InputError(ValueError):
    """Bad input from a person.

    The message is one line; the command line prints it and exits with code 2.
    """


class MissingPackage(InputError):
    """An error for an optional package that is not installed, with the command to install it."""


def nearest(name: str, allowed: Iterable[str], count: int = 3) -> list[str]:
    """Return the `count` names of `allowed` that are closest in spelling to `name`.

    >>> nearest("smolm2", ["gpt2", "smollm2-135m", "smollm2-135m"])
    ['smollm2-135m']
    """
    return difflib.get_close_matches(name, list(dict.fromkeys(allowed)), n=count, cutoff=0.4)


def unknown(argument: str, given: object, allowed: Iterable[str]) -> InputError:
    """Make the error for a name that is not one of `allowed`; callers raise it.

    >>> str(unknown("recipe", "int5", ["int4", "int8"]))
    "recipe: 'int5' is not known; allowed: int4, int8 (nearest: int8, int4)"
    """
    names = sorted(allowed)
    close = nearest(str(given), names)
    hint = f" (nearest: {', '.join(close)})" if close else ""
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return InputError(f"{argument}: {given!r} is not known; allowed: {shown}{hint}")


def one_of(argument: str, given: object, allowed: Collection[Any]) -> None:
    """Refuse a name that is not one of `allowed`.

    Raises:
      InputError: it is another; the message names the nearest.

    >>> one_of("pool", "median", ["max", "mean"])
    Traceback (most recent call last):
      ...
    jaxmodel.errors.InputError: pool: 'median' is not known; allowed: max, mean (nearest: mean, max)
    """
    if given not in allowed:
        raise unknown(argument, given, allowed)


def printable(text: str) -> str:
    r"""Replace control characters and marks of writing direction in a text by their codes.

    So a name or a model's text cannot move the cursor of a terminal. Line ends and tabs stay.

    >>> printable("a\x1b[2Jb\u202ec")
    'a\\x1b[2Jb\\u202ec'
    """
    return _CONTROL.sub(lambda m: m[0].encode("unicode_escape").decode(), text)


@contextlib.contextmanager
def border(what: str) -> Iterator[None]:
    """Turn any error that a library raises about given data into an `InputError` of one line.

    Libraries have errors of their own, and those of Rust (`PanicException`) are no `Exception`.

    Args:
      what: the argument or file and what is wrong: "a.json: no tokenizer".

    Raises:
      InputError: in place of the library's error; an `InputError` passes unchanged.

    >>> with border("data: no number"):
    ...     int("a")
    Traceback (most recent call last):
      ...
    jaxmodel.errors.InputError: data: no number: invalid literal for int() with base 10: 'a'
    """
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except MemoryError:
        raise InputError(f"{what}: it needs more memory than there is") from None
    except BaseException as error:
        raise InputError(
            f"{what}: {' '.join(str(error).split())[:500] or type(error).__name__}"
        ) from None


type Allowed = tuple[Callable[[float], bool], str]
"""A test whether a number is allowed, and the allowed numbers in words."""

FROM_ZERO: Allowed = (lambda x: 0 <= x < math.inf, "a finite number of at least 0")
SHARE: Allowed = (lambda x: 0 <= x <= 1, "0 to 1")
FACTOR: Allowed = (lambda x: 0 < x <= 1, "above 0 and at most 1")
ABOVE_ZERO: Allowed = (lambda x: 0 < x < math.inf, "a finite number above 0")
BELOW_ONE: Allowed = (lambda x: 0 <= x < 1, "at least 0 and below 1")


def at_least(argument: str, value: object, least: int = 1) -> None:
    """Refuse a value that is not a whole number of at least `least`.

    Raises:
      InputError: the value is smaller, or no whole number (True is none).

    >>> at_least("steps", 0)
    Traceback (most recent call last):
      ...
    jaxmodel.errors.InputError: steps: 0 given; allowed: a whole number of at least 1
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or int(value) < least:
        raise InputError(
            f"{argument}: {value!r} given; allowed: a whole number of at least {least}"
        )


def within(name: str, value: object, allowed: int | Allowed) -> None:
    """Refuse a value that is not a number of a range.

    Raises:
      InputError: the value is out of range, not finite, or no number.

    >>> within("rate", -1.0, FROM_ZERO)
    Traceback (most recent call last):
      ...
    jaxmodel.errors.InputError: rate: -1.0 given; allowed: a finite number of at least 0
    """
    if isinstance(allowed, int):
        at_least(name, value, allowed)
    elif isinstance(value, bool) or not (
        (isinstance(value, numbers.Real) or getattr(value, "ndim", None) == 0)
        and allowed[0](float(value))  # pyright: ignore[reportArgumentType]
    ):
        raise InputError(f"{name}: {value!r} given; allowed: {allowed[1]}")


def named_fields[T](meant: Mapping[str, str]) -> Callable[[type[T]], type[T]]:
    """Decorate a dataclass so that the error for an unknown keyword names the field that was meant.

    Args:
      meant: names in other libraries -> the field, or a hint where to set it.

    >>> import dataclasses
    >>> @named_fields({"lr": "learning_rate"})
    ... @dataclasses.dataclass
    ... class Config:
    ...     learning_rate: float = 0.1
    >>> Config(lr=1.0)
    Traceback (most recent call last):
      ...
    jaxmodel.errors.InputError: Config: 'lr' is not a field; did you mean learning_rate?
    """

    def decorate(cls: type[T]) -> type[T]:
        made = cls.__init__

        @functools.wraps(made)
        def init(self: Any, *args: Any, **values: Any) -> None:
            fields = [field.name for field in dataclasses.fields(self) if field.init]
            for name in values:
                if name not in fields:
                    close = [meant[name]] if name in meant else nearest(name, fields)
                    hint = (
                        f"did you mean {' or '.join(close)}?"
                        if close
                        else f"allowed: {', '.join(fields)}"
                    )
                    hint = meant[name] if name in meant and meant[name] not in fields else hint
                    raise InputError(f"{type(self).__name__}: {name!r} is not a field; {hint}")
            made(self, *args, **values)

        cls.__init__ = init
        return cls

    return decorate


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or raise an error that says which extra contains it.

    Raises:
      MissingPackage: the module is not installed; the message carries the install line.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingPackage(
            f"this needs the package {module!r}, which is not installed: pip install "
            f"'jaxmodel[{extra}]'"
        ) from None
