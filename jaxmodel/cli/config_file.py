"""Files with the options of `jaxmodel train`: YAML or TOML, in sections.

    model: {model: llama/tiny}
    data: {data: [english_train], batch: 16}
    optim: {learning_rate: 0.003}
    train: {steps: 200}
    run: {mesh: "fsdp=2"}

Options on the command line override those of the file.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmodel import moved
from jaxmodel.cli.groups import SECTIONS, section
from jaxmodel.cli.options import Train
from jaxmodel.cli.paths import at_home, spooled
from jaxmodel.cli.words import checked
from jaxmodel.errors import InputError, nearest, unknown
from jaxmodel.files import read_bytes

MOST_BYTES = 2**16
_NOT_IN_FILE = ("config", "print_config")
_PLACES = ("json", "runs", "out", "checkpoints")
"""Where results go: another run of the same file has others."""


def expanded(args: Sequence[str]) -> list[str]:
    """Put the options of `--config FILE` in front of those that are given.

    Args:
      args: the words of a command line; without `train` or `--config` they are returned as they
        are.

    Raises:
      InputError: a file that cannot be read, an unknown section or key (the message names the
        nearest), or a value that the option does not take.
    """
    words = list(args)
    at = next((i for i, word in enumerate(words) if re.match("--config(=|$)", word)), None)
    if words[:1] != ["train"] or at is None or {"-h", "--help"} & set(words):
        return words
    name, _, path = words.pop(at).partition("=")
    if not path:
        if at >= len(words) or words[at].startswith("--"):
            raise InputError(f"{name}: no value given; allowed: a YAML or TOML file")
        path = words.pop(at)
    path = spooled("config", ".yaml") if path == "-" else at_home("config", path)
    given = {_option(word) for word in words if word.startswith("--")}
    options = {key: value for key, value in read(path).items() if key not in given}
    return ["train", *_words(options), *words[1:]]


def read(path: str) -> dict[str, Any]:
    """Read the options of a file, checked one by one.

    Args:
      path: a file that ends in .yaml, .yml or .toml.

    Returns:
      Name of the option -> its value, as plain data.

    Raises:
      InputError: as `expanded`.
    """
    record = _parsed(path)
    fields = {field.name for field in dataclasses.fields(Train)} - set(_NOT_IN_FILE)
    options = dict[str, Any]()
    how = dict[str, Any]()
    for title, inside in record.items():
        if title not in SECTIONS:
            option = moved.OPTIONS.get(str(title), title)
            hint = f" ({option!r} belongs in {section(option)!r})" if option in fields else ""
            raise InputError(f"{path}: {unknown('section', title, SECTIONS)}{hint}")
        if not isinstance(inside, Mapping | None):
            raise InputError(f"{path}: {title}: allowed: options with their values")
        for key, value in moved.current(inside or {}, moved.OPTIONS).items():
            key = str(key).replace("-", "_")
            if key in moved.LAUNCH and title == "run":  # as `train` wrote it once
                how[key] = value
                continue
            if key not in fields:
                close = nearest(key, fields, 1)
                hint = f"nearest {section(close[0])}.{close[0]}" if close else "see train --help"
                raise InputError(f"{path}: {title}.{key} is unknown; {hint}")
            if section(key) != title:
                raise InputError(f"{path}: {title}.{key}: allowed: in section {section(key)!r}")
            if isinstance(value, Mapping):
                raise InputError(f"{path}: {title}.{key}: {value} given; allowed: a value")
            options[key] = value
    try:
        checked(["train", *_words(options)])
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return options if how.get("processes", 1) == 1 else {**how, **options}


def dumped(options: Train, places: bool = True) -> str:
    """Write options as the YAML file that gives them.

    Args:
      options: of a run.
      places: whether to write down where results go, too.
    """
    import yaml

    left_out = (*_NOT_IN_FILE, *(() if places else _PLACES))
    record: dict[str, dict[str, Any]] = {title: {} for title in SECTIONS}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name not in left_out and value not in (None, ()):
            plain = list(value) if isinstance(value, tuple) else value
            record[section(field.name)][field.name] = plain
    return yaml.safe_dump(record, sort_keys=False, allow_unicode=True)


def _parsed(path: str) -> Mapping[str, Any]:
    raw = read_bytes(path, MOST_BYTES)
    kind = Path(path).suffix.lower()
    if kind == ".toml":
        try:
            return tomllib.loads(raw.decode("utf-8-sig"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not TOML: {error}") from None
    if kind not in (".yaml", ".yml"):
        raise InputError(f"--config: {path!r} given; allowed: a .yaml, .yml or .toml file")
    from jaxmodel.compress.recipe_file import parse_yaml

    record = parse_yaml(raw, path)
    if not isinstance(record, Mapping):
        raise InputError(f"{path}: allowed: the sections {', '.join(SECTIONS)}")
    return record


def _words(options: Mapping[str, Any]) -> list[str]:
    """Return options as the words that give them on a command line."""
    words = list[str]()
    for key, value in options.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)] if value else []
        elif value is not None:
            words.append(f"--{name}={value}")
    return words


def _option(word: str) -> str:
    """Return the name of the field that a word `--name` or `--no-name=value` is of."""
    name = word[2:].partition("=")[0].replace("-", "_")
    fields = {field.name for field in dataclasses.fields(Train)}
    name = moved.OPTIONS.get(name, name)
    return name if name in fields else name.removeprefix("no_")
