"""Training: a pure step, and the loop around it.

What stands below is imported when it is first used: the command line shows `TrainOptions` and must answer at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxmodel.train.config import TrainConfig, adamw
    from jaxmodel.train.dictionary import count_active, revive, unit_dictionary
    from jaxmodel.train.loop import fit
    from jaxmodel.train.losses import Loss, autoencoder, classification, cross_entropy, next_token
    from jaxmodel.train.options import TrainOptions
    from jaxmodel.train.state import TrainState, init_state, state_shardings
    from jaxmodel.train.statistics import set_batch_statistics
    from jaxmodel.train.step import make_step

_HOMES = {
    "Loss": "losses",
    "TrainConfig": "config",
    "TrainOptions": "options",
    "TrainState": "state",
    "adamw": "config",
    "autoencoder": "losses",
    "classification": "losses",
    "count_active": "dictionary",
    "cross_entropy": "losses",
    "fit": "loop",
    "init_state": "state",
    "make_step": "step",
    "next_token": "losses",
    "revive": "dictionary",
    "set_batch_statistics": "statistics",
    "state_shardings": "state",
    "unit_dictionary": "dictionary",
}

__all__ = [
    "Loss",
    "TrainConfig",
    "TrainOptions",
    "TrainState",
    "adamw",
    "autoencoder",
    "classification",
    "count_active",
    "cross_entropy",
    "fit",
    "init_state",
    "make_step",
    "next_token",
    "revive",
    "set_batch_statistics",
    "state_shardings",
    "unit_dictionary",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"jaxmodel.train.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'jaxmodel.train' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
