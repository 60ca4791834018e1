"""Settings with a text form, and chains of them, such as `"magnitude(0.5) | rtn(bits=8)"`.

Compression methods, augmentations, penalties, bounds and initialisers have one. Each of them is a
subclass of `Member` and belongs to a kind, a base class that is given `kind` and `example`. Its
name is its class name in snake case; its settings are the fields of its dataclass, checked against
their annotations as JSON is (see `schema`); their help is the `Attributes` of its docstring. Of a
text only literals are evaluated.

>>> @dataclasses.dataclass(frozen=True)
... class Sieve(Member, kind="sieve", example="keep_half(0.5)"):
...     "Base of the sieves."
>>> @dataclasses.dataclass(frozen=True)
... class KeepHalf(Sieve):
...     '''Keep some.
...
...     Attributes:
...       share: what is kept.
...     '''
...     share: schema.Share = 0.5
>>> read(Sieve, "keep_half | keep_half(1)")
(KeepHalf(share=0.5), KeepHalf(share=1.0))
>>> print(describe(Sieve))
keep_half(share=0.5): Keep some.
  share: what is kept (a number of 0 to 1)
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import numbers
import re
import typing
from collections.abc import Iterable
from typing import Any, ClassVar, NoReturn

from jaxmodel import moved, schema
from jaxmodel.errors import InputError, border, nearest, unknown

KINDS: dict[str, type[Member]] = {}
"""The base classes of all that has a text form, by the name that errors give them."""


@dataclasses.dataclass(frozen=True)
class Member:
    """Base of what has a text form: a frozen dataclass of settings.

    Raises:
      InputError: a setting is not what its annotation allows.
    """

    kind: ClassVar[str]
    example: ClassVar[str]

    def __init_subclass__(cls, kind: str = "", example: str = "") -> None:
        if kind:
            KINDS[kind] = cls
            cls.kind = kind
            cls.example = example

    def __post_init__(self) -> None:
        for name, allowed in _checked(type(self)).items():
            value = getattr(self, name)
            if isinstance(value, numbers.Number) and hasattr(value, "item"):  # of NumPy
                value = value.item()  # pyright: ignore[reportAttributeAccessIssue]
            try:
                object.__setattr__(self, name, schema.make(value, allowed, name))
            except InputError:
                said = _words(allowed)
                close = nearest(str(value), re.findall(r'"(\w+)"', said))
                self.refuse(name, said + (f" (nearest: {', '.join(close)})" if close else ""))

    def __str__(self) -> str:
        """Write the text form; settings with default values are omitted, except the first."""
        values = [(f.name, getattr(self, f.name), f.default) for f in settings(type(self))]
        shown = [
            f"{key}={value!r}"
            for i, (key, value, default) in enumerate(values)
            if i == 0 or value != default
        ]
        return f"{name_of(type(self))}({', '.join(shown)})"

    def refuse(self, setting: str, allowed: str) -> NoReturn:
        """Raise the error for a setting: what it is, and what is allowed.

        Raises:
          InputError: always.
        """
        raise InputError(
            f"{name_of(type(self))}: {setting} is {getattr(self, setting)!r}; allowed: {allowed}"
        )


def members[T: Member](kind: type[T]) -> dict[str, type[T]]:
    """Return all of a kind by name, of this package and of others, as far as they are imported."""
    found: dict[str, type[T]] = {}
    classes = [kind]
    for cls in classes:  # the list grows meanwhile
        classes += cls.__subclasses__()
        if cls is not kind and not inspect.isabstract(cls) and not cls.__name__.startswith("_"):
            found[name_of(cls)] = cls
    return found


def read[T: Member](kind: type[T], text: str) -> tuple[T, ...]:
    """Read the members of a kind that a text names, in order; empty text is the empty chain.

    Args:
      kind: the base class of what may stand in the text.
      text: calls joined by `|`, each with literal arguments.

    Raises:
      InputError: text of another form, an unknown name, or settings that a member does not take.
    """
    if not text.strip():
        return ()
    try:
        return tuple(_member(kind, part, text) for part in _parts(ast.parse(text.strip()).body))
    except (SyntaxError, RecursionError, MemoryError):
        raise InputError(
            f"{kind.kind}: {text!r:.200} cannot be read; write it as {kind.example!r}"
        ) from None


def write(chain: Iterable[Any]) -> str:
    """Write a chain as text; functions without a text form are written by their names."""
    return " | ".join(
        str(one) if isinstance(one, Member) else getattr(one, "__name__", repr(one))
        for one in chain
    )


def read_one[T: Member](kind: type[T], value: Any) -> T | None:
    """Return the value of a rule as one member, or None for None, `()` and `""`.

    Args:
      kind: the base class of what is allowed.
      value: a member, its text, or None.

    Raises:
      InputError: the value is neither a member nor the text of one.
    """
    if value is None or value == () or isinstance(value, kind):
        return value or None
    found = read(kind, value) if isinstance(value, str) else (None, None)
    if len(found) > 1:
        forms = ", ".join(map(_form, members(kind).values()))
        raise InputError(
            f"{kind.kind}: {value!r} given; allowed: one of {forms} as a text or an object, or None"
        )
    return found[0] if found else None


def describe(kind: type[Member]) -> str:
    """Describe all of a kind for people: names, settings, defaults, ranges and what they are."""
    lines: list[str] = []
    for _, cls in sorted(members(kind).items()):
        found = entry(cls)
        lines.append(f"{found['form']}: {found['says']}")
        for setting in found["settings"]:
            allowed = f" ({setting['allowed']})" if setting["allowed"] else ""
            lines.append(f"  {setting['name']}: {setting['says'].rstrip('.')}{allowed}")
    return "\n".join(lines)


def entry(cls: type[Member]) -> dict[str, Any]:
    """Return what there is to say about a member.

    Returns:
      name; form, the text with all settings and their defaults; says, the first line of its
      docstring; settings, each with name, says and allowed ("" where nothing is checked).
    """
    told = help_of(cls)
    checked = _checked(cls)
    # nobody needs to be told the largest number of things
    no_top = functools.partial(re.sub, r"of (\d+) to 2147483647", r"of at least \1")
    found = [
        {
            "name": field.name,
            "says": told.get(field.name, ""),
            "allowed": no_top(_words(checked[field.name])) if field.name in checked else "",
        }
        for field in settings(cls)
    ]
    says = (inspect.getdoc(cls) or "").partition("\n")[0]
    return {"name": name_of(cls), "form": _form(cls, True), "says": says, "settings": found}


def help_of(cls: type[Member]) -> dict[str, str]:
    """Return what the docstrings of a member and of its bases say about its settings."""
    told: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        section = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")[2]
        entries = re.findall(r"^  (\w+): (.*(?:\n    .*)*)", section.partition("\n\n")[0], re.M)
        told |= {name: " ".join(text.split()) for name, text in entries}
    return told


def name_of(cls: type) -> str:
    """Return the name of a member in texts.

    >>> name_of(Member)
    'member'
    """
    return re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()


def settings(cls: Any) -> list[dataclasses.Field[Any]]:
    """Return the settings of a member, with keyword-only ones at the end."""
    return sorted(dataclasses.fields(cls), key=lambda field: bool(field.kw_only))


@functools.cache
def _checked(cls: type[Member]) -> dict[str, Any]:
    """Return the types of the settings that JSON has too; others are not checked."""
    hints = typing.get_type_hints(cls, include_extras=True)
    kinds = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    return {name: kind for name, kind in kinds.items() if "an object" not in schema.words(kind)}


def _words(kind: Any) -> str:
    return schema.words(kind).replace("null", "None").replace("true or false", "True or False")


def _form(cls: type[Member], defaults: bool = False) -> str:
    shown = [
        f"{field.name}={field.default!r}"
        if defaults and field.default is not dataclasses.MISSING
        else field.name
        for field in settings(cls)
    ]
    return f"{name_of(cls)}({', '.join(shown)})"


def _parts(body: list[Any]) -> list[ast.expr]:
    if len(body) != 1 or not isinstance(body[0], ast.Expr):
        raise SyntaxError
    parts = [body[0].value]
    while isinstance(parts[0], ast.BinOp) and isinstance(parts[0].op, ast.BitOr):
        parts[:1] = [parts[0].left, parts[0].right]
    return parts


def _member[T: Member](kind: type[T], node: ast.expr, text: str) -> T:
    called = node.func if isinstance(node, ast.Call) else node
    given = ast.unparse(called)
    known = members(kind)
    cls = known.get(moved.spelling(kind.kind, given, known))
    if cls is None:
        raise unknown(kind.kind, given, known)
    try:
        values = [ast.literal_eval(arg) for arg in node.args] if isinstance(node, ast.Call) else []
        named = node.keywords if isinstance(node, ast.Call) else []
        options = {str(arg.arg): ast.literal_eval(arg.value) for arg in named}
        inspect.signature(cls).bind(*values, **options)
    except (TypeError, ValueError):
        fields = [field.name for field in settings(cls)]
        wrong = [str(arg.arg) for arg in getattr(node, "keywords", []) if arg.arg not in fields]
        close = nearest(wrong[0], fields) if wrong else []
        raise InputError(
            f"{kind.kind}: {ast.unparse(node)!r:.200} in {text!r:.200}: {name_of(cls)} takes "
            f"{f'the settings {", ".join(fields)}' if fields else 'no settings'}"
            f"{f' (nearest: {", ".join(close)})' if close else ''}"
        ) from None
    with border(f"{kind.kind}: {ast.unparse(node)!r:.200}"):
        return cls(*values, **options)
