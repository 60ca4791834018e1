"""Numbers for programs: anything as plain JSON, `--json TARGET`, and experiment rows with goals."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import math
import operator
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodel.errors import InputError
from jaxmodel.files import atomic_write, check_writable

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_BOUND = re.compile(rf"\s*(>=|<=|==|>|<)\s*({_NUMBER})\s*")
_BAND = re.compile(rf"\s*({_NUMBER})\s*(?:\+-|\+/-|±)\s*({_NUMBER})\s*")


def to_plain(obj: Any) -> Any:
    """Convert `obj` to JSON types: dicts with text keys, lists, text, numbers, booleans, None.

    NumPy and JAX scalars and arrays, dataclasses, enums, paths, dtypes, sets and iterables are
    converted. A number that is not finite becomes None, because JSON cannot express it.

    Raises:
      TypeError: `obj` contains something else (a mistake of the program, not of its user).

    >>> to_plain({"loss": np.float32("nan"), 8: np.arange(2), "file": Path("a/b")})
    {'loss': None, '8': [0, 1], 'file': 'a/b'}
    """
    if isinstance(obj, enum.Enum):
        return to_plain(obj.value)
    if obj is None or isinstance(obj, bool | str):
        return obj
    if isinstance(obj, int):
        return int(obj)
    if isinstance(obj, float):
        return float(obj) if math.isfinite(obj) else None
    if isinstance(obj, np.dtype):
        return obj.name
    if isinstance(obj, type) and (
        issubclass(obj, np.generic) or isinstance(getattr(obj, "dtype", None), np.dtype)
    ):
        # np.float32, or jnp.float32, a type of JAX's own that carries its dtype
        return np.dtype(obj).name
    if isinstance(obj, np.generic):
        return to_plain(obj.item())
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {field.name: to_plain(getattr(obj, field.name)) for field in dataclasses.fields(obj)}
    if isinstance(obj, Mapping):
        return {str(to_plain(key)): to_plain(value) for key, value in obj.items()}
    if isinstance(obj, os.PathLike):
        return os.fspath(obj)
    if isinstance(obj, set | frozenset):
        return sorted(map(to_plain, obj), key=repr)
    if hasattr(obj, "__array__"):
        return to_plain(np.asarray(obj).tolist())
    if isinstance(obj, Iterable) and not isinstance(obj, bytes | bytearray):
        return [to_plain(item) for item in obj]
    raise TypeError(f"cannot write a {type(obj).__name__} as JSON")


def dumps(obj: Any, indent: int | None = 2) -> str:
    """Return `obj` as JSON text that every parser reads (ASCII, no NaN)."""
    return json.dumps(to_plain(obj), indent=indent, allow_nan=False)


def emit(obj: Any, target: str | None) -> None:
    """Write `obj` as JSON to `target`.

    `-` is standard output, a path becomes a file, None does nothing.

    Raises:
      InputError: the path cannot be written.
    """
    if target == "-":
        sys.stdout.write(dumps(obj) + "\n")
        sys.stdout.flush()
    elif target is not None:
        atomic_write(target, dumps(obj) + "\n")


@contextlib.contextmanager
def clean_stdout(target: str | None) -> Iterator[None]:
    """Send to standard error whatever Python prints in the block, if the target is `-`.

    Call `emit` after the block.
    """
    with contextlib.redirect_stdout(sys.stderr) if target == "-" else contextlib.nullcontext():
        yield


def check_target(target: str | None) -> None:
    """Refuse a `--json` path that cannot be written, before hours of work instead of after.

    Raises:
      InputError: the path is a folder, or its folder is missing or not writable.
    """
    if target is None or target == "-":
        return
    folder = Path(target).parent
    try:
        wrong = Path(target).is_dir() or not folder.is_dir()
        if not wrong and not os.path.exists(target):
            check_writable(folder)
        wrong = wrong or not os.access(folder, os.W_OK)
    except OSError:
        wrong = True
    if wrong:
        raise InputError(
            f"--json: {target!r} cannot be written; allowed: - or a file in an existing, writable "
            f"folder"
        )


def goal_met(value: Any, goal: str | None) -> bool | None:
    """Return whether a measured value meets a goal.

    The result is None without a goal, and False for a value that is missing or not finite.

    Args:
      value: a number, or None if it could not be measured.
      goal: such as `>= 2.5`, `<= 0.002`, `> 1`, `< 1`, `== 0` or `3.38783 +- 0.0005`; the
        comparison is of decimal numbers, as written.

    Raises:
      InputError: the goal cannot be read, or the value is not a number.

    >>> goal_met(3.38833, "3.38783 +- 0.0005"), goal_met(2.4, ">= 2.5"), goal_met(1, None)
    (True, False, None)
    """
    if goal is None:
        return None
    bound = _BOUND.fullmatch(goal)
    band = _BAND.fullmatch(goal)
    if not bound and not band:
        raise InputError(
            f"goal: {goal!r} cannot be read; allowed: >=, <=, >, < or == and a number, or '2.5 +- "
            f"0.1'"
        )
    plain = to_plain(value)
    if plain is None:
        return False
    if not isinstance(plain, int | float):
        raise InputError(
            f"value: {plain!r} cannot be compared with the goal {goal!r}; allowed: a number"
        )
    number = Decimal(repr(plain if isinstance(plain, float) else int(plain)))
    if band:
        return abs(number - Decimal(band[1])) <= abs(Decimal(band[2]))
    assert bound
    compare = {
        ">=": operator.ge,
        "<=": operator.le,
        ">": operator.gt,
        "<": operator.lt,
        "==": operator.eq,
    }
    return compare[bound[1]](number, Decimal(bound[2]))


def rows(
    entries: Iterable[Sequence[Any]], seconds: float | int, protocol: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what an experiment reports: its measured values beside their goals.

    Args:
      entries: `(name, value, unit)` or `(name, value, unit, goal)`; for goals see `goal_met`.
      seconds: the duration of the whole experiment.
      protocol: how the values were measured (data, windows, seeds, machine).

    Returns:
      `{"rows": [{"name", "value", "unit", "goal", "met"}], "seconds", "protocol"}`, in JSON types.

    Raises:
      InputError: a goal cannot be read.

    >>> rows([("decode", 3.0, "x f32", ">= 2.5")], 1.5, {"seed": 0})["rows"]
    [{'name': 'decode', 'value': 3.0, 'unit': 'x f32', 'goal': '>= 2.5', 'met': True}]
    """
    table = []
    for name, value, unit, *rest in entries:
        goal = rest[0] if rest else None
        table.append(
            {"name": name, "value": value, "unit": unit, "goal": goal, "met": goal_met(value, goal)}
        )
    return to_plain({"rows": table, "seconds": seconds, "protocol": protocol})
