"""Monitoring of a run: the ledger of its time, the watchdog, and requests to stop it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from jaxmodel.distributed.faults import Watchdog
from jaxmodel.distributed.ledger import GoodputRecorder

PROFILE_AFTER = 5
PROFILED = 3
"""Number of steps before a trace, since the first ones are not typical, and number in a trace."""


class RunMonitor:
    """A monitor that `fit` tells where it is.

    Args:
      ledger: the record of time; default: one without a file.
      watchdog: see `faults.Watchdog`; None for none.
      stop: step -> whether to save and stop there; see `faults.stop_signals`.
      profile: folder for an XProf trace of three steps, some steps after the first; None for none.

    >>> supervisor = RunMonitor(stop=lambda step: step >= 100)
    >>> with supervisor.spend("compute", step=7):
    ...     pass
    >>> sorted(supervisor.ledger.summary())
    ['compute', 'goodput', 'other', 'start', 'wall']
    """

    def __init__(
        self,
        ledger: GoodputRecorder | None = None,
        watchdog: Watchdog | None = None,
        stop: Callable[[int], bool] = lambda step: False,
        profile: str | Path | None = None,
    ):
        self.ledger = ledger or GoodputRecorder()
        self.watchdog = watchdog
        self.stop = stop
        self._profile = profile
        self._begins = 0

    @contextlib.contextmanager
    def spend(self, category: str, step: int) -> Iterator[None]:
        """Count the time inside for this category of the ledger, and tell the watchdog."""
        if self.watchdog is not None:
            self.watchdog.at(f"step {step}: {category}")
        if self._profile is not None and category == "data":
            self._trace(step)
        with self.ledger.spend(category):
            yield

    def _trace(self, step: int) -> None:
        """Start or stop the trace if this step is the one for it."""
        self._begins = self._begins or step + PROFILE_AFTER
        if step == self._begins:
            jax.profiler.start_trace(str(self._profile))
        elif step == self._begins + PROFILED:
            jax.profiler.stop_trace()
            self._profile = None

    def close(self) -> None:
        """Stop a trace that a short run left open, and write the last line of the ledger."""
        if self._profile is not None:
            with contextlib.suppress(RuntimeError):  # it was never started
                jax.profiler.stop_trace()
        self.ledger.close()
