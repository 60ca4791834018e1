"""The words of a command line before tyro reads them, and its help afterwards.

Unknown options are refused by name, and the help shows options in groups.
"""

from __future__ import annotations

import dataclasses
import decimal
import functools
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from tyro.conf import Positional, UseAppendAction

from jaxmodel import moved
from jaxmodel.cli.groups import BOX_OF, BOXES
from jaxmodel.cli.options import VERBS, Compare, Generate, Launch, Predict, Train
from jaxmodel.cli.paths import at_home
from jaxmodel.cli.train_options import CHANGEABLE
from jaxmodel.errors import InputError, nearest, unknown

_OPTION = re.compile(r"--([A-Za-z][\w-]*)(?:=(.*))?", re.DOTALL)
_SHORT = re.compile(r"-([A-Za-z][\w-]*)")
_OURS = ("help", "tyro-print-completion", "tyro-write-completion")
_PLACED = typing.get_args(Positional[str])[1]
_MEANT = {
    "lr": "learning-rate",
    "epochs": "steps",
    "batch-size": "batch",
    "output": "out",
    "n": "max-new-tokens",
    "p": "prompt",
    "o": "out",
}
"""Names of options in other programs."""
_BOX_OF_OTHERS = {name: title for name, title in BOX_OF.items() if title != "training options"}
"""Only `train` and `resume` have training options; elsewhere a seed is for something else."""
_BEHIND = {Compare: "versions", Generate: "prompt", Predict: "input"}
"""Options whose values may also be given behind the model, without a name."""


class _Kind(NamedTuple):
    """What an option takes: how many words (0 for a switch, 2 for any number) of which types."""

    words: int
    types: tuple[Any, ...]
    placed: bool
    """Whether it is given by its place, without a name."""
    label: str | None
    """How a message calls one that must be given; None where there is a default."""


def checked(args: Sequence[str]) -> list[str]:
    """Return the words as tyro takes them: verb, positional arguments, options with values.

    A whole number may be written as any number that is one (`1e3`), texts of an option that takes
    several be given one by one, what `generate` and `predict` read stand behind the model, and
    everything behind `--` is no option.

    Raises:
      InputError: a verb or an option that there is not (the message names the nearest), or a value
        of another kind.

    >>> checked(["generate", "gpt2", "hi", "--max-new-tokens", "1e1"])
    ['generate', 'gpt2', '--max-new-tokens=10', '--prompt=hi']
    >>> checked(["generate", "gpt2", "--promt", "hi"])
    Traceback (most recent call last):
      ...
    jaxmodel.errors.InputError: --promt is unknown; nearest --prompt
    """
    words = list(args)
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help"]
    if not words or words[0] == "-h" or re.fullmatch(f"--({'|'.join(_OURS)})(=.*)?", words[0]):
        return words
    if words[0].startswith("-"):
        raise InputError(f"{words[0]} is unknown here; allowed: a verb first: {', '.join(VERBS)}")
    if words[0] not in VERBS:
        close = nearest(words[0].lower(), VERBS, 1)
        hint = f"; nearest {close[0]}" if close else ""
        raise InputError(f"the verb {words[0]!r} is unknown{hint}; allowed: {', '.join(VERBS)}")
    if {"-h", "--help"} & set(words):
        return [words[0], "--help"]
    verb = words[0]
    rest = words[1:]
    known = kinds(VERBS[verb])
    placed = list[str]()
    made = list[str]()
    several = dict[str, list[str]]()
    while rest:
        word = rest.pop(0)
        if word == "--":
            placed += rest
            break
        if (found := _OPTION.fullmatch(word)) is None:
            if (short := _SHORT.fullmatch(word)) is not None:
                raise InputError(_unknown(short[1], word, known, verb))
            placed.append(word)
            continue
        name = found[1].replace("_", "-")
        value = found[2]
        if name not in known:  # options of train had other names once
            name = moved.OPTIONS.get(name.replace("-", "_"), name).replace("_", "-")
        if name in _OURS:
            return [verb, word, *rest]
        off = (
            name.removeprefix("no-")
            if name.startswith("no-") and name.removeprefix("no-") in known
            else name
        )
        if off not in known or known[off].placed or (off != name and known[off].words):
            raise InputError(_unknown(name, f"--{name}", known, verb))
        kind = known[off]
        if kind.words == 0:
            if value is not None or (rest and rest[0].lower() in ("true", "false", "yes", "no")):
                given = rest[0] if value is None else value
                raise InputError(
                    f"--{name}: {given!r} given; it takes no value; allowed: --{off} or --no-{off}"
                )
            made.append(f"--{name}")
            continue
        values = [] if value is None else [value]
        while (
            rest
            and value is None
            and len(values) < (1 if kind.words == 1 else len(args))
            and not _is_option(rest[0])
        ):
            values.append(rest.pop(0))
        if not values:
            raise InputError(
                f"--{name}: no value given; `jaxmodel {verb} --help` says what it takes"
            )
        values = [at_home(name, _value(f"--{name}", one, kind.types)) for one in values]
        if kind.words == 1:
            made.append(f"--{name}={values[0]}")
        else:
            several[name] = [*(several.get(name, []) if str in kind.types else []), *values]
    places = [name for name, kind in known.items() if kind.placed]
    room = len(places)
    placed = [
        at_home(places[i] if i < room else _BEHIND.get(VERBS[verb], ""), value)
        for i, value in enumerate(placed)
    ]
    if extra := placed[room:]:
        name = _BEHIND.get(VERBS[verb], "")
        if not name or name in several or any(word.startswith(f"--{name}=") for word in made):
            raise InputError(
                f"{extra[0]!r} is one word too many for {verb}; `jaxmodel {verb} --help` lists "
                f"what it takes"
            )
        if known[name].words == 1 and len(extra) > 1:
            raise InputError(
                f"{extra[1]!r} is one word too many for {verb}; a {name} of several words stands "
                f"in quotes"
            )
        if known[name].words == 1:
            made.append(f"--{name}={extra[0]}")
        else:
            several[name] = extra
    given = {*several, *(word[2:].partition("=")[0] for word in made)}
    lacks = [
        kind.label
        for name, kind in known.items()
        if kind.label and not kind.placed and name not in given
    ]
    lacks = [
        *[kind.label for kind in known.values() if kind.label and kind.placed][len(placed) :],
        *lacks,
    ]
    if lacks:
        raise InputError(
            f"Missing from jaxmodel {verb}: {', '.join(lacks)}; `jaxmodel {verb} --help` says "
            f"what is meant"
        )
    return [
        verb,
        *placed[:room],
        *made,
        *(word for name, values in several.items() for word in (f"--{name}", *values)),
    ]


