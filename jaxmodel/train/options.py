"""`TrainOptions`: the plain values of a `TrainConfig`.

The command line shows them, so this module imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, get_args, get_origin, get_type_hints

from jaxmodel.errors import FACTOR, FROM_ZERO, SHARE, InputError, Range, one_of, within

DECAY: Range = (lambda x: 0 <= x < 1, "at least 0 and below 1")

RANGES: dict[str, int | Range] = {
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
      steps: Updates of the weights. The number of epochs is steps times the rows of a batch,
        divided by the rows of the data.
      optimizer: One of adamw, adamw8 (its moments take 8 bits), sgd, lion, adafactor, muon.
      learning_rate: The rate at the peak of the schedule.
      warmup_steps: Updates over which the learning rate rises (at most half of them).
      schedule: Course of the learning rate after that: constant, step, cosine, wsd (stays, then
        falls), one_cycle, plateau (falls when the loss does not).
      final_lr_fraction: The last rate as a share of the peak, for cosine, wsd and one_cycle; the
        least rate for plateau.
      stable_fraction: The share of the updates that wsd stays at the peak.
      step_size: Updates between two drops of step, 0 for a third of all; for plateau, those
        without a better loss until one.
      gamma: The factor by which a drop of step or plateau multiplies the rate.
      weight_decay: Strength of the decay of weights towards zero, times the learning rate; norms
        and biases do not decay.
      max_grad_norm: Largest global norm of the gradient; 0 for no limit.
      b2: Decay of the mean of squared gradients, for the optimisers that keep one.
      gradient_accumulation_steps: Micro-batches that each batch is cut into: the same gradient,
        with the memory of one of them.
      pipeline: The order in which the stages of a mesh with `pipeline` work: gpipe (all forward
        passes first) or 1f1b (each backward pass as soon as it can).
      gradient_compression: The sum of gradients over the data axis of a mesh: exact, int8, or top_k
        (only the largest, with error feedback).
      top_k_fraction: The share of the gradients that top_k exchanges in a step.
      ema_decay: Decay of a moving average of the weights, such as 0.999, which is then judged and
        kept; 0 for none.
      patience: Stop after so many held-out losses without a better one, and take the best weights;
        0 for never.
      on_bad_step: The answer to a step whose loss or gradient is not finite or a spike: skip leaves
        it out, rewind goes back to a checkpoint and past its batch, stop ends the run.
      spike: Standard deviations above the mean of the last 128 losses (or gradient norms) that make
        a spike; 0 for no check.
      seed: Seed of the initial weights and of each step's randomness.
      log_every: Updates between two rows of the history.
      eval_every: Updates between two held-out losses; 0 for one, at the end.
      eval_batches: Batches of a held-out loss whose stream has no end, such as a mixture.
      save_every: Updates between two checkpoints; 0 to save by time.
      save_seconds: Seconds between two checkpoints, where they are not by updates; 0 for never. The
        end has one in any case.

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
