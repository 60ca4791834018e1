"""What stands around a run: the ledger of its time, the watchdog, and who may stop it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from jaxmodel.train.faults import Watchdog
from jaxmodel.train.ledger import Ledger


class Supervisor:
    """Told by `fit` where it is.

    Args:
      ledger: of the time; default one that keeps nothing.
      watchdog: see `faults.Watchdog`; None for none.
      stop: step -> whether to save and stop there; see `faults.stop_signals`.
    """

    def __init__(
        self, ledger: Ledger | None = None, watchdog: Watchdog | None = None, stop: Callable[[int], bool] = lambda step: False
    ):
        self.ledger, self.watchdog, self.stop = ledger or Ledger(), watchdog, stop

    @contextlib.contextmanager
    def spend(self, category: str, step: int) -> Iterator[None]:
        """The time inside is of this category of the ledger, and the watchdog knows where it went."""
        if self.watchdog is not None:
            self.watchdog.at(f"step {step}: {category}")
        with self.ledger.spend(category):
            yield
