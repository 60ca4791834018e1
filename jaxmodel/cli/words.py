"""The words of a command line before anything reads them, and its help: unknown options by name, options in groups."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from jaxmodel.cli.options import GROUPS, VERBS, Generate
from jaxmodel.errors import InputError, nearest

_OPTION = re.compile(r"--([A-Za-z][\w-]*)(=.*)?", re.DOTALL)
_COMPLETION = ("tyro-print-completion", "tyro-write-completion")
_MEANT = {"lr": "learning-rate", "epochs": "steps", "batch-size": "batch", "output": "out", "n": "max-new-tokens"}
"""What other programs call an option."""


def checked(args: Sequence[str]) -> list[str]:
    """The words, with a prompt of `generate MODEL PROMPT` given by its option.

    Raises:
      InputError: a verb or an option that there is not; the message names the nearest.

    >>> checked(["generate", "gpt2", "--promt", "hi"])
    Traceback (most recent call last):
      ...
    jaxmodel.errors.InputError: --promt is unknown; nearest --prompt
    """
    words = list(args)
    if words and not words[0].startswith("-") and words[0] not in VERBS:
        close = nearest(words[0], VERBS, 1)
        hint = f"; nearest {close[0]}" if close else ""
        raise InputError(f"the verb {words[0]!r} is unknown{hint}; allowed: {', '.join(VERBS)}")
    if not words or words[0].startswith("-"):
        return words
    known = names(VERBS[words[0]])
    for word in words[1:]:
        if (found := _OPTION.fullmatch(word)) is not None and found[1].replace("_", "-") not in known:
            raise InputError(_unknown(found[1].replace("_", "-"), known, words[0]))
        if re.fullmatch("-[A-Za-z]", word) and word != "-h":
            raise InputError(f"{word} is unknown; `jaxmodel {words[0]} --help` lists the options")
    if VERBS[words[0]] is Generate and len(words) > 2 and not any(word.startswith("-") for word in words[1:3]):
        words.insert(2, "--prompt")
    return words


def names(verb: type) -> list[str]:
    """The options of a verb, as they are written behind `--`."""
    made = [field.name.replace("_", "-") for field in dataclasses.fields(verb)]
    switches = [f"no-{field.name.replace('_', '-')}" for field in dataclasses.fields(verb) if field.type in (bool, "bool")]
    return [*made, *switches, "help", *_COMPLETION]


def _unknown(name: str, known: Sequence[str], verb: str) -> str:
    meant = _MEANT.get(name)
    close = [meant] if meant in known else nearest(name, [one for one in known if one not in _COMPLETION], 1)
    hint = f"nearest --{close[0]}" if close else f"`jaxmodel {verb} --help` lists the options"
    return f"--{name} is unknown; {hint}"


def grouped(help_text: str, groups: Mapping[str, str] = GROUPS) -> str:
    """A help text whose options stand in a box for each kind, those that must be given first.

    Args:
      help_text: as tyro prints it: one box of options, each beginning with its name.
      groups: option -> title of its box; the others stay under `options`.
    """
    lines = help_text.split("\n")
    try:  # a frame; or, for a terminal without such characters, a title with a line below
        top = next(i for i, line in enumerate(lines) if re.match("(╭─)? options ", line))
        framed = lines[top].startswith("╭")
        first = top + (1 if framed else 2)
        end = next(i for i in range(first, len(lines)) if lines[i].startswith("╰") or not (framed or lines[i].strip()))
    except StopIteration:
        return help_text
    blocks: list[list[str]] = []
    for line in lines[first:end]:
        if re.match("[│ ] ?-", line) or not blocks:
            blocks.append([])
        blocks[-1].append(line)
    boxes: dict[str, list[str]] = {"required options": [], "options": []}
    boxes |= {title: [] for title in groups.values()}
    for block in blocks:
        name = re.search(r"--([a-z][\w-]*)", block[0])
        title = groups.get(name[1].replace("-", "_"), "options") if name else "options"
        boxes["required options" if "(required)" in " ".join(block) else title] += block
    width, made = len(lines[end]), []
    for title, inside in boxes.items():
        if inside:
            head = [f"╭─ {title} ".ljust(width - 1, "─") + "╮"] if framed else [f" {title}", lines[top + 1]]
            made += [*head, *inside, lines[end]]
    return "\n".join([*lines[:top], *made, *lines[end + 1 :]])
