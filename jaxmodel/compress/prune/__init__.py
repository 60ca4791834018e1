"""Methods that set weights to zero, by what they score them with."""

from jaxmodel.compress.prune.magnitude import Magnitude, Random
from jaxmodel.compress.prune.obs import Obs
from jaxmodel.compress.prune.saliency import Fisher, Gradient, Movement, Snip, Taylor
from jaxmodel.compress.prune.sparsegpt import Sparsegpt
from jaxmodel.compress.prune.units import choose_units, mask_units, score_units
from jaxmodel.compress.prune.wanda import Wanda

__all__ = [
    "Fisher",
    "Gradient",
    "Magnitude",
    "Movement",
    "Obs",
    "Random",
    "Snip",
    "Sparsegpt",
    "Taylor",
    "Wanda",
    "choose_units",
    "mask_units",
    "score_units",
]
