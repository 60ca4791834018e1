"""Functions from parameters to parameters: first weights, muP, adapters (LoRA) and new heads."""

from jaxmodel.adapt.adapters import ADAPTERS, LoRA, lora, merge_adapters, with_adapters
from jaxmodel.adapt.finetune import last_layers, layer_rates, replace_head, transplant
from jaxmodel.adapt.initializers import initialize
from jaxmodel.adapt.maximal_update import coordinates, mup, scale_updates

__all__ = [
    "ADAPTERS",
    "LoRA",
    "coordinates",
    "initialize",
    "last_layers",
    "layer_rates",
    "lora",
    "merge_adapters",
    "mup",
    "replace_head",
    "scale_updates",
    "transplant",
    "with_adapters",
]
