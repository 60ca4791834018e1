"""Compression: pure functions that replace leaves by smaller ones, by rules, and report it."""

from jaxmodel import moved
from jaxmodel.compress.apply import apply
from jaxmodel.compress.aware import aware, fake
from jaxmodel.compress.budgets import budget
from jaxmodel.compress.bundles import compress_bundle
from jaxmodel.compress.calibrate import calibrate
from jaxmodel.compress.gradients import observe_gradients
from jaxmodel.compress.learnt import Learnt, learn_ranges, store_ranges
from jaxmodel.compress.method import Method, methods, parse
from jaxmodel.compress.observe import observe
from jaxmodel.compress.prune import (
    Fisher,
    Gradient,
    Magnitude,
    Movement,
    Obs,
    Random,
    Snip,
    Sparsegpt,
    Taylor,
    Wanda,
    choose_units,
    mask_units,
    score_units,
)
from jaxmodel.compress.quantize import (
    Activations,
    Binary,
    Compensate,
    Equalised,
    Fp8,
    Gptq,
    InverseTransform,
    Nf4,
    RangeRule,
    Rtn,
    Stochastic,
    Ternary,
    Truncate,
)
from jaxmodel.compress.recipe_file import read_recipe
from jaxmodel.compress.recipes import RECIPES, Recipe, get_recipe
from jaxmodel.compress.report import Report
from jaxmodel.compress.rounds import bottom_up, gradually, prune_in_rounds
from jaxmodel.compress.sensitivity import sensitivity
from jaxmodel.compress.transforms import (
    Awq,
    Rotate,
    Shrink,
    Slice,
    Smooth,
    Transform,
    transformed,
    transforms,
)
from jaxmodel.compress.variants import variants

__all__ = [
    "RECIPES",
    "Activations",
    "Awq",
    "Binary",
    "Compensate",
    "Equalised",
    "Fisher",
    "Fp8",
    "Gptq",
    "Gradient",
    "InverseTransform",
    "Learnt",
    "Magnitude",
    "Method",
    "Movement",
    "Nf4",
    "Obs",
    "Random",
    "RangeRule",
    "Recipe",
    "Report",
    "Rotate",
    "Rtn",
    "Shrink",
    "Slice",
    "Smooth",
    "Snip",
    "Sparsegpt",
    "Stochastic",
    "Taylor",
    "Ternary",
    "Transform",
    "Truncate",
    "Wanda",
    "apply",
    "aware",
    "bottom_up",
    "budget",
    "calibrate",
    "choose_units",
    "compress_bundle",
    "fake",
    "get_recipe",
    "gradually",
    "learn_ranges",
    "mask_units",
    "methods",
    "observe",
    "observe_gradients",
    "parse",
    "prune_in_rounds",
    "read_recipe",
    "score_units",
    "sensitivity",
    "store_ranges",
    "transformed",
    "transforms",
    "variants",
]

moved.attach(__name__)
