"""Short texts of values, for the `repr` of objects that hold arrays.

They show the dtype and shape of an array and never its numbers, so that nothing is computed, copied
or waited for. They never raise.

>>> brief({"pixels": range(10)}), brief([1, 2.5]), brief(list(range(1000)))
("{'pixels'}", '[1, 2.5]', '1,000 x int')
>>> brief("a long text " * 20)
"'a long text a long text a long text a long ...'"
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

_MOST = 48  # characters
_FEW = 6  # entries


def brief(value: Any) -> str:
    """Describe any value in a few words; see the module's docstring."""
    try:
        return _said(value)
    except Exception:  # the repr of a foreign object may raise anything; this one must not fail
        return f"<{type(value).__name__}>"


def briefly[T: type](cls: T) -> T:
    """Decorate a dataclass so that its repr names the fields with other values than the default.

    Put it above `dataclass`. Each value is described in a few words.

    >>> @briefly
    ... @dataclasses.dataclass
    ... class Text:
    ...     text: str
    ...     split: str = "train"
    >>> Text("much " * 99)
    Text(text='much much much much much much much much much...')
    """
    setattr(cls, "__repr__", _repr)  # noqa: B010 - pyright takes it for a method of one argument
    return cls


def _repr(self: Any) -> str:
    parts = []
    for field in dataclasses.fields(self):
        value = getattr(self, field.name, None)
        plain = isinstance(value, bool | int | float | str | tuple | None)
        default = (
            field.default_factory()
            if field.default_factory is not dataclasses.MISSING
            else field.default
        )
        if field.repr and not (plain and type(value) is type(default) and value == default):
            parts.append(f"{field.name}={brief(value)}")
    return f"{type(self).__name__}({', '.join(parts)})"


def _said(value: Any) -> str:
    shape = getattr(value, "shape", None)
    dtype = getattr(value, "dtype", None)
    if isinstance(shape, tuple) and dtype is not None and not dataclasses.is_dataclass(value):
        return f"{getattr(dtype, 'name', dtype)}[{', '.join(map(str, shape))}]"
    if isinstance(value, str):
        return repr(value if len(value) < _MOST else f"{value[: _MOST - 4]}...")
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        names = [repr(name) for name in list(value)[:_FEW]]
        return f"{{{', '.join([*names, *(['...'] if len(value) > _FEW else [])])}}}"
    if isinstance(value, list | tuple | set | frozenset) and type(value).__name__ in (
        "list",
        "tuple",
        "set",
        "frozenset",
    ):
        if len(value) <= _FEW and len(made := ", ".join(map(brief, value))) <= _MOST:
            return f"[{made}]" if isinstance(value, list) else f"({made})"
        return f"{len(value):,} x {type(next(iter(value))).__name__}"
    if callable(value) and hasattr(value, "__qualname__"):
        return value.__qualname__
    made = " ".join(repr(value).split())
    return made if len(made) <= 2 * _MOST else f"{made[: 2 * _MOST - 3]}..."
