"""Methods that set weights to zero, by what they score them with."""

from jaxmodel.compress.prune.magnitude import Magnitude
from jaxmodel.compress.prune.sparsegpt import Sparsegpt
from jaxmodel.compress.prune.wanda import Wanda

__all__ = ["Magnitude", "Sparsegpt", "Wanda"]
