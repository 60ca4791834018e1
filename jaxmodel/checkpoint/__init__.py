"""Checkpoints of a run: save all of its state, and go on where it stopped (`Checkpoints`)."""

from jaxmodel import moved
from jaxmodel.checkpoint.manager import Checkpoints, RetentionPolicy
from jaxmodel.checkpoint.records import fingerprint

__all__ = [
    "Checkpoints",
    "RetentionPolicy",
    "fingerprint",
]

moved.attach(__name__)
