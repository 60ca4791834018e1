"""Runs of several processes: start, watch and stop them, and record where their time went."""

from jaxmodel import moved
from jaxmodel.distributed.faults import Watchdog, stop_signals
from jaxmodel.distributed.ledger import GoodputRecorder, process_began
from jaxmodel.distributed.supervise import RunMonitor

__all__ = [
    "GoodputRecorder",
    "RunMonitor",
    "Watchdog",
    "process_began",
    "stop_signals",
]

moved.attach(__name__)