@functools.cache
def kinds(verb: type) -> dict[str, _Kind]:
    """Name, as it is written behind `--`, -> what the option takes, of every option of a verb."""
    found = {}
    hints = typing.get_type_hints(verb, include_extras=True)
    for field in dataclasses.fields(verb):
        hint = hints[field.name]
        hint, *marks = (
            typing.get_args(hint) if typing.get_origin(hint) is typing.Annotated else (hint,)
        )
        several = typing.get_origin(hint) is tuple
        one = typing.get_args(hint)[0] if several else hint
        union = (
            typing.get_args(one)
            if typing.get_origin(one) in (typing.Union, types.UnionType)
            else (one,)
        )
        words = 0 if one is bool else 2 if several and UseAppendAction not in marks else 1
        metavar = next(
            (mark.metavar for mark in marks if getattr(mark, "metavar", None)),
            getattr(one, "__name__", "").upper(),
        )
        placed = _PLACED in marks
        name = field.name.replace("_", "-")
        needed = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        label = None if not needed else metavar if placed else f"--{name} {metavar}"
        found[name] = _Kind(words, union, placed, label)
    return found


def _is_option(word: str) -> bool:
    return word in ("--", "-h") or _OPTION.fullmatch(word) is not None


def _value(option: str, text: str, kinds: tuple[Any, ...]) -> str:
    """Return the value as tyro takes it.

    Raises:
      InputError: a name that is not among those allowed, or no number where one is needed.
    """
    if types.NoneType in kinds and text == "None":
        return text
    names = [
        name
        for kind in kinds
        if typing.get_origin(kind) is Literal
        for name in typing.get_args(kind)
    ]
    if names and text not in names:
        raise unknown(option, text, names)
    if float in kinds:
        try:
            float(text)
        except ValueError:
            raise InputError(f"{option}: {text!r} given; allowed: a number") from None
    elif int in kinds:
        try:
            number = decimal.Decimal(text.strip())
            if number == number.to_integral_value() and abs(number) < 10**18:
                return str(int(number))
        except (decimal.InvalidOperation, ValueError, OverflowError):
            pass
        raise InputError(f"{option}: {text!r} given; allowed: a whole number")
    return text


