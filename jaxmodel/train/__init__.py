"""Training: a pure step, and the loop around it.

What stands below is imported when it is first used: the command line shows `TrainOptions` and must answer at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxmodel.train import losses
    from jaxmodel.train.checkpoint import Checkpoints, Keep, fingerprint
    from jaxmodel.train.config import TrainConfig, adamw, make_optimizer
    from jaxmodel.train.dictionary import count_active, revive, unit_dictionary
    from jaxmodel.train.faults import Watchdog, stop_signals
    from jaxmodel.train.gradients import accumulated, value_and_grad
    from jaxmodel.train.guard import Guard
    from jaxmodel.train.ledger import Ledger
    from jaxmodel.train.loop import fit
    from jaxmodel.train.losses import (
        Loss,
        autoencoder,
        classification,
        confident_learning,
        contrastive,
        cross_entropy,
        next_token,
        regression,
        supervised,
    )
    from jaxmodel.train.options import TrainOptions
    from jaxmodel.train.placing import environment, gather
    from jaxmodel.train.projections import project
    from jaxmodel.train.rate_search import find_lr
    from jaxmodel.train.regularize import regularized, sam
    from jaxmodel.train.schedules import reduce_on_plateau, schedule
    from jaxmodel.train.state import TrainState, averaged, init_state, state_shardings
    from jaxmodel.train.statistics import set_batch_statistics
    from jaxmodel.train.step import make_step
    from jaxmodel.train.supervise import Supervisor

_HOMES = {
    "Checkpoints": "checkpoint",
    "Guard": "guard",
    "Keep": "checkpoint",
    "Ledger": "ledger",
    "Loss": "losses",
    "Supervisor": "supervise",
    "TrainConfig": "config",
    "TrainOptions": "options",
    "TrainState": "state",
    "Watchdog": "faults",
    "accumulated": "gradients",
    "adamw": "config",
    "autoencoder": "losses",
    "averaged": "state",
    "classification": "losses",
    "confident_learning": "losses",
    "contrastive": "losses",
    "count_active": "dictionary",
    "cross_entropy": "losses",
    "environment": "placing",
    "find_lr": "rate_search",
    "fingerprint": "checkpoint",
    "fit": "loop",
    "gather": "placing",
    "init_state": "state",
    "make_optimizer": "config",
    "make_step": "step",
    "next_token": "losses",
    "project": "projections",
    "reduce_on_plateau": "schedules",
    "regression": "losses",
    "regularized": "regularize",
    "revive": "dictionary",
    "sam": "regularize",
    "schedule": "schedules",
    "set_batch_statistics": "statistics",
    "state_shardings": "state",
    "stop_signals": "faults",
    "supervised": "losses",
    "unit_dictionary": "dictionary",
    "value_and_grad": "gradients",
}

__all__ = [
    "Checkpoints",
    "Guard",
    "Keep",
    "Ledger",
    "Loss",
    "Supervisor",
    "TrainConfig",
    "TrainOptions",
    "TrainState",
    "Watchdog",
    "accumulated",
    "adamw",
    "autoencoder",
    "averaged",
    "classification",
    "confident_learning",
    "contrastive",
    "count_active",
    "cross_entropy",
    "environment",
    "find_lr",
    "fingerprint",
    "fit",
    "gather",
    "init_state",
    "losses",
    "make_optimizer",
    "make_step",
    "next_token",
    "project",
    "reduce_on_plateau",
    "regression",
    "regularized",
    "revive",
    "sam",
    "schedule",
    "set_batch_statistics",
    "state_shardings",
    "stop_signals",
    "supervised",
    "unit_dictionary",
    "value_and_grad",
]


def __getattr__(name: str) -> Any:
    if name == "losses":  # all of them, by their names
        return importlib.import_module("jaxmodel.train.losses")
    if name in _HOMES:
        return getattr(importlib.import_module(f"jaxmodel.train.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'jaxmodel.train' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
