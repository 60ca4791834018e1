"""Runs of several processes: start, watch and stop them, and record where their time went."""

from jaxmodel.distributed.faults import Watchdog, stop_signals
from jaxmodel.distributed.ledger import Ledger, process_began
from jaxmodel.distributed.supervise import Supervisor

__all__ = [
    "Ledger",
    "Supervisor",
    "Watchdog",
    "process_began",
    "stop_signals",
]
