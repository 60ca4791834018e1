"""`TrainConfig`: how to train, and the optimiser that it describes."""

from __future__ import annotations

import dataclasses
from typing import Any

import optax

from jaxmodel import tree
from jaxmodel.errors import InputError, at_least
from jaxmodel.train.options import TrainOptions


@dataclasses.dataclass(frozen=True)
class TrainConfig(TrainOptions):
    """How to train: the values of `TrainOptions`, and rules.

    Attributes:
      decay: rules, path -> whether weights decay; as they stand, norms and biases do not.
      trainable: rules, path -> whether the leaf trains; None for every plain floating leaf but statistics (see `tree.partition`).
    """

    decay: tree.Rules = ((tree.optional(".*(norm/.*|_bias)"), False), (".*", True))
    trainable: tree.Rules | None = None


def adamw(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW with clipping, warm-up and cosine."""
    at_least("steps", config.steps)
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
