"""`TrainOptions`: the plain values of a `TrainConfig`; the command line shows them, so nothing heavy is imported here."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable
from typing import Literal, get_args, get_origin, get_type_hints

from jaxmodel.errors import InputError, at_least, unknown

type Range = tuple[Callable[[float], bool], str]
"""Whether a number is within, and what is allowed, in words."""

FROM_ZERO: Range = (lambda x: 0 <= x < math.inf, "a finite number of at least 0")
DECAY: Range = (lambda x: 0 <= x < 1, "at least 0 and below 1")
SHARE: Range = (lambda x: 0 <= x <= 1, "0 to 1")
FACTOR: Range = (lambda x: 0 < x <= 1, "above 0 and at most 1")

RANGES: dict[str, int | Range] = {
    **dict.fromkeys(("steps", "accumulate", "log_every", "eval_batches"), 1),
    **dict.fromkeys(("warmup", "drop_every", "patience", "eval_every", "save_every", "seed"), 0),
    **dict.fromkeys(("learning_rate", "weight_decay", "clip", "spike", "save_seconds"), FROM_ZERO),
    **dict.fromkeys(("end_rate", "stable"), SHARE),
    **dict.fromkeys(("drop", "exchange_share"), FACTOR),
    **dict.fromkeys(("beta2", "average"), DECAY),
}
"""What each number of `TrainOptions` may be: the least whole number, or a range. Names stand with their fields."""


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """The part of `TrainConfig` that is plain values, and so at the same time options of `jaxmodel train`.

    Raises:
      InputError: a number out of range, or an unknown name.
    """

    steps: int = 200
    """Updates of the weights."""
    optimizer: Literal["adamw", "adamw8", "sgd", "lion", "adafactor", "muon"] = "adamw"
    """adamw8 keeps its moments in 8 bits."""
    learning_rate: float = 1e-3
    """At the peak of the schedule."""
    warmup: int = 20
    """Updates over which the learning rate rises (at most half of them)."""
    schedule: Literal["constant", "step", "cosine", "wsd", "one_cycle", "plateau"] = "cosine"
    """What the learning rate does after that; wsd: stays, then falls; plateau: falls when the loss does not."""
    end_rate: float = 0.1
    """The last rate as a share of the peak: of cosine, wsd and one_cycle; of plateau the least."""
    stable: float = 0.8
    """Of wsd: the share of the updates at the peak."""
    drop_every: int = 0
    """Updates between two drops of step; 0 for a third of them. Of plateau: updates without a better loss until one."""
    drop: float = 0.1
    """What a drop of step or plateau multiplies the rate with."""
    weight_decay: float = 0.1
    """How far weights are drawn to zero, times the learning rate; norms and biases are not."""
    clip: float = 1.0
    """Largest global norm of the gradient; 0 for no limit."""
    beta2: float = 0.95
    """How slowly the mean of squared gradients moves, of the optimisers that have one."""
    accumulate: int = 1
    """Micro-batches that each batch is cut into: the same gradient, with the memory of one of them."""
    pipeline: Literal["gpipe", "1f1b"] = "gpipe"
    """How stages of a mesh with `pipeline` work together: all forward passes first, or each backward pass as soon as it can."""
    exchange: Literal["exact", "int8", "top_k"] = "exact"
    """How gradients are summed over the data axis of a mesh: as they are, in 8 bits, or only the largest with error feedback."""
    exchange_share: float = 0.01
    """Of top_k: which share of the gradients is exchanged in a step."""
    average: float = 0.0
    """Decay of a moving average of the weights, such as 0.999, which is then judged and kept; 0 for none."""
    patience: int = 0
    """Stop after so many held-out losses without a better one, and take the best weights; 0 for never."""
    bad: Literal["skip", "rewind", "stop"] = "skip"
    """A step whose loss or gradient is not finite or a spike: leave it out; go back to a checkpoint and past its batch; stop."""
    spike: float = 0.0
    """Standard deviations above the mean of the last 128 losses (or gradient norms) from which one is a spike; 0 for no check."""
    seed: int = 0
    """Of the initial weights and of each step's randomness."""
    log_every: int = 10
    """Updates between two rows of the history."""
    eval_every: int = 0
    """Updates between two held-out losses; 0: one, at the end."""
    eval_batches: int = 8
    """Batches of a held-out loss."""
    save_every: int = 0
    """Updates between two checkpoints; 0: by time."""
    save_seconds: float = 300.0
    """Seconds between two checkpoints, where they are not by updates; 0 for never. One is made at the end in any case."""

    def __post_init__(self) -> None:
        for name, allowed in RANGES.items():
            within(name, getattr(self, name), allowed)
        if self.seed >= 2**32:  # JAX would cut it to 32 bits
            raise InputError(f"seed: {self.seed!r} given; allowed: 0 to {2**32 - 1}")
        for name, names in _names().items():
            if getattr(self, name) not in names:
                raise unknown(name, getattr(self, name), names)


def within(name: str, value: object, allowed: int | Range) -> None:
    """Refuse what is no number of a range.

    Raises:
      InputError: it is out of range, not finite, or something else.

    >>> within("beta2", 1.0, DECAY)
    Traceback (most recent call last):
      ...
    jaxmodel.errors.InputError: beta2: 1.0 given; allowed: at least 0 and below 1
    """
    if isinstance(allowed, int):
        at_least(name, value, allowed)
    elif not isinstance(value, numbers.Real) or isinstance(value, bool) or not allowed[0](float(value)):
        raise InputError(f"{name}: {value!r} given; allowed: {allowed[1]}")


@functools.cache
def _names() -> dict[str, tuple[str, ...]]:
    """The names that each field allows which is one."""
    return {name: get_args(kind) for name, kind in get_type_hints(TrainOptions).items() if get_origin(kind) is Literal}
