"""Methods that round weights to a grid, by how they choose it and how they round."""

from jaxmodel.compress.quantize.activations import Activations
from jaxmodel.compress.quantize.few_levels import Binary, Fp8, Ternary
from jaxmodel.compress.quantize.gptq import Compensate, Gptq
from jaxmodel.compress.quantize.learnt import Learnt, learn_ranges, store_ranges
from jaxmodel.compress.quantize.ranges import RangeRule
from jaxmodel.compress.quantize.rounding import Stochastic, Truncate
from jaxmodel.compress.quantize.rtn import Rtn
from jaxmodel.compress.quantize.tables import Equalised, InverseTransform, Nf4
from jaxmodel.compress.quantize.turn import Turn

__all__ = [
    "Activations",
    "Binary",
    "Compensate",
    "Equalised",
    "Fp8",
    "Gptq",
    "InverseTransform",
    "Learnt",
    "Nf4",
    "RangeRule",
    "Rtn",
    "Stochastic",
    "Ternary",
    "Truncate",
    "Turn",
    "learn_ranges",
    "store_ranges",
]
