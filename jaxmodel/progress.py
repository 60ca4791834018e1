"""Progress: a live bar on a terminal and in a notebook, else a few plain lines on standard error.

Work that ends within `SHOW_AFTER` seconds shows nothing, so library code may report freely. Without
a terminal, an outermost `step` announces itself at once, to name work that hangs or dies, and lines
of progress come at most every `LINE_EVERY` seconds. Steps and bars nest. The speed is that of the
last `RECENT` seconds. It leaves out the time until the first item is done, in which programs
compile and files are opened, so that the remaining time is realistic.
"""

from __future__ import annotations

import collections
import html
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager, suppress
from typing import Any

SHOW_AFTER = 2.0  # seconds
LINE_EVERY = 30.0  # seconds
RECENT = 60.0  # seconds
_REFRESH = 0.2  # seconds
_FEW = 5  # items that the speed rests on at least, however long ago they were

_lock = threading.RLock()
_jobs: list[Job] = []  # those that run, outermost first
_ticker: threading.Thread | None = None
_live: Any = None  # rich's display, while one is up
_last_line = 0.0
_quiet = False


class Job:
    """A piece of work in progress, as `bar` and `step` yield it."""

    def __init__(
        self,
        label: str,
        total: float | int | None,
        depth: int,
        done: float | int = 0,
        unit: str = "",
        first: str = "",
    ):
        self.label = label
        self.total = total
        self.depth = depth
        self.unit = unit
        self.done = done
        self.fields: dict[str, Any] = {}
        self.start = time.monotonic()
        self.announced = False
        self.task: Any = None  # its line in that display
        self._first = first  # what is done until the first item is
        self._marks = collections.deque[tuple[float, float]]()  # when so many were done

    def advance(self, n: float | int = 1, **fields: Any) -> None:
        """Count `n` more as done, and show `fields` (`loss=2.3`) beside it."""
        self.done += n
        self.fields.update(fields)
        now = time.monotonic()
        marks = self._marks
        if n < 0:  # the work went back
            marks.clear()
        if n:
            # a thousand items a second need no thousand marks
            if len(marks) > _FEW and now - marks[-2][0] < RECENT / 100:
                marks.pop()
            marks.append((now, self.done))
            while len(marks) > _FEW and now - marks[0][0] > RECENT:
                marks.popleft()

    def status(self, width: int | None = None) -> str:
        """Return how far it is, how fast, and how long it will take, with fields up to `width`."""
        now = time.monotonic()
        parts = []
        if self.done or self.total:
            parts += [f"{_count(self.done)}" + (f"/{_count(self.total)}" if self.total else "")]
        if self._first and not self._marks and (self.total is None or self.done < self.total):
            parts += [self._first]
        parts += [_clock(now - self.start)]
        if speed := self._speed():
            parts += [_pace(speed, self.unit)]
            if self.total and self.done < self.total:
                left = (self.total - self.done) / speed - (now - self._marks[-1][0])
                parts += [f"{_clock(max(left, 0.0))} left"]
        for key, value in self.fields.items():
            field = f"{key}={_short(value)}"
            if width is None or len("  ".join([*parts, field])) <= width:
                parts += [field]
        return "  ".join(parts)

    def _speed(self) -> float:
        """Return the recent speed in items per second; 0 if unknown."""
        if len(self._marks) < 2:
            return 0.0
        (began, before), (now, done) = self._marks[0], self._marks[-1]
        return (done - before) / max(now - began, 1e-9)


def set_quiet(quiet: bool = True) -> None:
    """Switch all progress of this process off, or on again."""
    global _quiet
    _quiet = quiet


@contextmanager
def bar(
    total: float | int | None, label: str, done: float | int = 0, unit: str = "", first: str = ""
) -> Iterator[Job]:
    """Show a bar over work of a known amount; call `advance(n, **fields)` of the yielded job.

    Args:
      total: the amount; None if unknown.
      label: the name of the work.
      done: the amount done before.
      unit: the unit of the amount, for the speed: `step` gives `3 steps/s` or `54 s/step`.
      first: what happens until the first item is done, such as `compiling`.

    >>> with bar(3, "training", unit="step") as job:
    ...     job.advance(2, loss=1.5)
    """
    with _running(label, total, now=False, done=done, unit=unit, first=first) as job:
        yield job


