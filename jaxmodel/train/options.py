"""`TrainOptions`: the plain values of a `TrainConfig`; the command line shows them, so nothing heavy is imported here."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """The part of `TrainConfig` that is plain values, and so at the same time options of `jaxmodel train`."""

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
    """Largest global norm of the gradient."""
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
    """Seconds between two checkpoints, where they are not by updates; one is made at the end in any case."""
