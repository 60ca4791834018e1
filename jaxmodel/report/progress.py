"""Progress on standard error: a live bar on a terminal, a few plain lines anywhere else.

Nothing that ends within `SHOW_AFTER` seconds shows itself, so library code may report freely; only an outermost `step`
announces itself at once where no terminal is, to name the work that hangs or dies. There a line of progress comes every
`LINE_EVERY` seconds at most. Steps and bars nest.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager, suppress
from typing import Any

SHOW_AFTER = 2.0  # seconds
LINE_EVERY = 5.0  # seconds
_REFRESH = 0.2  # seconds

_lock = threading.RLock()
_jobs: list[Job] = []  # those that run, outermost first
_ticker: threading.Thread | None = None
_live: Any = None  # rich's display, while one is up
_last_line = 0.0
_quiet = False


class Job:
    """Something that takes time: what `bar` and `step` hand out."""

    def __init__(self, label: str, total: float | int | None, depth: int, done: float | int = 0):
        self.label, self.total, self.depth = label, total, depth
        self.done = self._before = done
        self.fields: dict[str, Any] = {}
        self.start = time.monotonic()
        self.announced = False
        self.task: Any = None  # its line in that display

    def advance(self, n: float | int = 1, **fields: Any) -> None:
        """Count `n` more as done, and show `fields` (`loss=2.3`) beside it."""
        self.done += n
        self.fields.update(fields)

    def status(self) -> str:
        """How far it is, how fast, how long still."""
        seconds = max(time.monotonic() - self.start, 1e-9)
        parts = []
        if self.done or self.total:
            parts += [f"{self.done:,}" + (f"/{self.total:,}" if self.total else "")]
        parts += [_clock(seconds)]
        if self.done > self._before:
            speed = (self.done - self._before) / seconds
            parts += [f"{speed:.3g}/s"]
            if self.total and self.done < self.total:
                parts += [f"{_clock((self.total - self.done) / speed)} left"]
        return "  ".join(parts + [f"{key}={_short(value)}" for key, value in self.fields.items()])


def set_quiet(quiet: bool = True) -> None:
    """Switch all progress of this process off, or on again."""
    global _quiet
    _quiet = quiet


@contextmanager
def bar(total: float | int | None, label: str, done: float | int = 0) -> Iterator[Job]:
    """A bar over work of a known amount (None: unknown), `done` of it before; call `.advance(n, **fields)` on what it gives.

    >>> with bar(3, "training") as job:
    ...     job.advance(2, loss=1.5)
    """
    with _running(label, total, now=False, done=done) as job:
        yield job


@contextmanager
def step(label: str) -> Iterator[Job]:
    """A step of unknown length: `with step("loading smollm2"):`."""
    with _running(label, None, now=True) as job:
        yield job


def progress[T](iterable: Iterable[T], label: str, total: float | int | None = None) -> Iterator[T]:
    """Pass the items of `iterable` through and show how many came; `total` defaults to its length where it has one.

    >>> sum(progress([1, 2, 3], "adding"))
    6
    """
    with bar(len(iterable) if total is None and isinstance(iterable, Sized) else total, label) as job:
        for item in iterable:
            yield item
            job.advance()


@contextmanager
def _running(label: str, total: float | int | None, now: bool, done: float | int = 0) -> Iterator[Job]:
    global _ticker
    with _lock:
        job = Job(label, total, len(_jobs), done)
        _jobs.append(job)
        if now and job.depth == 0 and not _on_terminal():
            _announce(job)
        if _ticker is None or not _ticker.is_alive():  # a forked child has the variable, not the thread
            _ticker = threading.Thread(target=_tick, name="jaxmodel-progress", daemon=True)
            _ticker.start()
    outcome = ""
    try:
        yield job
    except GeneratorExit:  # whoever reads `progress` has had enough: no failure
        raise
    except BaseException:
        outcome = "failed after "
        raise
    finally:
        with _lock:
            _finish(job, outcome)


def _finish(job: Job, outcome: str) -> None:
    global _live
    _jobs.remove(job)
    if _live and job.task is not None:
        _live.remove_task(job.task)
        if not _live.tasks:
            with suppress(OSError, ValueError):
                _live.stop()
            _live = None
    if job.announced or time.monotonic() - job.start >= SHOW_AFTER:
        _say(f"{'  ' * job.depth}{job.label}: {outcome}{job.status()}")


def _tick() -> None:
    global _ticker
    while True:
        time.sleep(_REFRESH)
        with _lock:
            if not _jobs:
                _ticker = None
                return
            late = [job for job in _jobs if time.monotonic() - job.start >= SHOW_AFTER]
            if late and not _quiet:
                with suppress(OSError, ValueError):  # a terminal that went away must not stop the work
                    _draw(late) if _on_terminal() else _log(late)


def _log(late: list[Job]) -> None:
    for job in late:
        _announce(job)
    if time.monotonic() - _last_line >= LINE_EVERY:
        _say(f"{'  ' * late[-1].depth}{late[-1].label}: {late[-1].status()}")


def _announce(job: Job) -> None:
    if not job.announced:
        job.announced = True
        _say(f"{'  ' * job.depth}{job.label} ...")


def _draw(late: list[Job]) -> None:
    global _live
    if _live is None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        plain = [TextColumn(what, markup=False) for what in ("{task.description}", "{task.fields[status]}")]
        _live = Progress(
            SpinnerColumn(),
            plain[0],
            BarColumn(bar_width=24),
            plain[1],
            console=Console(stderr=True, force_terminal=True),
            transient=True,
            auto_refresh=False,
            redirect_stdout=sys.stdout.isatty(),  # elsewhere standard output belongs to a program
        )
        _live.start()
    for job in late:
        if job.task is None:
            job.task = _live.add_task("  " * job.depth + job.label, total=job.total, status="")
        _live.update(job.task, completed=job.done, status=job.status())
    _live.refresh()


def _say(line: str) -> None:
    global _last_line
    if _quiet:
        return
    with suppress(OSError, ValueError):
        if _live:  # above the bars that still run
            _live.console.print(line, markup=False, highlight=False)
        else:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()
    _last_line = time.monotonic()


def _on_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # closed, or none at all
        return False


def _clock(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60}:{int(seconds) % 60:02} min"


def _short(value: Any) -> str:
    try:
        return f"{float(value):.4g}"
    except (TypeError, ValueError, RuntimeError):  # text, or a device array that is gone by now
        return str(value)
