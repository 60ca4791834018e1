"""`jaxmodel rerun`: repeat a run from its folder and compare what does not depend on the clock."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_type_hints

from jaxmodel import moved, report, schema
from jaxmodel.cli import config_file
from jaxmodel.cli.options import VERBS, Common, Launch, Resume, Train, check
from jaxmodel.errors import InputError, one_of
from jaxmodel.report.json_out import to_plain

CLOCK = (
    "seconds",
    "ledger",
    "tokens_per_second",
    "rows_per_second",
    "prefill_seconds",
    "latency",
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
    config = current(before.config)
    verb = config.pop("verb", None)
    for name in ("resolved", "changed", "launch"):  # no options; see `resumed` and `launching`
        config.pop(name, None)
    known = [v for v in VERBS if v not in ("rerun", "resume", "launch", "completion")]
    one_of(f"{folder}/config.json: verb", verb, known)
    if ended and not (before.folder / "report.json").exists():
        raise InputError(f"folder: {folder!r} has no report.json; the run did not end")
    found = _report(before) if ended else None
    if isinstance(found, dict) and found.get("stopped"):
        raise InputError(
            f"folder: {folder!r} was stopped at step {found.get('steps')}; resume it first"
        )
    options = schema.make(config, VERBS[verb], f"{folder}/config.json")
    try:
        check(options)
    except InputError as error:
        raise InputError(f"{folder}/config.json: {error}") from None
    return options


def current(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a run, of any version, with the names that its options have now."""
    if config.get("verb") != "train":
        return dict(config)
    found = moved.current(config, moved.OPTIONS)
    how = {name: found.pop(name) for name in moved.LAUNCH if name in found}
    return {"launch": how, **found} if how.get("processes", 1) != 1 else found


def launched(folder: str) -> Launch | None:
    """Return how the processes of a run are started; None for one, and inside of these.

    Raises:
      InputError: that is no run folder, or its record is none of `launch`.
    """
    record = current(report.read_run(folder).config).get("launch")
    if record is None or "JAX_COORDINATOR_ADDRESS" in os.environ:
        return None
    return schema.make({**record, "command": ["resume"]}, Launch, f"{folder}/config.json: launch")


def trained_by(folder: str) -> Train:
    """Return the options of a run of train, whether it came to its end or not.

    Raises:
      InputError: as `options_of`, or the run is of another verb.
    """
    options = options_of(folder, ended=False)
    if not isinstance(options, Train):
        raise InputError(f"folder: {folder!r} is of another verb; allowed: a run of train")
    return options


CHANGES = {
    "steps": ("steps", "eval_every"),
    "batch": ("batch_size", "heldout"),
    "eval_batches": ("eval_batches", "eval_rows"),
    "patience": ("patience", "eval_every", "eval_batches", "eval_rows", "heldout"),
    "dtype": ("compute",),
    "activation_dtype": ("stream",),
}
"""Option of `resume` -> what differs in the identity of the run, if not the field of its name."""


@contextlib.contextmanager
def resumed(options: Resume) -> Iterator[Train]:
    """Give the options of a run that goes on.

    New values are written to its config.json, where its other processes find them, with what may
    differ by them, and to its config.yaml. If the run cannot go on with them, they are taken out
    again.

    Raises:
      InputError: as `trained_by`, or a value out of range.
    """
    before = trained_by(options.folder)
    if not (given := options.given):
        yield before
        return
    work = dataclasses.replace(before, **given)
    check(work)
    _check_state(before, work)
    run = report.read_run(options.folder)
    config = current(run.config)
    changed = {
        *config.get("changed", ()),
        *(one for name in given for one in CHANGES.get(name, (name,))),
    }
    if {"mesh", "devices"} & given.keys():
        config.pop("launch", None)  # it is told anew where processes are started again
    values = {name: to_plain(getattr(work, name)) for name in given}
    written = run.folder / "config.yaml"
    text = written.read_text("utf-8") if written.is_file() else None
    saved = _saved(run)
    run.save_json("config.json", {**config, **values, "changed": sorted(changed)})
    run.save_bytes(written.name, config_file.dumped(work, places=False))
    try:
        yield work
    except InputError:
        if _saved(run) == saved:  # else it has gone on with them
            run.save_json("config.json", run.config)
            if text is not None:
                run.save_bytes(written.name, text)
            else:
                written.unlink(missing_ok=True)
        raise


def _check_state(before: Train, work: Train) -> None:
    """Refuse options with which the state would consist of other arrays.

    Raises:
      InputError: names the option, its values, and what is allowed.
    """
    for name in ("patience", "ema_decay", "spike"):
        then, now = getattr(before, name), getattr(work, name)
        if bool(then) != bool(now):
            raise InputError(
                f"--{name.replace('_', '-')}: {now} given for a run with {then}, whose checkpoints "
                f"have other arrays; allowed: {'above 0' if then else '0'}"
            )
    if (then := before.schedule) != (now := work.schedule) and "plateau" in (then, now):
        known = get_args(get_type_hints(Train)["schedule"])
        allowed = [then] if then == "plateau" else [one for one in known if one != "plateau"]
        raise InputError(
            f"--schedule: {now} given for a run with {then}, whose checkpoints have other arrays; "
            f"allowed: {', '.join(allowed)}"
        )


def _saved(run: report.Run) -> set[str]:
    """Return the names of the checkpoints in a run folder."""
    return {path.name for path in (run.folder / "checkpoints").glob("step-*")}


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
    """Yield every plain value with its path, except those that depend on the clock."""
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
    """Print how many values are the same, and those that are not."""
    console.print(
        f"{result['verb']}: {result['compared'] - len(result['differ'])} of {result['compared']} "
        f"values are the same"
    )
    for path, (was, now) in sorted(result["differ"].items())[:20]:
        console.print(f"  {path}: {was} then, {now} now", markup=False)
    for name, (was, now) in result["versions_changed"].items() if result["differ"] else ():
        console.print(f"  {name} was {was}, is {now}", markup=False)


def code(result: dict[str, Any]) -> int:
    """Return 1 if a value differs."""
    return int(bool(result["differ"]))


def _report(run: report.Run) -> Any:
    return schema.read(run.folder / "report.json", Any)


def _same(a: Any, b: Any) -> bool:
    return a == b or (
        isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)
    )
