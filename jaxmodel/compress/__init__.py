"""Smaller models: pure functions that turn leaves into compressed ones by rules, and measure what that costs."""

from jaxmodel.compress.apply import Report, apply, compress_bundle
from jaxmodel.compress.magnitude import Magnitude
from jaxmodel.compress.method import Method, methods, parse, text_of
from jaxmodel.compress.observe import observe
from jaxmodel.compress.recipes import NAMED, named
from jaxmodel.compress.rtn import Rtn

__all__ = [
    "NAMED",
    "Magnitude",
    "Method",
    "Report",
    "Rtn",
    "apply",
    "compress_bundle",
    "methods",
    "named",
    "observe",
    "parse",
    "text_of",
]
