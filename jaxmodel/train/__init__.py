"""Training: a pure step, and the loop around it."""

from jaxmodel.train.config import TrainConfig, adamw
from jaxmodel.train.loop import fit
from jaxmodel.train.losses import Loss, next_token
from jaxmodel.train.state import TrainState, init_state, state_shardings
from jaxmodel.train.step import make_step

__all__ = [
    "Loss",
    "TrainConfig",
    "TrainState",
    "adamw",
    "fit",
    "init_state",
    "make_step",
    "next_token",
    "state_shardings",
]