def _unknown(name: str, shown: str, known: Mapping[str, _Kind], verb: str) -> str:
    options = [one for one, kind in known.items() if not kind.placed]
    meant = _MEANT.get(name)
    name = name.lower().replace("_", "-")
    name = moved.OPTIONS.get(name.replace("-", "_"), name).replace("_", "-")
    others = [
        other for other, cls in VERBS.items() if name in kinds(cls) and not kinds(cls)[name].placed
    ]
    if verb == "resume" and name in kinds(Train):
        return (
            f"{shown}: a run that goes on cannot change it, since what was trained depends on it; "
            f"allowed: {_written(CHANGEABLE[:4])}, --batch, --mesh, --devices and others of "
            f"`jaxmodel resume --help`; `jaxmodel train --init RUN/bundle` starts a new run from "
            f"its weights"
        )
    if others and name not in options and meant not in options:
        return f"{shown} is unknown to {verb}; it is an option of {', '.join(others)}"
    close = [meant] if meant in options else nearest(name, options, 1)
    hint = f"nearest --{close[0]}" if close else f"`jaxmodel {verb} --help` lists the options"
    return f"{shown} is unknown; {hint}"


def _written(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def launched(args: Sequence[str]) -> list[str]:
    """Return the words of `launch` for those of `train` with its options, as it took them once.

    >>> launched(["train", "--processes", "2", "--steps", "3", "--elastic"])
    ['launch', '--processes', '2', '--elastic', 'train', '--steps', '3']
    >>> launched(["train", "--processes=1"])
    ['train']
    """
    words = list(args)
    if words[:1] not in (["train"], ["resume"]) or {"-h", "--help"} & set(words):
        return words
    how = list[str]()
    left = list[str]()
    while words:
        word = words.pop(0)
        name = word[2:].partition("=")[0].replace("-", "_") if word.startswith("--") else ""
        if name.removeprefix("no_") not in moved.LAUNCH:
            left.append(word)
            continue
        how.append(word)
        if "=" not in word and kinds(Launch)[name.replace("_", "-")].words and words:
            how.append(words.pop(0))
    alone = "".join(how).replace("=", "") == "--processes1"
    return left if alone or not how else ["launch", *how, *left]


def parted(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words of `launch` itself, and those of the command behind it."""
    at = next((i for i, word in enumerate(words) if word in ("train", "resume")), len(words))
    return list(words[:at]), list(words[at:])


def grouped(help_text: str, verb: str = "train") -> str:
    """Return a help text with its options in a box for each kind, those that are required first.

    Args:
      help_text: as tyro prints it: one box of options, each beginning with its name.
      verb: whose help it is.
    """
    boxes_of = BOX_OF if verb in ("train", "resume") else _BOX_OF_OTHERS
    lines = help_text.split("\n")
    try:  # a frame; or, for a terminal without such characters, a title with a line below
        top = next(i for i, line in enumerate(lines) if re.match("(╭─)? options ", line))
        framed = lines[top].startswith("╭")
        first = top + (1 if framed else 2)
        end = next(
            i
            for i in range(first, len(lines))
            if lines[i].startswith("╰") or not (framed or lines[i].strip())
        )
    except StopIteration:
        return help_text
    blocks: list[list[str]] = []
    order = list(BOX_OF)
    for line in lines[first:end]:
        if re.match("[│ ] ?-", line) or not blocks:
            blocks.append([])
        blocks[-1].append(line)
    boxes: dict[str, list[str]] = {"required options": [], "options": []}
    boxes |= {title: [] for title in BOXES}
    named = [
        (
            found[1].replace("-", "_")
            if (found := re.search(r"--([a-z][\w-]*)", block[0]))
            else "",
            block,
        )
        for block in blocks
    ]
    place = lambda pair: order.index(pair[0]) if pair[0] in order else -1
    for name, block in sorted(named, key=place):
        needed = "(required)" in " ".join(block)
        boxes["required options" if needed else boxes_of.get(name, "options")] += block
    width = len(lines[end])
    made = []
    for title, inside in boxes.items():
        if inside:
            head = (
                [f"╭─ {title} ".ljust(width - 1, "─") + "╮"]
                if framed
                else [f" {title}", lines[top + 1]]
            )
            made += [*head, *inside, lines[end]]
    return "\n".join([*_wrapped(lines[:top], width), *made, *lines[end + 1 :]])


def _wrapped(lines: Sequence[str], width: int) -> list[str]:
    """Return the lines in front of the boxes, the description among them in lines of a width."""
    made = list[str]()
    for line in lines:
        long = len(line) > width and not line.startswith("usage:")
        made += textwrap.wrap(line, width, break_on_hyphens=False) if long else [line]
    return made
