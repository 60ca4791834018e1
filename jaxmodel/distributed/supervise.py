"""What stands around a run: the ledger of its time, the watchdog, and who may stop it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from jaxmodel.distributed.faults import Watchdog
from jaxmodel.distributed.ledger import Ledger

PROFILE_AFTER = 5
PROFILED = 3
"""Steps before a trace, which are not as later ones are, and steps of a trace."""


class Supervisor:
    """Told by `fit` where it is.

    Args:
      ledger: of the time; default one that keeps nothing.
      watchdog: see `faults.Watchdog`; None for none.
      stop: step -> whether to save and stop there; see `faults.stop_signals`.
      profile: folder for an XProf trace of three steps, some steps after the first; None for none.
    """

    def __init__(
        self,
        ledger: Ledger | None = None,
        watchdog: Watchdog | None = None,
        stop: Callable[[int], bool] = lambda step: False,
        profile: str | Path | None = None,
    ):
        self.ledger = ledger or Ledger()
        self.watchdog = watchdog
        self.stop = stop
        self._profile = profile
        self._begins = 0

    @contextlib.contextmanager
    def spend(self, category: str, step: int) -> Iterator[None]:
        """The time inside is of this category of the ledger, and the watchdog knows where it went."""
        if self.watchdog is not None:
            self.watchdog.at(f"step {step}: {category}")
        if self._profile is not None and category == "data":
            self._trace(step)
        with self.ledger.spend(category):
            yield

    def _trace(self, step: int) -> None:
        """Begin and end the trace, by the step that comes now."""
        self._begins = self._begins or step + PROFILE_AFTER
        if step == self._begins:
            jax.profiler.start_trace(str(self._profile))
        elif step == self._begins + PROFILED:
            jax.profiler.stop_trace()
            self._profile = None

    def close(self) -> None:
        """End a trace that a short run left open, and write the last line of the ledger."""
        if self._profile is not None:
            with contextlib.suppress(RuntimeError):  # it was not begun
                jax.profiler.stop_trace()
        self.ledger.close()