@contextmanager
def step(label: str) -> Iterator[Job]:
    """Show work of unknown length while the context is open, such as "loading smollm2"."""
    with _running(label, None, now=True) as job:
        yield job


def progress[T](iterable: Iterable[T], label: str, total: float | int | None = None) -> Iterator[T]:
    """Yield the items of `iterable` and show how many came; `total` defaults to its length.

    >>> sum(progress([1, 2, 3], "adding"))
    6
    """
    with bar(
        len(iterable) if total is None and isinstance(iterable, Sized) else total, label
    ) as job:
        for item in iterable:
            yield item
            job.advance()


@contextmanager
def _running(label: str, total: float | int | None, now: bool, **more: Any) -> Iterator[Job]:
    global _ticker
    with _lock:
        job = Job(label, total, len(_jobs), **more)
        _jobs.append(job)
        if now and job.depth == 0 and not _on_terminal() and not _in_notebook():
            _announce(job)
        # a forked child has the variable, not the thread
        if _ticker is None or not _ticker.is_alive():
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
    if _in_notebook():
        if job.task is not None:
            _show_in_notebook(job, f"{outcome}{job.status()}", over=True)
        return
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
                with suppress(OSError, ValueError):
                    # a terminal that went away must not stop the work
                    if _in_notebook():
                        for job in late:
                            _show_in_notebook(job, job.status())
                    elif _on_terminal():
                        _draw(late)
                    else:
                        _log(late)


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

        plain = [
            TextColumn(what, markup=False)
            for what in ("{task.description}", "{task.fields[status]}")
        ]
        console = Console(stderr=True, force_terminal=True)
        _live = Progress(
            SpinnerColumn(),
            plain[0],
            BarColumn(bar_width=_bar_width(console.width)),
            plain[1],
            console=console,
            transient=True,
            auto_refresh=False,
            redirect_stdout=sys.stdout.isatty(),  # elsewhere standard output belongs to a program
        )
        _live.start()
    width = _live.console.width
    room = (
        width
        - max(2 * job.depth + len(job.label) for job in late)
        - _bar_width(width)
        - len("* ")
        - 3
    )
    for job in late:
        if job.task is None:
            job.task = _live.add_task("  " * job.depth + job.label, total=job.total, status="")
        _live.update(job.task, completed=job.done, status=job.status(room))
    _live.refresh()


def _bar_width(width: int) -> int:
    return 24 if width >= 100 else 10


def _show_in_notebook(job: Job, status: str, over: bool = False) -> None:
    """Return a progress bar of the browser for the cell's output, replaced as the work goes on."""
    from IPython.display import display

    share = f' value="{job.done}" max="{job.total}"' if job.total else ""
    drawn = "" if over else f"<progress{share} style='vertical-align:middle'></progress> "
    made = {
        "text/html": f"<code>{html.escape('  ' * job.depth + job.label)}</code> "
        f"{drawn}<code>{html.escape(status)}</code>",
        "text/plain": f"{job.label}: {status}",
    }
    if job.task is None:
        job.task = display(made, raw=True, display_id=True)
    else:
        job.task.update(made, raw=True)


def _in_notebook() -> bool:
    """Return whether this runs in a Jupyter kernel, whose cells show HTML."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


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
    """Format a length of time in seconds, minutes or hours.

    >>> _clock(12.34), _clock(754.0), _clock(12_300.0)
    ('12.3 s', '12:34 min', '3:25 h')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02} h"


def _pace(speed: float, unit: str) -> str:
    """Items a second, or where they are slower than that, seconds an item.

    >>> _pace(3.21, "step"), _pace(0.0183, "step"), _pace(0.5, ""), _pace(20_270.0, "token")
    ('3.21 steps/s', '54.6 s/step', '2 s each', '20,270 tokens/s')
    """
    if speed >= 1:
        return f"{_digits(speed)}{f' {unit}s' if unit else ''}/s"
    return f"{_digits(1 / speed)} s{f'/{unit}' if unit else ' each'}"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _count(value: float | int) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}"


def _short(value: Any) -> str:
    try:
        number = float(value)
        return f"{number:,.0f}" if 1000 <= abs(number) < 1e9 else f"{number:.4g}"
    except (TypeError, ValueError, RuntimeError):  # text, or a device array that is gone by now
        return str(value)
