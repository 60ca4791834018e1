"""JSON from outside, read within limits and checked against a type annotation, its schema.

Kinds are `int`, `float`, `bool`, `str`, `None`, `Literal[...]`, `list[...]`, `tuple[...]`,
`dict[str, ...]`, unions of them, `Annotated[int, Range(1, 10)]`, a TypedDict (other keys pass), a
dataclass (they do not) and `Any`. A whole number is a float too, `true` is not a number, and no
number is infinite.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from jaxmodel.errors import InputError, one_of
from jaxmodel.files import read_bytes
from jaxmodel.limits import limits

DEEPEST = 100
MOST_OBJECTS = 2**23  # each takes 20 times as much memory as in the file
_LONE = re.compile(rb"\\u[dD][89a-fA-F]")  # perhaps a half of a pair of surrogates


@dataclasses.dataclass(frozen=True)
class Range:
    """The allowed range of a number: `least` to `most`, above `above` and below `below`."""

    least: int | float = -math.inf
    most: int | float = math.inf
    above: int | float = -math.inf
    below: int | float = math.inf

    def __str__(self) -> str:
        if self.below < math.inf:
            return f"of at least {self.least:.12g} and below {self.below:.12g}"
        if self.above > -math.inf:
            most = f" and at most {self.most:.12g}" if self.most < math.inf else ""
            return f"above {self.above:.12g}{most}"
        if self.most < math.inf:
            return f"of {self.least:.12g} to {self.most:.12g}"
        return f"of at least {self.least:.12g}"

    def __contains__(self, value: Any) -> bool:
        return self.least <= value <= self.most and self.above < value < self.below


type Count = Annotated[int, Range(1, 2**31 - 1)]
"""A number of items, at least 1."""
type Index = Annotated[int, Range(0, 2**31 - 1)]
"""An index, or a count that may be zero."""
type FromZero = Annotated[float, Range(0)]
type Positive = Annotated[float, Range(above=0)]
type Share = Annotated[float, Range(0, 1)]


def read(path: Path, kind: Any = dict[str, Any], missing: bool = False) -> Any:
    """Read a JSON file and check it with `make`.

    Args:
      path: the path of the file.
      kind: the type of its content.
      missing: True if the file may be missing; it then counts as an empty object.

    Raises:
      InputError: the file is missing, not regular, too large, not JSON, or of another type.
    """
    if missing and not path.exists():
        return make({}, kind, str(path))
    try:
        raw = read_bytes(path, limits().json_bytes)
    except FileNotFoundError:
        raise InputError(f"{path.parent}: the file {path.name!r} is missing") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    return make(parse(raw, str(path)), kind, str(path))


def parse(raw: bytes, where: str) -> Any:
    """Parse JSON in UTF-8, with or without a byte order mark.

    Args:
      raw: the bytes.
      where: their source, for errors.

    Raises:
      InputError: the bytes are not JSON, are nested more deeply than `DEEPEST`, or give a name two
        values.

    >>> parse(b'{"a": [1, 2]}', "a.json")
    {'a': [1, 2]}
    """
    try:
        check_count(raw)
        value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_object)
        if _LONE.search(raw):
            json.dumps(value, ensure_ascii=False).encode()
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply; allowed: {DEEPEST} levels") from None
    except UnicodeEncodeError:
        raise InputError(
            f"{where}: a string in it is not valid Unicode; allowed: any without lone surrogates"
        ) from None
    except ValueError as error:  # from JSON or UTF-8
        raise InputError(f"{where}: not JSON: {error}") from None
    level = [value]
    depth = 0
    while level := [
        inside for one in level if isinstance(one, dict | list) for inside in _inside(one)
    ]:
        if (depth := depth + 1) > DEEPEST:
            raise InputError(f"{where}: nested too deeply; allowed: {DEEPEST} levels")
    return value


def check_count(raw: bytes) -> None:
    """Refuse JSON with more than `MOST_OBJECTS` lists and objects.

    Raises:
      ValueError: there are more opening brackets.
    """
    if raw.count(b"[") + raw.count(b"{") > MOST_OBJECTS:
        raise ValueError(f"more than {MOST_OBJECTS:,} lists and objects")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        for key, value in pairs:
            if value != made[key]:
                raise InputError(f"not JSON: {key!r:.80} is repeated with different values")
    return made


def _inside(value: Any) -> Iterator[Any]:
    return iter(value.values()) if isinstance(value, dict) else iter(value)


def make(value: Any, kind: Any, where: str, key: str = "") -> Any:
    """Check a value and convert it to a type: lists to tuples, objects to dataclass instances.

    Args:
      value: a value from JSON.
      kind: a type, see the module's docstring.
      where: the source of the value, for errors.
      key: the path of the value there.

    Raises:
      InputError: the value has another type; the line names file, key, value and what is allowed.

    >>> make({"heads": 2.5}, dict[str, Count], "config.json")
    Traceback (most recent call last):
      ...
    jaxmodel.errors.InputError: config.json: heads is 2.5; allowed: a whole number
    """
    if isinstance(kind, typing.TypeAliasType):
        return make(value, kind.__value__, where, key)
    origin = typing.get_origin(kind)
    args = typing.get_args(kind)
    refused = InputError(
        f"{where}: {key or 'its content'} is {_shown(value)}; allowed: {words(kind)}"
    )
    if kind is Any:
        return value
    if origin is Annotated:
        # ignore annotations of other libraries
        ranges = [one for one in args[1:] if isinstance(one, Range)]
        if ranges and type(value) not in (int, float):
            raise refused
        made = make(value, args[0], where, key)
        if not all(made in one for one in ranges):
            raise refused
        return made
    if origin in (typing.Union, types.UnionType):
        return _one_of(value, args, where, key, refused)
    if origin is Literal:
        if not any(type(value) is type(arg) and value == arg for arg in args):
            raise refused
        return value
    if origin is list or origin is tuple:
        return _several(value, kind, where, key, refused)
    if (
        origin is dict
        or kind is dict
        or kind is Mapping
        or typing.is_typeddict(kind)
        or dataclasses.is_dataclass(kind)
    ):
        if not isinstance(value, dict):
            raise refused
        inside = lambda name: f"{key}.{name}" if key else str(name)
        if typing.is_typeddict(kind):
            hints = _hints(kind)
            made = {
                n: make(one, hints[n], where, inside(n)) if n in hints else one
                for n, one in value.items()
            }
            for name in sorted(getattr(kind, "__required_keys__", set()) - value.keys()):
                raise InputError(f"{where}: the key {inside(name)!r} is missing")
            return made
        if dataclasses.is_dataclass(kind):
            return _dataclass(value, kind, where, key)
        return {
            n: make(one, args[1] if args else Any, where, inside(n)) for n, one in value.items()
        }
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 2**1023 else math.inf
    if type(value) is not (types.NoneType if kind is None else kind) or (
        kind is float and not math.isfinite(value)
    ):
        raise refused
    return value


def _one_of(value: Any, kinds: tuple[Any, ...], where: str, key: str, refused: InputError) -> Any:
    told: list[InputError] = []
    for kind in kinds:
        try:
            return make(value, kind, where, key)
        except InputError as error:
            told.append(error)
    # if only one of the types is an object, its own error says more than "none of these"
    objects = [error for kind, error in zip(kinds, told, strict=True) if _is_object(kind)]
    raise objects[0] if isinstance(value, dict) and len(objects) == 1 else refused


def _is_object(kind: Any) -> bool:
    return (
        dataclasses.is_dataclass(kind)
        or typing.is_typeddict(kind)
        or typing.get_origin(kind) is dict
    )


def _several(value: Any, kind: Any, where: str, key: str, refused: InputError) -> Any:
    args = typing.get_args(kind)
    if not isinstance(value, list | tuple):
        raise refused
    if typing.get_origin(kind) is list:
        return [make(one, args[0], where, f"{key}[{i}]") for i, one in enumerate(value)]
    if args[-1:] != (...,) and len(args) != len(value):
        raise refused
    kinds = [args[0]] * len(value) if args[-1:] == (...,) else args
    return tuple(
        make(one, part, where, f"{key}[{i}]")
        for i, (one, part) in enumerate(zip(value, kinds, strict=True))
    )


def _dataclass(value: dict[str, Any], kind: Any, where: str, key: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = _hints(kind)
    for name in value:
        one_of(f"{where}: {key or 'a key'}", name, fields)
    for name, field in fields.items():
        if (
            name not in value
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ):
            raise InputError(f"{where}: {key and f'{key}: '}the key {name!r} is missing")
    made = {
        name: make(one, hints[name], where, f"{key}.{name}" if key else name)
        for name, one in value.items()
    }
    try:
        return kind(**made)
    except InputError as error:
        raise InputError(f"{where}: {key and f'{key}: '}{error}") from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise InputError(f"{where}: {key and f'{key}: '}{' '.join(str(error).split())}") from None


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def words(kind: Any) -> str:
    """Describe in words what a type allows.

    >>> words(tuple[int, ...] | None)
    'null or a list, each a whole number'
    """
    if isinstance(kind, typing.TypeAliasType):
        return words(kind.__value__)
    origin = typing.get_origin(kind)
    args = typing.get_args(kind)
    if origin is Annotated:
        return " ".join([words(args[0]), *(str(one) for one in args[1:] if isinstance(one, Range))])
    if origin is Literal:
        return ", ".join(map(json.dumps, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(
            map(words, sorted(args, key=lambda one: typing.get_origin(one) in (list, tuple)))
        )
    if origin is tuple and args[-1:] != (...,):
        return f"a list of {len(args)}, each {' or '.join(dict.fromkeys(map(words, args)))}"
    if origin in (list, tuple):
        return f"a list, each {words(args[0])}"
    plain = {
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "true or false",
        None: "null",
        types.NoneType: "null",
    }
    return plain.get(kind, "an object")
