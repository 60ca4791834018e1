"""Functions from parameters to parameters: first weights, muP, adapters (LoRA) and new heads."""

from jaxmodel import moved
from jaxmodel.adapt.adapters import ADAPTERS, LoRA, lora, merge_adapters, with_adapters
from jaxmodel.adapt.finetune import last_layers, layer_rates, load_matching, replace_head
from jaxmodel.adapt.initializers import initialize
from jaxmodel.adapt.maximal_update import coord_check, mup, scale_by_path

__all__ = [
    "ADAPTERS",
    "LoRA",
    "coord_check",
    "initialize",
    "last_layers",
    "layer_rates",
    "load_matching",
    "lora",
    "merge_adapters",
    "mup",
    "replace_head",
    "scale_by_path",
    "with_adapters",
]

moved.attach(__name__)
