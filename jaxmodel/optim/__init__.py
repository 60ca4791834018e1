"""Optimisers by name, schedules, quantised and sparse training, bounds of norms, bad steps."""

from jaxmodel.optim.guard import Guard
from jaxmodel.optim.optimizers import optimizer
from jaxmodel.optim.projections import project
from jaxmodel.optim.quantized import quantize_weights
from jaxmodel.optim.sam import sam
from jaxmodel.optim.schedules import schedule
from jaxmodel.optim.zeros import densities, keep, kept, prune_gradually, rewire

__all__ = [
    "Guard",
    "densities",
    "keep",
    "kept",
    "optimizer",
    "project",
    "prune_gradually",
    "quantize_weights",
    "rewire",
    "sam",
    "schedule",
]
