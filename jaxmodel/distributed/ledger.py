"""Accounts of a run's time over all its restarts, each instant in exactly one category.

A line is written about once a second, so that little is unrecorded if a run is killed. That and the
time until the restart count as `down`. What was computed after the checkpoint from which the run
continues counts as `lost`.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypedDict

from jaxmodel import schema
from jaxmodel.errors import InputError, one_of
from jaxmodel.files import open_own, read_bytes
from jaxmodel.limits import limits

CATEGORIES = (
    "start",
    "compile",
    "data",
    "compute",
    "evaluate",
    "checkpoint",
    "lost",
    "down",
    "other",
)
"""Categories of time.

start: until the first batch is requested. compute: the steps. other: all else (writing rows,
callbacks).
"""
_LOST = ("compile", "data", "compute", "evaluate", "checkpoint")
EVERY = 1.0  # seconds between two lines; in a long run a thousandth of its time


class _Line(TypedDict):
    life: schema.Index
    time: float


class _Spent(_Line, total=False):
    step: int
    began: float
    spent: dict[str, float]
    saved: int
    restored: int


class GoodputRecorder:
    """A record of seconds by category; without a file, of this process only.

    Args:
      file: `ledger.jsonl` of a run, which is appended to; None for no file.
      clock: returns seconds since a fixed time that is the same for all processes of a run.
      began: time by that clock at which this process began, such as `process_began()`; default:
        now.

    >>> now = iter([0.0, 0.0, 2.0, 5.0, 5.5, 5.5])
    >>> ledger = GoodputRecorder(clock=lambda: next(now))
    >>> with ledger.spend("data"):  # from 2.0 to 5.0
    ...     pass
    >>> ledger.summary()
    {'start': 2.0, 'data': 3.0, 'other': 0.5, 'wall': 5.5, 'goodput': 0.0}
    """

    def __init__(
        self,
        file: str | Path | None = None,
        clock: Callable[[], float] = time.time,
        began: float | None = None,
    ):
        self._file = None if file is None else Path(file)
        self._clock = clock
        self._lines = _read(self._file)
        self._lives = self._lines[-1]["life"] + 1 if self._lines else 0
        # also a line of this process itself, if it resumes
        before = max((line["time"] for line in self._lines), default=float("-inf"))
        self._began = self._since = max(before, clock() if began is None else began)
        self._category = "start"
        self._step = 0
        self._spent: dict[str, float] = {}
        self._write(self._clock())

    @contextlib.contextmanager
    def spend(self, category: str) -> Iterator[None]:
        """Count the time inside the context for this category, then return to the one before."""
        before = self.enter(category)
        try:
            yield
        finally:
            self.enter("other" if before == "start" else before)

    def enter(self, category: str) -> str:
        """Count the time from now on for this category; return the one before.

        Raises:
          InputError: the category is not in `CATEGORIES`.
        """
        one_of("category", category, CATEGORIES)
        now = self._clock()
        before = self._category
        self._spent[before] = self._spent.get(before, 0.0) + now - self._since
        self._since = now
        self._category = category
        if now - self._written >= max(EVERY, (now - self._began) / 1000):
            self._write(now)
        return before

    def at(self, step: int, *, saved: bool = False) -> None:
        """Record the step that the run has reached.

        Pass `saved` if its checkpoint has been started, so that only later work can be lost.
        """
        self._step = step
        if saved:
            self.enter(self._category)
            self._write(self._since, saved=step)

    def restored(self, step: int) -> None:
        """Record that the run continues from a checkpoint of this step.

        Work that earlier processes did after that step is then lost.
        """
        self._append({"life": self._lives, "restored": step, "time": self._clock()})

    def close(self) -> None:
        """Write the last line."""
        self.enter(self._category)
        self._write(self._since)

    def summary(self) -> dict[str, float]:
        """Return the seconds by category over all restarts.

        `wall` is the time from the beginning until now and `goodput` the share of `compute` in it.
        """
        self.enter(self._category)
        if self._file is not None:
            self._write(self._since)
            return summary(self._lines)
        return _totals(dict(self._spent), self._since - self._began)

    def _write(self, now: float, **more: int) -> None:
        self._written = now
        line = {
            "life": self._lives,
            "time": now,
            "step": self._step,
            "began": self._began,
            "spent": dict(self._spent),
        }
        self._append({**line, **more})

    def _append(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._lines.append(line)
            with open_own(self._file) as file:
                file.write(json.dumps(line) + "\n")


def process_began() -> float:
    """Return the time at which the operating system started this process, as `time.time` counts.

    A ledger then includes the time before it was made: the interpreter, imports, the data. If the
    system does not tell, return the time now.
    """
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return (
            time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
        )
    except (OSError, AttributeError, ValueError, IndexError):  # not Linux
        return time.time()


def summary(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Compute the result of `GoodputRecorder.summary` from the lines of its file."""
    total: dict[str, float] = collections.defaultdict(float)
    lives = sorted({line["life"] for line in lines if "spent" in line})
    of_life = {life: [line for line in lines if line["life"] == life] for life in lives}
    ends = None
    for life in lives:
        own = [line for line in of_life[life] if "spent" in line]
        if ends is not None:
            total["down"] += own[-1]["began"] - ends
        ends = own[-1]["time"]
        kept = _kept([line for later in lives if later > life for line in of_life[later]], own)
        for category, seconds in own[-1]["spent"].items():
            lost = (
                seconds - kept.get(category, 0.0) if kept is not None and category in _LOST else 0.0
            )
            total[category] += seconds - lost
            total["lost"] += lost
    first = of_life[lives[0]]
    return _totals(total, (ends or 0.0) - next(line["began"] for line in first if "began" in line))


def _kept(later: list[dict[str, Any]], own: list[dict[str, Any]]) -> dict[str, float] | None:
    """Return what a process had spent when it started the checkpoint that the next one restored.

    None if no later process has begun to work.
    """
    for line in later:
        if "restored" in line:
            saved = [mine["spent"] for mine in own if mine.get("saved") == line["restored"]]
            # A checkpoint that this process did not save is of an earlier one, so all its work is
            # lost, unless this process ended at that step.
            return saved[-1] if saved else {}
        if line["spent"].get("compile"):
            return {}  # from the beginning
    return None


def _totals(spent: dict[str, float], wall: float) -> dict[str, float]:
    found = {category: spent[category] for category in CATEGORIES if spent.get(category)}
    return {**found, "wall": wall, "goodput": spent.get("compute", 0.0) / wall if wall else 0.0}


def _read(file: Path | None) -> list[dict[str, Any]]:
    """Read the complete lines; the last may be cut off if a process was killed."""
    if file is None or not file.exists():
        return []
    lines = []
    for text in read_bytes(file, limits().json_bytes).decode(errors="replace").splitlines():
        with contextlib.suppress(InputError):
            lines.append(schema.make(schema.parse(text.encode(), str(file)), _Spent, str(file)))
    return lines
