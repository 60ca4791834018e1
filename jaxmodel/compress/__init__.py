"""Compression: pure functions that replace leaves by smaller ones, by rules, and report it."""

from jaxmodel import moved
from jaxmodel.compress.apply import Report, apply, compress_bundle
from jaxmodel.compress.magnitude import Magnitude
from jaxmodel.compress.method import Method, methods, parse
from jaxmodel.compress.observe import observe
from jaxmodel.compress.recipe_file import read_recipe
from jaxmodel.compress.recipes import NAMED, Recipe, named
from jaxmodel.compress.rtn import Rtn
from jaxmodel.compress.versions import versions

__all__ = [
    "NAMED",
    "Magnitude",
    "Method",
    "Recipe",
    "Report",
    "Rtn",
    "apply",
    "compress_bundle",
    "methods",
    "named",
    "observe",
    "parse",
    "read_recipe",
    "versions",
]

moved.attach(__name__)
