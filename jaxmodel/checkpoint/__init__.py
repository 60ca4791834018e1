"""Checkpoints of a run: save all of its state, and go on where it stopped (`Checkpoints`)."""

from jaxmodel.checkpoint.manager import Checkpoints, Keep
from jaxmodel.checkpoint.records import fingerprint

__all__ = [
    "Checkpoints",
    "Keep",
    "fingerprint",
]
