"""`TrainOptions`: the plain values of a `TrainConfig`.

The command line shows them, so this module imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, get_args, get_origin, get_type_hints

from jaxmodel.errors import FACTOR, FROM_ZERO, SHARE, Allowed, InputError, one_of, within

DECAY: Allowed = (lambda x: 0 <= x < 1, "at least 0 and below 1")

RANGES: dict[str, int | Allowed] = {
    **dict.fromkeys(("steps", "gradient_accumulation_steps", "log_every", "eval_batches"), 1),
    **dict.fromkeys(
        ("warmup_steps", "step_size", "patience", "eval_every", "save_every", "seed"), 0
    ),
    **dict.fromkeys(
        ("learning_rate", "weight_decay", "max_grad_norm", "spike", "save_seconds"), FROM_ZERO
    ),
    **dict.fromkeys(("final_lr_fraction", "stable_fraction"), SHARE),
    **dict.fromkeys(("gamma", "top_k_fraction"), FACTOR),
    **dict.fromkeys(("b2", "ema_decay"), DECAY),
}
"""The allowed values of the numbers of `TrainOptions`: the least integer, or a range.

The allowed names are given by the types of the fields.
"""


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """The plain values of `TrainConfig`, which are also options of `jaxmodel train`.

    Attributes:
      steps: Number of updates of the weights. An epoch takes as many as the data have rows, divided
        by the rows of a batch.
      optimizer: Optimiser: adamw, adamw8 (AdamW with 8-bit moments), sgd, lion, adafactor or muon.
      learning_rate: Peak of the learning-rate schedule.
      warmup_steps: Updates over which the learning rate rises from 0 to its peak; at most half of
        the updates.
      schedule: Learning rate after the warm-up: constant, step (drops at intervals), cosine (falls
        to the end), wsd (stays, then falls), one_cycle (rises and falls once) or plateau (drops
        when the training loss no longer falls).
      final_lr_fraction: Learning rate at the end as a fraction of its peak, for cosine, wsd and
        one_cycle; the lowest rate for plateau.
      stable_fraction: Fraction of the updates that the wsd schedule stays at its peak.
      step_size: Updates between two drops of the step schedule, 0 for a third of all updates; for
        plateau, updates without a lower loss before a drop.
      gamma: Factor that multiplies the learning rate at each drop of step or plateau.
      weight_decay: Strength of the weight decay, which is multiplied by the learning rate; norms
        and biases do not decay.
      max_grad_norm: Clip the gradient to this global norm; 0 for no clipping.
      b2: Decay rate of the running mean of squared gradients (Adam's beta 2).
      gradient_accumulation_steps: Cut each batch into this many micro-batches and sum their
        gradients: the same update in less memory.
      pipeline: Order of work in a mesh with a pipeline axis: gpipe (all forward passes first), or
        else 1f1b (each backward pass as soon as it can).
      gradient_compression: Sum of the gradients over the data axis of a mesh: exact, int8 (rounded
        to 8 bits), or top_k (of the largest values only, with error feedback).
      top_k_fraction: Fraction of the gradient that top_k exchanges in each step.
      ema_decay: Decay rate of a moving average of the weights, such as 0.999, which is evaluated
        and saved instead of the weights; 0 for none.
      patience: Stop after this many evaluations without a lower held-out loss and keep the best
        weights; 0 for never.
      on_bad_step: Response to a loss or gradient that is not finite or spikes: skip the update,
        rewind to a checkpoint and go past that batch, or stop the run.
      spike: Treat a loss or gradient norm as a spike if it is this many standard deviations above
        the mean of the last 128; 0 for no check.
      seed: Seed of the initial weights and of the randomness in each step.
      log_every: Updates between two rows of the log.
      eval_every: Updates between two evaluations on the held-out data; 0 for one at the end.
      eval_batches: Number of held-out batches to evaluate if their stream has no end, such as a
        mixture.
      save_every: Updates between two checkpoints; 0 to save by time (see save_seconds).
      save_seconds: Seconds between two checkpoints, unless save_every is given; 0 for none but the
        one at the end.

    Raises:
      InputError: a number is out of range, or a name is unknown.
    """

    steps: int = 200
    optimizer: Literal["adamw", "adamw8", "sgd", "lion", "adafactor", "muon"] = "adamw"
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    schedule: Literal["constant", "step", "cosine", "wsd", "one_cycle", "plateau"] = "cosine"
    final_lr_fraction: float = 0.1
    stable_fraction: float = 0.8
    step_size: int = 0
    gamma: float = 0.1
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    b2: float = 0.95
    gradient_accumulation_steps: int = 1
    pipeline: Literal["gpipe", "1f1b"] = "gpipe"
    gradient_compression: Literal["exact", "int8", "top_k"] = "exact"
    top_k_fraction: float = 0.01
    ema_decay: float = 0.0
    patience: int = 0
    on_bad_step: Literal["skip", "rewind", "stop"] = "skip"
    spike: float = 0.0
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    eval_batches: int = 8
    save_every: int = 0
    save_seconds: float = 300.0

    def __post_init__(self) -> None:
        for name, allowed in RANGES.items():
            within(name, getattr(self, name), allowed)
        if self.seed >= 2**32:  # JAX would truncate it to 32 bits
            raise InputError(f"seed: {self.seed!r} given; allowed: 0 to {2**32 - 1}")
        for name, names in _names().items():
            one_of(name, getattr(self, name), names)


@functools.cache
def _names() -> dict[str, tuple[str, ...]]:
    """Return the allowed names of each field that takes one."""
    return {
        name: get_args(kind)
        for name, kind in get_type_hints(TrainOptions).items()
        if get_origin(kind) is Literal
    }
