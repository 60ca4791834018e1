"""`jaxmodel rerun`: repeat a run from its folder and compare what does not depend on the clock."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from jaxmodel import moved, report, schema
from jaxmodel.cli.options import VERBS, Common, Resume, Train, check
from jaxmodel.errors import InputError, one_of
from jaxmodel.report.json_out import to_plain

CLOCK = (
    "seconds",
    "ledger",
    "tokens_per_second",
    "rows_per_second",
    "prefill_seconds",
    "prefill_tps",
    "decode_tps_1",
    "decode_tps_8",
    "processor",
    "out",
    "history",
)
"""Keys whose values depend on the clock or on the folder; rows of a history are compared by their
losses.
"""


def name_of(options: Common) -> str:
    """Return the verb that these are the options of."""
    return next(name for name, cls in VERBS.items() if type(options) is cls)


def options_of(folder: str, ended: bool = True) -> Common:
    """Return the options of a run.

    Args:
      folder: of the run.
      ended: whether it must have come to its end.

    Raises:
      InputError: that is no run folder, its run did not end or was stopped, or its verb or options
        are not those of this version.
    """
    before = report.read_run(folder)
    config: dict[str, Any] = dict(before.config)
    verb = config.pop("verb", None)
    config.pop("resolved", None)  # what the options come to is found again
    config.pop("changed", None)  # see `resumed`
    known = [v for v in VERBS if v not in ("rerun", "resume")]
    one_of(f"{folder}/config.json: verb", verb, known)
    if ended and not (before.folder / "report.json").exists():
        raise InputError(f"folder: {folder!r} has no report.json; the run did not end")
    found = _report(before) if ended else None
    if isinstance(found, dict) and found.get("stopped"):
        raise InputError(
            f"folder: {folder!r} was stopped at step {found.get('steps')}; resume it first"
        )
    if verb == "train":
        config = moved.current(config)
    options = schema.make(config, VERBS[verb], f"{folder}/config.json")
    try:
        check(options)
    except InputError as error:
        raise InputError(f"{folder}/config.json: {error}") from None
    return options


def trained_by(folder: str) -> Train:
    """Return the options of a run of train, whether it came to its end or not.

    Raises:
      InputError: as `options_of`, or the run is of another verb.
    """
    options = options_of(folder, ended=False)
    if not isinstance(options, Train):
        raise InputError(f"folder: {folder!r} is of another verb; allowed: a run of train")
    return options


CHANGES = {"steps": ("steps", "eval_every"), "batch": ("batch_size", "heldout")}
"""Options of `resume` -> what differs in the identity of the run; of the others, the field of the
same name.
"""


@contextlib.contextmanager
def resumed(options: Resume) -> Iterator[Train]:
    """The options of a run that goes on.

    Those that are given anew are written into its folder, where its other processes find them, with
    what may differ by them; if it cannot go on so, they are taken out again.

    Raises:
      InputError: as `trained_by`, or a value out of range.
    """
    before = trained_by(options.folder)
    names = [field.name for field in dataclasses.fields(options) if hasattr(before, field.name)]
    known = [field.name for field in dataclasses.fields(Common)]
    given = {
        name: getattr(options, name)
        for name in names
        if name not in known and getattr(options, name) is not None
    }
    if not given:
        yield before
        return
    work = dataclasses.replace(before, **given)
    check(work)
    run = report.read_run(options.folder)
    changed = {
        *run.config.get("changed", ()),
        *(one for name in given for one in CHANGES.get(name, (name,))),
    }
    run.save_json("config.json", {**run.config, **given, "changed": sorted(changed)})
    try:
        yield work
    except InputError:
        run.save_json("config.json", run.config)
        raise


def redirect(options: Common, room: report.Run) -> Common:
    """Return the same options with their outputs led into the folder of the repetition."""
    places: dict[str, Any] = {"json": None, "runs": str(room.path("again"))}
    if hasattr(options, "out"):
        places["out"] = str(room.path("out"))
    if hasattr(options, "checkpoints"):
        places["checkpoints"] = None  # else it would go on from the end of the run
    return dataclasses.replace(options, **places)


def compare(folder: str, result: dict[str, Any], room: report.Run) -> dict[str, Any]:
    """Return the repetition's result beside the recorded one."""
    before = report.read_run(folder)
    old = dict(leaves(_report(before)))
    new = dict(leaves(to_plain(result)))
    paths = [path for path in {**old, **new} if not _same(old.get(path), new.get(path))]
    changed = {
        k: [v, room.versions.get(k)]
        for k, v in before.versions.items()
        if v != room.versions.get(k)
    }
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
    console.print(
        f"{result['verb']}: {result['compared'] - len(result['differ'])} of {result['compared']} "
        f"values are the same"
    )
    for path, (was, now) in sorted(result["differ"].items())[:20]:
        console.print(f"  {path}: {was} then, {now} now", markup=False)
    for name, (was, now) in result["versions_changed"].items() if result["differ"] else ():
        console.print(f"  {name} was {was}, is {now}", markup=False)


def code(result: dict[str, Any]) -> int:
    """1 where a value differs."""
    return int(bool(result["differ"]))


def _report(run: report.Run) -> Any:
    return schema.read(run.folder / "report.json", Any)


def _same(a: Any, b: Any) -> bool:
    return a == b or (
        isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)
    )
