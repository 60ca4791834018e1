"""The text form of chains of settings, such as `"magnitude(0.5) | rtn(bits=8)"`.

Compression methods, augmentations, penalties and bounds have one. A member of a chain is a frozen
dataclass; its text is its name, called with literal arguments. Only literals are evaluated.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmodel.errors import InputError, unknown


def read_chain(argument: str, text: str, known: Mapping[str, Any], example: str) -> tuple[Any, ...]:
    """Read the members that a text names, in order; empty text is the empty chain.

    Args:
      argument: what the text is, for errors.
      text: calls joined by `|`.
      known: name -> dataclass.
      example: a text that is right, for errors.

    Raises:
      InputError: text of another form, an unknown name, or settings that a member does not take.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Half:
    ...     share: float = 0.5
    >>> read_chain("method", "half | half(0.2)", {"half": Half}, "half(0.5)")
    (Half(share=0.5), Half(share=0.2))
    """
    if not text.strip():
        return ()
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise InputError(f"{argument}: {text!r} cannot be read; write it as {example!r}") from None
    return tuple(_member(argument, part, text, known) for part in _parts(node))


def write(name: str, member: Any) -> str:
    """Write a member as text; settings with default values are omitted, except the first."""
    found = [(f.name, getattr(member, f.name), f.default) for f in settings(type(member))]
    shown = [
        f"{key}={value!r}"
        for i, (key, value, default) in enumerate(found)
        if i == 0 or value != default
    ]
    return f"{name}({', '.join(shown)})"


def settings(cls: Any) -> list[dataclasses.Field[Any]]:
    """Return the settings of a member, with keyword-only ones at the end."""
    return sorted(dataclasses.fields(cls), key=lambda field: bool(field.kw_only))


def _parts(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return [*_parts(node.left), *_parts(node.right)]
    return [node]


def _member(argument: str, node: ast.expr, text: str, known: Mapping[str, Any]) -> Any:
    name = node.func if isinstance(node, ast.Call) else node
    if not isinstance(name, ast.Name) or name.id not in known:
        raise unknown(argument, ast.unparse(name), known)
    try:
        args = [ast.literal_eval(a) for a in node.args] if isinstance(node, ast.Call) else []
        kwargs = (
            {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
            if isinstance(node, ast.Call)
            else {}
        )
        return known[name.id](*args, **kwargs)
    except (TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        fields = ", ".join(field.name for field in settings(known[name.id]))
        raise InputError(
            f"{argument}: {ast.unparse(node)!r} in {text!r}: {name.id} takes the settings {fields}"
        ) from None
