"""`TrainOptions`: the plain values of a `TrainConfig`; the command line shows them, so nothing heavy is imported here."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """The part of `TrainConfig` that is numbers, and so at the same time options of `jaxmodel train`."""

    steps: int = 200
    """Updates of the weights."""
    learning_rate: float = 1e-3
    """At the peak of the schedule."""
    warmup: int = 20
    """Updates over which the learning rate rises (at most half of them); a cosine to a tenth follows."""
    weight_decay: float = 0.1
    """Of AdamW; norms and biases do not decay."""
    clip: float = 1.0
    """Largest global norm of the gradient."""
    beta2: float = 0.95
    """Of AdamW: how slowly its mean of squared gradients moves."""
    seed: int = 0
    """Of the initial weights and of each step's randomness."""
    log_every: int = 10
    """Updates between two rows of the history."""
    eval_every: int = 0
    """Updates between two held-out losses; 0: one, at the end."""
    eval_batches: int = 8
    """Batches of a held-out loss."""
