"""`TrainConfig`: how to train, and the optimiser that it describes."""

from __future__ import annotations

import dataclasses
from typing import Any

import optax

from jaxmodel import tree
from jaxmodel.errors import InputError


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
      steps: updates.
      learning_rate: at its peak.
      warmup: steps of linear rise; a cosine to a tenth follows.
      weight_decay: of AdamW, where `decay` says so.
      clip: largest global norm of the gradient.
      beta2: of AdamW.
      seed: of the initial parameters and of each step's randomness.
      log_every: steps between two rows of the history.
      eval_every: steps between two held-out losses; 0 for the end only.
      eval_batches: batches of a held-out loss.
      decay: rules, path -> whether weights decay.
      trainable: rules, path -> whether the leaf trains; None for every plain floating leaf.
    """

    steps: int = 200
    learning_rate: float = 1e-3
    warmup: int = 20
    weight_decay: float = 0.1
    clip: float = 1.0
    beta2: float = 0.95
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    eval_batches: int = 8
    decay: tree.Rules = ((tree.optional(".*(norm/.*|_bias)"), False), (".*", True))
    trainable: tree.Rules | None = None


def adamw(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW with clipping, warm-up and cosine."""
    if config.steps < 1:
        raise InputError(f"steps: {config.steps} given; at least 1 is needed")
    warmup = min(config.warmup, config.steps // 2)
    rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, config.steps, config.learning_rate / 10)

    def decays(params: tree.Params) -> tree.Params:
        values = tree.assign(config.decay, params)

        def value(path: str, _: Any) -> bool:
            of_layers = {values[layer] for layer in tree.layer_paths(path)}
            if len(of_layers) > 1:
                raise InputError(f"decay: the layers of {path!r} differ; split the tree first (tree.match), as `fit` does")
            return of_layers.pop()

        return tree.map_leaves(value, params)

    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(rate, b1=0.9, b2=config.beta2, weight_decay=config.weight_decay, mask=decays),
    )


def split_by(config: TrainConfig, params: tree.Params) -> tree.Params:
    """`params` with segments split where a rule of the config tells their layers apart."""
    for rules in (config.decay, config.trainable):
        if rules is not None:
            params, _ = tree.match([(tree.optional(pattern), value) for pattern, value in rules], params)
    return params
