"""`jaxmodel rerun`: repeat a run from its folder and compare what does not depend on the clock."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jaxmodel import report
from jaxmodel.cli.options import VERBS, Common, Train, check
from jaxmodel.errors import InputError, unknown

CLOCK = (
    "seconds",
    "ledger",
    "tokens_per_second",
    "prefill_seconds",
    "prefill_tps",
    "decode_tps_1",
    "decode_tps_8",
    "out",
    "history",
)
"""Keys whose values depend on the clock or on the folder; rows of a history are compared by their losses."""


def name_of(options: Common) -> str:
    """The verb that these are the options of."""
    return next(name for name, cls in VERBS.items() if type(options) is cls)


def options_of(folder: str, ended: bool = True) -> Common:
    """The options of a run.

    Args:
      folder: of the run.
      ended: whether it must have come to its end.

    Raises:
      InputError: that is no run folder, its run did not end or was stopped, or its verb or options are not those of this version.
    """
    before = report.read_run(folder)
    config: dict[str, Any] = dict(before.config)
    verb = config.pop("verb", None)
    config.pop("resolved", None)  # what the options come to is found again
    known = [v for v in VERBS if v not in ("rerun", "resume")]
    if verb not in known:
        raise unknown(f"{folder}/config.json: verb", verb, known)
    if ended and not (before.folder / "report.json").exists():
        raise InputError(f"folder: {folder!r} has no report.json; the run did not end")
    found = _report(before) if ended else None
    if isinstance(found, dict) and found.get("stopped"):
        raise InputError(f"folder: {folder!r} was stopped at step {found.get('steps')}; resume it first")
    try:
        _check_types(VERBS[verb], config)
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
        options = VERBS[verb](**values)
        check(options)
    except (InputError, TypeError) as error:
        raise InputError(f"{folder}/config.json: {error}") from None
    return options


def trained_by(folder: str) -> Train:
    """The options of a run of train, whether it came to its end or not.

    Raises:
      InputError: as `options_of`, or the run is of another verb.
    """
    options = options_of(folder, ended=False)
    if not isinstance(options, Train):
        raise InputError(f"folder: {folder!r} is of another verb; allowed: a run of train")
    return options


def redirect(options: Common, room: report.Run) -> Common:
    """The same options with their outputs led into the folder of the repetition."""
    places: dict[str, Any] = {"json": None, "runs": str(room.path("again"))}
    if hasattr(options, "out"):
        places["out"] = str(room.path("out"))
    if hasattr(options, "checkpoints"):
        places["checkpoints"] = None  # else it would go on from the end of the run
    return dataclasses.replace(options, **places)


def compare(folder: str, result: dict[str, Any], room: report.Run) -> dict[str, Any]:
    """The repetition's result beside the recorded one."""
    before = report.read_run(folder)
    old = dict(leaves(_report(before)))
    new = dict(leaves(report.to_plain(result)))
    paths = [path for path in {**old, **new} if not _same(old.get(path), new.get(path))]
    changed = {k: [v, room.versions.get(k)] for k, v in before.versions.items() if v != room.versions.get(k)}
    return {
        "verb": before.config["verb"],
        "folder": folder,
        "compared": len(old),
        "differ": {path: [old.get(path), new.get(path)] for path in paths},
        "versions_changed": changed,
    }


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain value by its path, but for those that depend on the clock."""
    if isinstance(value, dict):
        for key, child in value.items():
            if key == "history":
                yield from ((f"{path}/history/{row['step']}/loss", row["loss"]) for row in child)
            elif key not in CLOCK:
                yield from leaves(child, f"{path}/{key}")
    elif isinstance(value, list):
        for i, child in enumerate(value):
            yield from leaves(child, f"{path}/{i}")
    else:
        yield path, value


def show(result: dict[str, Any], console: Any) -> None:
    """How many values are the same, and those that are not."""
    console.print(f"{result['verb']}: {result['compared'] - len(result['differ'])} of {result['compared']} values are the same")
    for path, (was, now) in sorted(result["differ"].items())[:20]:
        console.print(f"  {path}: {was} then, {now} now", markup=False)
    for name, (was, now) in result["versions_changed"].items() if result["differ"] else ():
        console.print(f"  {name} was {was}, is {now}", markup=False)


def code(result: dict[str, Any]) -> int:
    """1 where a value differs."""
    return int(bool(result["differ"]))


def _report(run: report.Run) -> Any:
    try:
        return json.loads((run.folder / "report.json").read_text())
    except ValueError as error:
        raise InputError(f"{run.folder}/report.json: not JSON: {error}") from None


def _check_types(verb: type[Common], config: dict[str, Any]) -> None:
    """Refuse values that a hand wrote into a config and that are not of the kind of their option."""
    kinds = get_type_hints(verb)
    for name in (field.name for field in dataclasses.fields(verb) if field.name in config):
        if not _fits(config[name], kinds[name]):
            raise InputError(f"{name}: {json.dumps(config[name])} given; allowed: {_words(kinds[name])}")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value from JSON is of the kind that an annotation says."""
    if get_origin(kind) is tuple:
        return isinstance(value, list) and all(_fits(one, get_args(kind)[0]) for one in value)
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_args(kind):  # one of several kinds
        return any(_fits(value, one) for one in get_args(kind))
    return type(value) in ((int, float) if kind is float else (kind,))  # True is no number


def _words(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"a list, each {_words(get_args(kind)[0])}"
    if get_origin(kind) is Literal:
        return ", ".join(map(json.dumps, get_args(kind)))
    if get_args(kind):
        return " or ".join(map(_words, get_args(kind)))
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}.get(kind, "null")


def _same(a: Any, b: Any) -> bool:
    return a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))
