"""Held-out losses and metrics while a model trains."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxmodel import tree
from jaxmodel.errors import at_least
from jaxmodel.models import Model
from jaxmodel.train.losses import Loss
from jaxmodel.train.placing import Placed


class Scorer:
    """`scorer(params) -> {"heldout_loss": ..., "heldout_accuracy": ...}`: the loss, not in training, and its metrics.

    Args:
      model: what is judged.
      loss: see `jaxmodel.train.losses`.
      stream: held-out batches.
      batches: how many are used: always the same, those of the first steps.

    Raises:
      InputError: no batch.
    """

    def __init__(self, model: Model, loss: Loss, stream: Placed, batches: int):
        at_least("eval_batches", batches)
        self._stream, self._batches = stream, batches
        self._score = jax.jit(lambda params, batch: loss(model, params, batch, None, train=False))

    def __call__(self, params: tree.Params) -> dict[str, float]:
        """Each value is the mean over the batches, weighted by what each is a mean over; NaN where no row of them has weight."""
        rows: list[dict[str, Any]] = []
        for j in range(self._batches):
            value, metrics = self._score(params, self._stream.batch(j))
            rows.append({"loss": value, "weight": np.float32(1), **metrics})
        weights = np.array([float(row["weight"]) for row in rows])
        total = weights.sum()
        share = weights / total if total else np.full(len(weights), np.nan)  # a mean over nothing must not be the best of all
        names = [name for name in rows[0] if name not in ("weight", "tokens")]
        return {f"heldout_{name}": float(np.dot(share, [float(row[name]) for row in rows])) for name in names}
