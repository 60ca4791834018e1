"""Optimisers by name, schedules, quantised training, bounds of norms, detection of bad steps."""

from jaxmodel.optim.guard import Guard
from jaxmodel.optim.optimizers import optimizer
from jaxmodel.optim.projections import project
from jaxmodel.optim.quantized import quantize_weights
from jaxmodel.optim.sam import sam
from jaxmodel.optim.schedules import schedule

__all__ = [
    "Guard",
    "optimizer",
    "project",
    "quantize_weights",
    "sam",
    "schedule",
]
