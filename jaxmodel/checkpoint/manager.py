"""Checkpoints: asynchronous, checked by their digests, never without a last good one, restored onto
any mesh.

    checkpoints/step-000000300/arrays/         see `jaxmodel.checkpoint.stored` (each process writes its own part)
    checkpoints/step-000000300/history.jsonl   the rows of the run up to there
    checkpoints/step-000000300/manifest.json   written last: the step counts only from then on

The manifest has the name, shape and dtype of every array, the static fields of compressed leaves
(orbax would accept other ones silently), size and SHA-256 of every file (in a bucket the size),
what identifies the run (its configs), the digest of its data, and the environment. A restore takes
the newest step whose files are those of its manifest, says which newer ones are not, and sets these
aside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypedDict, runtime_checkable

import jax
import numpy as np

from jaxmodel import moved, schema
from jaxmodel.checkpoint import places
from jaxmodel.checkpoint.records import (
    copied,
    differences,
    digest_of,
    field_of,
    fields,
    flat,
    is_about,
    of_other_devices,
    shown,
    zeros,
)
from jaxmodel.checkpoint.stored import stored
from jaxmodel.data.files import check_protocol, is_remote
from jaxmodel.errors import InputError, at_least
from jaxmodel.progress import step as shown_step
from jaxmodel.report.json_out import dumps, to_plain

MANIFEST = "manifest.json"
HISTORY = "history.jsonl"
VERSION = 1
_STEP = re.compile(r"step-(\d{9,})")


@runtime_checkable
class Stepped(Protocol):
    """A pytree with two counters, such as `train.TrainState`."""

    @property
    def step(self) -> Any:
        """Updates made, int32."""

    @property
    def data_step(self) -> Any:
        """The next batch, int32."""


@dataclasses.dataclass(frozen=True)
class Keep:
    """Which checkpoints stay; the last good one always does.

    Attributes:
      last: so many of the newest; two, so that a file that goes bad later costs one step.
      best: so many of those with the lowest scores, where they have one.
      every: those whose step is a multiple of it; 0 for none.
    """

    last: int = 2
    best: int = 1
    every: int = 0

    def __post_init__(self) -> None:
        for name, least in (("last", 1), ("best", 0), ("every", 0)):
            at_least(f"keep.{name}", getattr(self, name), least)

    def chosen(self, scores: Mapping[int, float | None]) -> set[int]:
        """The steps that stay, of those there are.

        >>> sorted(Keep(last=2, best=1, every=100).chosen({100: 3.0, 150: 1.0, 200: 2.0, 250: None, 300: 2.5}))
        [100, 150, 200, 250, 300]
        >>> sorted(Keep(last=1, best=1).chosen({100: 3.0, 150: 1.0, 200: 2.0, 250: None}))
        [150, 250]
        """
        steps = sorted(scores)
        judged = sorted(
            (score, step) for step, score in scores.items() if score is not None and score == score
        )
        regular = {step for step in steps if self.every and step % self.every == 0}
        return {*steps[-self.last :], *(step for _, step in judged[: self.best]), *regular}


class Manifest(TypedDict):
    """manifest.json, beside its digest and version."""

    step: schema.Index
    data_step: schema.Index
    score: float | None
    arrays: dict[str, tuple[list[schema.Index], str]]
    fields: dict[str, dict[str, Any]]
    identity: dict[str, Any] | None
    data: str | None
    environment: dict[str, Any] | None
    files: dict[str, tuple[schema.Index, str | None]]


class Checkpoints:
    """The checkpoints of one run. All processes make one with the same arguments; a context manager
    that waits at its end.

    Args:
      folder: local, made when missing; or in a bucket, `gs://...`, `s3://...`.
      keep: see `Keep`.
      identity: plain data that a checkpoint must have been made with to be restored: configs.
        Differences are named. None for what `fit` says of its run (see `state_run`); without it, as
        in a loop of your own, nothing is compared.
      data: digest of the data, likewise.
      environment: what bits depend on (mesh, processors, versions), likewise; a restore elsewhere
        says that they may differ.
      allow_changes: names of what may differ from the run that saved, to go on with it in another
        way: fields of its `TrainConfig` such as "steps" or "learning_rate", "batch_size" (whose
        data cannot be compared then), "loss", "data".
      read_only: whether to save nothing and to change nothing there.
      at_most: only steps up to this one are restored.

    Raises:
      InputError: the folder cannot be made, or another process saves there.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep: Keep = Keep(),
        identity: Mapping[str, Any] | None = None,
        data: str | None = None,
        environment: Mapping[str, Any] | None = None,
        allow_changes: Collection[str] = (),
        read_only: bool = False,
        at_most: int | None = None,
    ):
        from etils import epath

        if is_remote(str(folder)):
            check_protocol(str(folder), "checkpoints", ("gs", "s3"))
        self.folder = epath.Path(
            places.fresh(str(folder)) if is_remote(str(folder)) else Path(folder).absolute()
        )
        self.keep = keep
        self.identity = None
        self.data = None
        self.environment = None
        self.state_run(identity, data, environment)
        self._allowed = (allow_changes,) if isinstance(allow_changes, str) else tuple(allow_changes)
        self._read_only = read_only
        self._at_most = at_most
        self._thread: threading.Thread | None = None
        self._problem: Exception | None = None
        self._swept = False
        self._saved = time.monotonic()
        self._last = -1
        self._verified = -1
        self._held = contextlib.ExitStack()
        if jax.process_index() == 0 and not read_only:
            try:
                if not is_remote(str(folder)):
                    self.folder.mkdir(parents=True, exist_ok=True)
                    self._held.enter_context(places.held(Path(folder)))
                elif not epath.Path("/".join(str(folder).split("/")[:3])).exists():
                    raise OSError(
                        "there is no such bucket, or it cannot be seen from here: address, keys, "
                        "permission"
                    )
            except (OSError, ImportError) as error:
                reason = getattr(error, "strerror", None) or _one_line(error)
                hint = (
                    "; 'jaxmodel[remote]' brings gs:// and s3://"
                    if isinstance(error, ImportError)
                    else ""
                )
                raise InputError(
                    f"checkpoints: the folder {str(folder)!r} cannot be used ({reason}){hint}"
                ) from None
        self._arrays = stored(str(self.folder))

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.close(raises=kind is None)

    def state_run(
        self,
        identity: Mapping[str, Any] | None,
        data: str | None,
        environment: Mapping[str, Any] | None,
    ) -> None:
        """Say of which run the checkpoints are; what was said already stays.

        `fit` does so. For the arguments see the class.
        """
        if self.identity is None and identity is not None:
            self.identity = to_plain(dict(identity))
        if self.data is None:
            self.data = data
        if self.environment is None and environment is not None:
            self.environment = to_plain(dict(environment))

    # --------------------------------------------------------------------------------------- saving

    def save(
        self,
        state: Stepped,
        *,
        score: float | None = None,
        history: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Begin to save a state under its `step`, and return once nothing more is read from its
        arrays.

        A save that fails (a full disk) says so on standard error and leaves what was saved before.

        Args:
          state: on any mesh.
          score: of a held-out loss, for `Keep.best`; lower is better.
          history: rows of plain numbers up to this state, see `history`.
        """
        if self._read_only:
            return
        self._join()
        self._saved = time.monotonic()
        number = int(state.step)
        place = self._place(number)
        self._verified = -1
        if (
            number == self._last
        ):  # not by a look at the folder, which the processes would have at different times
            return
        ready = True
        if jax.process_index() == 0:
            try:
                self._clear(place)
            except (
                Exception
            ) as error:  # of the file system, or of a store of objects: there is no common class
                self._failed(number, error)
                ready = False
        if not _told(ready):  # and before it is clear none writes
            return
        arrays = flat(state)
        if (
            jax.default_backend() == "cpu"
        ):  # there the writer would go on reading the buffers, which the next step writes
            arrays = copied(arrays)
        record = self._record(state, number, score)
        try:
            self._arrays.save(place / "arrays", arrays)
        except Exception as error:  # of tensorstore or gRPC
            self._failed(number, error)
            return
        self._last = number
        lines = [
            json.dumps(row, default=float) for row in history
        ]  # now, since the loop goes on with the list
        self._thread = threading.Thread(
            target=self._finish, args=(place, number, record, lines), name="checkpoint"
        )
        self._thread.start()

    def late(self, seconds: float, ask: bool) -> bool:
        """Whether the last checkpoint (or the beginning) is so long ago; all processes get the
        answer of the first.

        Args:
          seconds: 0 for never.
          ask: False where it is not yet time to ask, which with several processes costs an
            exchange.
        """
        if not ask or not seconds or self._read_only:
            return False
        return bool(_told(time.monotonic() - self._saved >= seconds))

    def wait(self, raises: bool = True) -> None:
        """Until the last save is whole.

        Args:
          raises: False to leave it to the next `wait` or `close` to raise.

        Raises:
          InputError: it failed.
        """
        self._join()
        if self._problem is not None and raises:
            problem = self._problem
            self._problem = None
            last = self.steps()[-1:]
            raise InputError(
                f"checkpoints: the last state could not be saved in {str(self.folder)!r} "
                f"({_one_line(problem)}); "
                f"the last good step is {last[0] if last else 'none'}"
            ) from problem

    def close(self, raises: bool = True) -> None:
        """Wait, end the threads, and leave the folder to others."""
        try:
            self.wait(raises)
        finally:
            self._arrays.close()
            self._held.close()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _finish(self, place: Any, number: int, record: dict[str, Any], history: list[str]) -> None:
        """In its thread: when the arrays are through, digests, the manifest, and what goes."""
        try:
            self._arrays.wait()
            self._problem = None
            if jax.process_index() == 0:
                if history:
                    places.write(place / HISTORY, "\n".join(history) + "\n")
                record["files"] = places.digests(place, but=MANIFEST)
                places.write(place / MANIFEST, dumps({**record, "sha256": digest_of(record)}))
                self._thin()
        except Exception as error:
            self._failed(number, error)

    def _failed(self, number: int, error: Exception) -> None:
        self._problem = error
        _say(
            f"checkpoint of step {number} failed ({_one_line(error)}); training goes on, what was "
            f"saved before stays"
        )

    def _record(self, state: Stepped, number: int, score: float | None) -> dict[str, Any]:
        return {
            "version": VERSION,
            "step": number,
            "data_step": int(state.data_step),
            "score": score,
            "arrays": {name: [list(a.shape), str(a.dtype)] for name, a in flat(state).items()},
            "fields": fields(state),
            "identity": self.identity,
            "data": self.data,
            "environment": self.environment or {},
        }

    def _thin(self) -> None:
        scores = {number: self._score(number) for number in self.steps()}
        for number in set(scores) - self.keep.chosen(scores):
            place = self._place(number)
            (place / MANIFEST).unlink()  # first: without it the rest is no checkpoint
            place.rmtree()

    def _score(self, number: int) -> float | None:
        try:
            return self.manifest(number)["score"]
        except InputError:  # a restore will set it aside
            return None

    def _clear(self, place: Any) -> None:
        """Make room for a save, and at the first one remove what earlier saves left that did not
        come to their end.
        """
        if place.exists():
            (place / MANIFEST).unlink(missing_ok=True)
            place.rmtree()
        for other in self._entries() if not self._swept else ():
            if other != place and _STEP.fullmatch(other.name) and not (other / MANIFEST).exists():
                other.rmtree()
        self._swept = True

    # ------------------------------------------------------------------------------------ restoring

    def steps(self) -> list[int]:
        """The steps that are whole, by their manifests, in order."""
        found = (_STEP.fullmatch(place.name) for place in self._entries())
        return sorted(
            int(m[1]) for m in found if m and (self._place(int(m[1])) / MANIFEST).exists()
        )

    def manifest(self, number: int) -> dict[str, Any]:
        """What stands beside the arrays of a step.

        Raises:
          InputError: it is not there or cannot be read.
        """
        file = self._place(number) / MANIFEST
        try:
            record = schema.parse(places.read(file), str(file))
        except (OSError, InputError) as error:
            raise InputError(
                f"checkpoints: the manifest of step {number} cannot be read ({_one_line(error)})"
            ) from None
        if not isinstance(record, dict) or record.get("version") != VERSION:
            raise InputError(
                f"checkpoints: the manifest of step {number} is not of version {VERSION}"
            )
        if record.pop("sha256", None) != digest_of(record):
            raise InputError(
                f"checkpoints: the manifest of step {number} has other bytes than were written"
            )
        schema.make(record, Manifest, str(file))
        return record

    def verify(self, number: int) -> None:
        """Check every file of a step against its manifest.

        Raises:
          InputError: names the first file that is missing, of another size, or of another content.
        """
        place = self._place(number)
        files = self.manifest(number)["files"]
        sizes = places.sizes(place)

        def problem(name: str) -> str:
            size, digest = files[name]
            try:
                if name not in sizes:
                    return "is missing"
                if sizes[name] != size:
                    return f"has {sizes[name]} bytes of {size}"
                return (
                    "has other bytes than were written"
                    if digest is not None and places.digest(place / name) != digest
                    else ""
                )
            except OSError as error:
                return f"cannot be read ({error.strerror or error})"

        with ThreadPoolExecutor(places.READERS) as pool:
            for name, found in zip(files, pool.map(problem, files), strict=True):
                if found:
                    raise InputError(f"checkpoints: {name} of step {number} {found}")

    def latest(self, at_most: int | None = None) -> int | None:
        """The newest whole step; newer ones whose files are bad are named on standard error and set
        aside as `step-....bad`.

        Args:
          at_most: only steps up to this one.
        """
        self._join()
        found = -1
        if jax.process_index() == 0:
            limits = [limit for limit in (at_most, self._at_most) if limit is not None]
            for number in reversed(self.steps()):
                if limits and number > min(limits):
                    continue
                try:
                    if number != self._verified:  # the command line asks, and then a restore
                        self.verify(number)
                        self._verified = number
                except InputError as error:
                    if self._read_only:
                        _say(f"{error}; the step before is taken")
                        continue
                    aside = self.folder / f"{self._place(number).name}.bad"
                    if aside.exists():
                        aside.rmtree()
                    places.move(self._place(number), aside, first=MANIFEST)
                    _say(f"{error}; it is set aside as {aside.name}, and the step before is taken")
                    continue
                found = number
                break
        found = _told(found)
        return found if found >= 0 else None

    def restore[S: Stepped](self, like: S, *, at_most: int | None = None) -> S | None:
        """The newest whole state, on the mesh of `like`; None where there is none.

        Args:
          like: of `jax.ShapeDtypeStruct` with shardings (arrays will do).
          at_most: only steps up to this one.

        Raises:
          InputError: a checkpoint of another config or of other data, with the fields that differ.
        """
        number = self.latest(at_most)
        if number is None:
            return None
        record = self.manifest(number)
        wanted = flat(like)
        if of_others := of_other_devices(record, wanted):
            _say(
                f"step {number} was made by another number of devices: what the exchange of "
                f"gradients had yet to send is lost"
            )
        self._check(record, like, of_others)
        with shown_step(f"restoring step {number}"):
            kept = {name: a for name, a in wanted.items() if name not in of_others}
            found = {
                **self._arrays.restore(self._place(number) / "arrays", kept),
                **zeros(wanted, of_others),
            }
        self._last = number
        differ = (
            differences(record["environment"], self.environment or {})
            if record["environment"]
            else []
        )
        if differ:
            _say(
                f"step {number} was made elsewhere, so bits may differ from those of an unbroken "
                f"run: {'; '.join(differ)}"
            )
        return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in wanted])

    def _check(self, record: dict[str, Any], like: Stepped, but: Collection[str] = ()) -> None:
        number = record["step"]
        known = record["identity"] is not None and self.identity is not None
        differ = differences(_as_now(record["identity"] or {}), self.identity) if known else []
        changed = [line for line in differ if any(is_about(name, line) for name in self._allowed)]
        if others := [line for line in differ if line not in changed]:
            raise InputError(
                f"checkpoints: step {number} in {str(self.folder)!r} is of another config: "
                f"{'; '.join(others[:8])}; to go on "
                f"in this way use Checkpoints(..., "
                f"allow_changes={[field_of(line) for line in others[:8]]}) or options of "
                "`jaxmodel resume`, else another folder"
            )
        if changed:
            _say(f"step {number} goes on in another way: {'; '.join(changed)}")
        compared = (
            record["data"] is not None
            and self.data is not None
            and not {"data", "batch_size"} & {*self._allowed}
        )
        if compared and record["data"] != self.data:
            then, now = (str(value)[:12] for value in (record["data"], self.data))
            raise InputError(
                f"data: its fingerprint was {then} when step {number} in {str(self.folder)!r} was "
                f"saved and is {now}; a run "
                "goes on with the data that it began with"
            )
        wanted = {name: [list(a.shape), str(a.dtype)] for name, a in flat(like).items()}
        differ = [
            f"{name} is {shown(record['arrays'].get(name))} there, {shown(wanted.get(name))} here"
            for name in sorted({*wanted, *record["arrays"]} - {*but})
            if wanted.get(name) != record["arrays"].get(name)
        ] + differences(record["fields"], to_plain(fields(like)))
        if differ:
            more = f" and {len(differ) - 4} more" if len(differ) > 4 else ""
            raise InputError(
                f"checkpoints: step {number} in {str(self.folder)!r} has other arrays: "
                f"{'; '.join(differ[:4])}{more}"
            )

    def history(self, number: int) -> list[dict[str, Any]]:
        """The rows that were saved with a step: those of the run up to it; of a run of several
        processes, those of the first.
        """
        place = self._place(number) / HISTORY
        return (
            [json.loads(line) for line in place.read_text().splitlines()] if place.exists() else []
        )

    def _entries(self) -> list[Any]:
        """What is there: nothing where there is no folder, as in a store of objects that holds none
        of it yet.
        """
        return list(self.folder.iterdir()) if self.folder.exists() else []

    def _place(self, number: int) -> Any:
        return self.folder / f"step-{number:09d}"


def _told(value: int) -> int:
    """What the first process says."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _as_now(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Give the fields of a run's config the names that they have now."""
    train = identity.get("train")
    return {**identity, **({"train": moved.current(train)} if isinstance(train, Mapping) else {})}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


_say: Callable[[str], None] = lambda line: print(f"jaxmodel: {line}", file=sys.stderr, flush=True)
