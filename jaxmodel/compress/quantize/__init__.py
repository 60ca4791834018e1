"""Methods that round weights to a grid, by how they choose it and how they round."""

from jaxmodel.compress.quantize.gptq import Compensate, Gptq
from jaxmodel.compress.quantize.ranges import RangeRule
from jaxmodel.compress.quantize.rtn import Rtn

__all__ = ["Compensate", "Gptq", "RangeRule", "Rtn"]
