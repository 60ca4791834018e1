"""Checkpoints: saved in the background, verified by digests, restored onto any mesh.

    checkpoints/step-000000300/arrays/         each process writes its own part (checkpoint.stored)
    checkpoints/step-000000300/history.jsonl   the rows of the run's history up to this step
    checkpoints/step-000000300/manifest.json   written last: without it the step does not count

The manifest holds the name, shape and dtype of every array, the static fields of compressed leaves
(orbax would accept wrong ones silently), the size and SHA-256 of every file (in a bucket only the
size), the identity of the run (its configs), the digest of its data, and the environment. A restore
takes the newest step whose files match its manifest. It names the newer steps that do not match and
sets them aside. The last good checkpoint is never deleted.
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
    LATER,
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
from jaxmodel.data.storage import check_protocol, is_remote
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
        """Return the number of updates made, int32."""

    @property
    def data_step(self) -> Any:
        """Return the index of the next batch, int32."""


@dataclasses.dataclass(frozen=True)
class RetentionPolicy:
    """A rule for which checkpoints are kept; the last good one always is.

    Attributes:
      last: how many of the newest to keep. With two, a file that goes bad later costs only the
        steps since the one before.
      best: how many to keep of those with the lowest scores, if they have scores.
      every: keep each checkpoint whose step is a multiple of this; 0 for none.
    """

    last: int = 2
    best: int = 1
    every: int = 0

    def __post_init__(self) -> None:
        for name, least in (("last", 1), ("best", 0), ("every", 0)):
            at_least(f"keep.{name}", getattr(self, name), least)

    def chosen(self, scores: Mapping[int, float | None]) -> set[int]:
        """Return the steps to keep.

        Args:
          scores: every step that there is, with its score or None.

        >>> scores = {100: 3.0, 150: 1.0, 200: 2.0, 250: None}
        >>> sorted(RetentionPolicy(last=1, best=1).chosen(scores))
        [150, 250]
        >>> sorted(RetentionPolicy(last=2, best=1, every=100).chosen({**scores, 300: 2.5}))
        [100, 150, 200, 250, 300]
        """
        steps = sorted(scores)
        judged = sorted(
            (score, step) for step, score in scores.items() if score is not None and score == score
        )
        regular = {step for step in steps if self.every and step % self.every == 0}
        return {*steps[-self.last :], *(step for _, step in judged[: self.best]), *regular}


class Manifest(TypedDict):
    """The content of manifest.json, except its digest and version."""

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
    """The checkpoints of one run.

    In a run of several processes, each makes one with the same arguments. As a context manager it
    waits at the end for the last save.

    Args:
      folder: a local folder, made if it is missing, or one in a bucket (`gs://...`, `s3://...`).
      keep: see `RetentionPolicy`.
      identity: plain data (configs) that must be equal when a checkpoint is restored; differences
        are named. None for what `fit` tells about its run (see `state_run`). In a loop of your own,
        None means that nothing is compared.
      data: digest of the data, compared in the same way.
      environment: what the bits of a result depend on (mesh, processors, versions). A restore in
        another environment warns that bits may differ.
      allow_changes: names of what may differ from the run that saved, to continue it with other
        settings: fields of its `TrainConfig` such as "steps" or "learning_rate", "batch_size" (the
        next row stays the next), "loss", "data".
      read_only: save nothing and change nothing in the folder.
      at_most: restore only steps up to this one.

    Raises:
      InputError: the folder cannot be made, or another process saves there.

    >>> import tempfile, jax.numpy as jnp
    >>> from jaxmodel.train import TrainState
    >>> state = TrainState(jnp.int32(3), jnp.int32(3), {"w": jnp.ones(2)}, (), {})
    >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
    ...     checkpoints.save(state)
    ...     restored = checkpoints.restore(like=state)
    >>> int(restored.step), restored.params["w"].tolist()
    (3, [1.0, 1.0])
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep: RetentionPolicy = RetentionPolicy(),
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
        self._resized = None
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
                        "no such bucket, or no access to it: check address, keys and permissions"
                    )
            except (OSError, ImportError) as error:
                reason = getattr(error, "strerror", None) or _one_line(error)
                hint = (
                    "; gs:// and s3:// need 'jaxmodel[remote]'"
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
        resized: Callable[[int], Collection[str]] | None = None,
    ) -> None:
        """Tell which run the checkpoints belong to; `fit` calls this.

        It does not replace what the constructor was given.

        Args:
          identity: configs, see the class.
          data: the digest of the data.
          environment: what the bits of a result depend on.
          resized: batch size -> what the digest of the data would be with batches of that size, so
            that the data are compared when a run continues with another size; nothing where that
            cannot be known.
        """
        self._resized = resized
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
        """Start saving a state under its `step`; return as soon as its arrays may be overwritten.

        If a save fails (a full disk), a message goes to standard error and earlier checkpoints stay
        as they are.

        Args:
          state: the state, on any mesh.
          score: for `Keep.best`, such as a held-out loss; lower is better.
          history: rows of plain numbers up to this state, see `history`.
        """
        if self._read_only:
            return
        self._join()
        self._saved = time.monotonic()
        number = int(state.step)
        place = self._place(number)
        self._verified = -1
        # Do not look at the folder instead: the processes would look at different times.
        if number == self._last:
            return
        ready = True
        if jax.process_index() == 0:
            try:
                self._clear(place)
            except Exception as error:
                # of the file system, or of a store of objects: there is no common class
                self._failed(number, error)
                ready = False
        if not _told(ready):  # no process writes before the place is clear
            return
        arrays = flat(state)
        # On a CPU the writer would still read these buffers while the next step overwrites them.
        if jax.default_backend() == "cpu":
            arrays = copied(arrays)
        record = self._record(state, number, score)
        try:
            self._arrays.save(place / "arrays", arrays)
        except Exception as error:  # from tensorstore or gRPC
            self._failed(number, error)
            return
        self._last = number
        # convert now, since the loop appends to the list
        lines = [json.dumps(row, default=float) for row in history]
        self._thread = threading.Thread(
            target=self._finish, args=(place, number, record, lines), name="checkpoint"
        )
        self._thread.start()

    def late(self, seconds: float, ask: bool) -> bool:
        """Return whether the last checkpoint (or the start) is at least `seconds` ago.

        All processes get the answer of the first.

        Args:
          seconds: 0 for never.
          ask: False to return False at once; with several processes each question costs a message.
        """
        if not ask or not seconds or self._read_only:
            return False
        return bool(_told(time.monotonic() - self._saved >= seconds))

    def wait(self, raises: bool = True) -> None:
        """Wait until the last save is complete.

        Args:
          raises: False to leave an error to the next `wait` or `close`.

        Raises:
          InputError: the save failed.
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
        """Wait for the last save, end the threads and release the lock on the folder."""
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
        """Complete a save in its thread: await the arrays, write the manifest, delete old ones."""
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
            f"checkpoint of step {number} failed ({_one_line(error)}); training continues, and "
            "earlier checkpoints are kept"
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
            (place / MANIFEST).unlink()  # first: without a manifest the rest does not count
            place.rmtree()

    def _score(self, number: int) -> float | None:
        try:
            return self.manifest(number)["score"]
        except InputError:  # `latest` sets it aside
            return None

    def _clear(self, place: Any) -> None:
        """Make room for a save; the first time, also delete what unfinished saves left behind."""
        if place.exists():
            (place / MANIFEST).unlink(missing_ok=True)
            place.rmtree()
        for other in self._entries() if not self._swept else ():
            if other != place and _STEP.fullmatch(other.name) and not (other / MANIFEST).exists():
                other.rmtree()
        self._swept = True

    # ------------------------------------------------------------------------------------ restoring

    def steps(self) -> list[int]:
        """Return the steps that have a manifest, in ascending order."""
        found = (_STEP.fullmatch(place.name) for place in self._entries())
        return sorted(
            int(m[1]) for m in found if m and (self._place(int(m[1])) / MANIFEST).exists()
        )

    def manifest(self, number: int) -> dict[str, Any]:
        """Read the manifest of a step.

        Raises:
          InputError: it is missing, damaged or of another version.
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
                f"checkpoints: the manifest of step {number} differs from what was written"
            )
        schema.make(record, Manifest, str(file))
        return record

    def verify(self, number: int) -> None:
        """Check every file of a step against its manifest.

        Raises:
          InputError: a file is missing or has another size or content; the first is named.
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
                    "differs from what was written"
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
        """Return the newest step whose files match its manifest, or None if there is none.

        Newer steps whose files are bad are named on standard error and set aside as `step-....bad`.

        Args:
          at_most: ignore steps above this one.
        """
        self._join()
        found = -1
        if jax.process_index() == 0:
            limits = [limit for limit in (at_most, self._at_most) if limit is not None]
            for number in reversed(self.steps()):
                if limits and number > min(limits):
                    continue
                try:
                    if number != self._verified:  # a command asks first, and its restore again
                        self.verify(number)
                        self._verified = number
                except InputError as error:
                    if self._read_only:
                        _say(f"{error}; the previous step is used")
                        continue
                    aside = self.folder / f"{self._place(number).name}.bad"
                    if aside.exists():
                        aside.rmtree()
                    places.move(self._place(number), aside, first=MANIFEST)
                    _say(f"{error}; it is set aside as {aside.name}, and the previous step is used")
                    continue
                found = number
                break
        found = _told(found)
        return found if found >= 0 else None

    def restore[S: Stepped](self, like: S, *, at_most: int | None = None) -> S | None:
        """Restore the newest good state onto the mesh of `like`; None if there is none.

        Args:
          like: a state of `jax.ShapeDtypeStruct` with shardings, or of arrays.
          at_most: ignore steps above this one.

        Raises:
          InputError: the checkpoint is of another config or of other data; says what differs.
        """
        number = self.latest(at_most)
        if number is None:
            return None
        record = self.manifest(number)
        wanted = flat(like)
        if of_others := of_other_devices(record, wanted):
            _say(
                f"step {number} was saved with another number of devices: the residual of the "
                "gradient compression is lost"
            )
        made = {*of_others, *(name for name in LATER if name not in record["arrays"])}
        self._check(record, like, made)
        with shown_step(f"restoring step {number}"):
            kept = {name: a for name, a in wanted.items() if name not in made}
            found = {
                **self._arrays.restore(self._place(number) / "arrays", kept),
                **zeros(wanted, made),
            }
        self._last = number
        differ = (
            differences(record["environment"], self.environment or {})
            if record["environment"]
            else []
        )
        if differ:
            _say(
                f"step {number} was saved in another environment, so the result may differ "
                f"slightly from that of an uninterrupted run: {'; '.join(differ)}"
            )
        return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in wanted])

    def _check(self, record: dict[str, Any], like: Stepped, but: Collection[str] = ()) -> None:
        number = record["step"]
        known = bool(record["identity"]) and self.identity is not None  # {} where nobody said any
        differ = differences(_as_now(record["identity"] or {}), self.identity) if known else []
        changed = [line for line in differ if any(is_about(name, line) for name in self._allowed)]
        if others := [line for line in differ if line not in changed]:
            raise InputError(
                f"checkpoints: step {number} in {str(self.folder)!r} was saved with another "
                f"config: {'; '.join(others[:8])}; to continue with these changes use "
                f"Checkpoints(..., allow_changes={[field_of(line) for line in others[:8]]}) or "
                "options of `jaxmodel resume`, else use another folder"
            )
        if changed:
            _say(f"step {number} continues with changes: {'; '.join(changed)}")
        compared = record["data"] is not None and self.data is not None
        then = (record["identity"] or {}).get("batch_size")
        same = {self.data}
        now = (self.identity or {}).get("batch_size")
        if known and "batch_size" in self._allowed and then != now:
            same = {*self._resized(then)} if self._resized is not None and then else set()
            compared = compared and bool(same)
        if compared and "data" not in self._allowed and record["data"] not in same:
            then, now = (str(value)[:12] for value in (record["data"], self.data))
            raise InputError(
                f"data: its fingerprint was {then} when step {number} in {str(self.folder)!r} was "
                f"saved and is {now}; a run must continue with the data that it began with"
            )
        wanted = {name: [list(a.shape), str(a.dtype)] for name, a in flat(like).items()}
        differ = [
            f"{name} is {shown(record['arrays'].get(name))} in the checkpoint, "
            f"{shown(wanted.get(name))} now"
            for name in sorted({*wanted, *record["arrays"]} - {*but})
            if wanted.get(name) != record["arrays"].get(name)
        ] + differences(record["fields"], to_plain(fields(like)))
        if differ:
            more = f" and {len(differ) - 4} more" if len(differ) > 4 else ""
            raise InputError(
                f"checkpoints: step {number} in {str(self.folder)!r} has different arrays: "
                f"{'; '.join(differ[:4])}{more}"
            )

    def history(self, number: int) -> list[dict[str, Any]]:
        """Return the rows that were saved with a step, those of the run up to it.

        If the run has several processes, the rows are those of the first.
        """
        place = self._place(number) / HISTORY
        return (
            [json.loads(line) for line in place.read_text().splitlines()] if place.exists() else []
        )

    def _entries(self) -> list[Any]:
        """List what the folder holds: nothing if there is no folder.

        An object store has no folder before its first object.
        """
        return list(self.folder.iterdir()) if self.folder.exists() else []

    def _place(self, number: int) -> Any:
        return self.folder / f"step-{number:09d}"


def _told(value: int) -> int:
    """Return the value of the first process on all of them."""
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
