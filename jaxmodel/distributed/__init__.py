"""Runs of several processes: started, watched, stopped in order, and what their time went into."""

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
