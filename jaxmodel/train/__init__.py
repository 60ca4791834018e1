"""Training: a pure step, and the loop around it.

What stands below is imported when it is first used: the command line shows `TrainOptions` and must answer at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxmodel.models.adapters import ADAPTERS, LoRA, lora, merge_adapters, with_adapters
    from jaxmodel.train import losses
    from jaxmodel.train.checkpoint import Checkpoints, Keep, fingerprint
    from jaxmodel.train.config import TrainConfig, make_optimizer
    from jaxmodel.train.dictionary import count_active, revive, unit_dictionary
    from jaxmodel.train.exchange import Exchange
    from jaxmodel.train.faults import Watchdog, stop_signals
    from jaxmodel.train.finetune import last_layers, layer_rates, replace_head, transplant
    from jaxmodel.train.gradients import accumulated, value_and_grad
    from jaxmodel.train.guard import Guard
    from jaxmodel.train.ledger import Ledger, process_began
    from jaxmodel.train.loop import fit
    from jaxmodel.train.losses import (
        Loss,
        autoencoder,
        classification,
        confident_learning,
        contrastive,
        cross_entropy,
        next_token,
        regression,
        supervised,
    )
    from jaxmodel.train.optimizers import each_layer, optimizer, scale_by_adam8
    from jaxmodel.train.options import TrainOptions
    from jaxmodel.train.pipeline import one_forward_one_backward
    from jaxmodel.train.placing import environment, gather
    from jaxmodel.train.program import Program
    from jaxmodel.train.projections import project
    from jaxmodel.train.quantized import quantize_weights
    from jaxmodel.train.rate_search import find_lr
    from jaxmodel.train.regularize import regularized, sam
    from jaxmodel.train.schedules import reduce_on_plateau, schedule
    from jaxmodel.train.selfsupervised import (
        masked_patches,
        patch_error,
        pretext,
        restored,
        two_views,
        with_projection,
        without_projection,
    )
    from jaxmodel.train.semi import fixmatch, linear_ramp, mean_teacher, pseudo_label, pseudo_labels, sigmoid_ramp
    from jaxmodel.train.state import TrainState, averaged, init_state, state_shardings
    from jaxmodel.train.statistics import set_batch_statistics
    from jaxmodel.train.step import make_step
    from jaxmodel.train.supervise import Supervisor

_HOMES = {
    "ADAPTERS": "jaxmodel.models.adapters",
    "Checkpoints": "checkpoint",
    "Exchange": "exchange",
    "Guard": "guard",
    "Keep": "checkpoint",
    "Ledger": "ledger",
    "LoRA": "jaxmodel.models.adapters",
    "Loss": "losses",
    "Program": "program",
    "Supervisor": "supervise",
    "TrainConfig": "config",
    "TrainOptions": "options",
    "TrainState": "state",
    "Watchdog": "faults",
    "accumulated": "gradients",
    "autoencoder": "losses",
    "averaged": "state",
    "classification": "losses",
    "confident_learning": "losses",
    "contrastive": "losses",
    "count_active": "dictionary",
    "cross_entropy": "losses",
    "each_layer": "optimizers",
    "environment": "placing",
    "find_lr": "rate_search",
    "fingerprint": "checkpoint",
    "fit": "loop",
    "fixmatch": "semi",
    "gather": "placing",
    "init_state": "state",
    "last_layers": "finetune",
    "layer_rates": "finetune",
    "linear_ramp": "semi",
    "lora": "jaxmodel.models.adapters",
    "make_optimizer": "config",
    "make_step": "step",
    "masked_patches": "selfsupervised",
    "mean_teacher": "semi",
    "merge_adapters": "jaxmodel.models.adapters",
    "next_token": "losses",
    "one_forward_one_backward": "pipeline",
    "optimizer": "optimizers",
    "patch_error": "selfsupervised",
    "pretext": "selfsupervised",
    "process_began": "ledger",
    "project": "projections",
    "pseudo_label": "semi",
    "pseudo_labels": "semi",
    "quantize_weights": "quantized",
    "reduce_on_plateau": "schedules",
    "regression": "losses",
    "regularized": "regularize",
    "replace_head": "finetune",
    "restored": "selfsupervised",
    "revive": "dictionary",
    "sam": "regularize",
    "scale_by_adam8": "optimizers",
    "schedule": "schedules",
    "set_batch_statistics": "statistics",
    "sigmoid_ramp": "semi",
    "state_shardings": "state",
    "stop_signals": "faults",
    "supervised": "losses",
    "transplant": "finetune",
    "two_views": "selfsupervised",
    "unit_dictionary": "dictionary",
    "value_and_grad": "gradients",
    "with_adapters": "jaxmodel.models.adapters",
    "with_projection": "selfsupervised",
    "without_projection": "selfsupervised",
}

__all__ = [
    "ADAPTERS",
    "Checkpoints",
    "Exchange",
    "Guard",
    "Keep",
    "Ledger",
    "LoRA",
    "Loss",
    "Program",
    "Supervisor",
    "TrainConfig",
    "TrainOptions",
    "TrainState",
    "Watchdog",
    "accumulated",
    "autoencoder",
    "averaged",
    "classification",
    "confident_learning",
    "contrastive",
    "count_active",
    "cross_entropy",
    "each_layer",
    "environment",
    "find_lr",
    "fingerprint",
    "fit",
    "fixmatch",
    "gather",
    "init_state",
    "last_layers",
    "layer_rates",
    "linear_ramp",
    "lora",
    "losses",
    "make_optimizer",
    "make_step",
    "masked_patches",
    "mean_teacher",
    "merge_adapters",
    "next_token",
    "one_forward_one_backward",
    "optimizer",
    "patch_error",
    "pretext",
    "process_began",
    "project",
    "pseudo_label",
    "pseudo_labels",
    "quantize_weights",
    "reduce_on_plateau",
    "regression",
    "regularized",
    "replace_head",
    "restored",
    "revive",
    "sam",
    "scale_by_adam8",
    "schedule",
    "set_batch_statistics",
    "sigmoid_ramp",
    "state_shardings",
    "stop_signals",
    "supervised",
    "transplant",
    "two_views",
    "unit_dictionary",
    "value_and_grad",
    "with_adapters",
    "with_projection",
    "without_projection",
]


def __getattr__(name: str) -> Any:
    if name == "losses":  # all of them, by their names
        return importlib.import_module("jaxmodel.train.losses")
    if name in _HOMES:
        home = _HOMES[name]
        return getattr(importlib.import_module(home if "." in home else f"jaxmodel.train.{home}"), name)
    raise AttributeError(f"module 'jaxmodel.train' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
