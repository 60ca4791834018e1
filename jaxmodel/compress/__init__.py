"""Compression: pure functions that replace leaves by smaller ones, by rules, and report it.

The methods of a chain are in `compress.prune` and `compress.quantize`, and what is done to the
whole model before in `compress.transforms`; recipes name them by their text form.
"""

from jaxmodel import moved
from jaxmodel.compress import prune, quantize, transforms
from jaxmodel.compress.apply import apply
from jaxmodel.compress.aware import aware, fake
from jaxmodel.compress.budgets import budget
from jaxmodel.compress.bundles import compress_bundle
from jaxmodel.compress.calibrate import calibrate
from jaxmodel.compress.gradients import observe_gradients
from jaxmodel.compress.method import Method, methods, parse
from jaxmodel.compress.observe import observe
from jaxmodel.compress.prune import Magnitude, Sparsegpt, Wanda
from jaxmodel.compress.quantize import Gptq, Rtn
from jaxmodel.compress.recipe_file import read_recipe
from jaxmodel.compress.recipes import RECIPES, Recipe, get_recipe
from jaxmodel.compress.report import Report
from jaxmodel.compress.rounds import bottom_up, gradually, prune_in_rounds
from jaxmodel.compress.sensitivity import sensitivity
from jaxmodel.compress.texts import text_batches
from jaxmodel.compress.variants import variants

__all__ = [
    "RECIPES",
    "Gptq",
    "Magnitude",
    "Method",
    "Recipe",
    "Report",
    "Rtn",
    "Sparsegpt",
    "Wanda",
    "apply",
    "aware",
    "bottom_up",
    "budget",
    "calibrate",
    "compress_bundle",
    "fake",
    "get_recipe",
    "gradually",
    "methods",
    "observe",
    "observe_gradients",
    "parse",
    "prune",
    "prune_in_rounds",
    "quantize",
    "read_recipe",
    "sensitivity",
    "text_batches",
    "transforms",
    "variants",
]

moved.attach(__name__)
