"""Held-out losses and metrics during training."""

from __future__ import annotations

import dataclasses
from typing import Any, SupportsIndex

import jax
import numpy as np

from jaxmodel import tree
from jaxmodel.data import Batches
from jaxmodel.data.stream import Batch, global_rows
from jaxmodel.errors import InputError, at_least
from jaxmodel.losses import Loss
from jaxmodel.losses.chosen import checked_loss
from jaxmodel.models import Model
from jaxmodel.train.placing import ShardedLoader, check_rows, explain, not_finite


@dataclasses.dataclass(frozen=True, eq=False)
class Once:
    """The first rows of a stream, as batches of its size.

    Rows that only fill up the last batch have weight 0.

    Attributes:
      stream: batches by step.
      count: the number of rows.
      weighted: whether every batch has `weights`, so that all have the same structure.
    """

    stream: Batches
    count: int
    weighted: bool = False

    @property
    def batch_size(self) -> int:
        """The number of rows in a batch of the stream."""
        return self.stream.batch_size

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the stream, and the number of rows."""
        return f"{self.stream.fingerprint} {self.count}"

    @property
    def steps(self) -> int:
        """The number of batches."""
        return -(-self.count // self.batch_size)

    def batch(self, step: SupportsIndex, rows: slice = slice(None)) -> Batch:
        """Return the stream's batch, with `weights`."""
        batch = self.stream.batch(step, rows)
        if self.count % self.batch_size == 0 and not self.weighted:
            return batch
        given = batch.get("weights", np.ones(len(next(iter(batch.values()))), np.float32))
        counts = np.arange(*global_rows(step, rows, self.batch_size)) < self.count
        return {
            **batch,
            "weights": np.where(
                counts.reshape(-1, *[1] * (given.ndim - 1)), given, np.zeros_like(given)
            ),
        }


class Evaluator:
    """Evaluation of parameters: `scorer(params) -> {"heldout_loss": ..., "heldout_accuracy": ...}`.

    The loss is run with `train=False`; its metrics are included. For a stream with a `count` each
    row is evaluated once, whatever the batch size: rows that fill up the last batch have weight 0
    (or are left out, if the loss does not read weights). The rows and their order never change.

    Args:
      model: the model to evaluate.
      loss: see `jaxmodel.losses`.
      stream: held-out batches.
      mesh: None for one device.
      batches: the number of batches to use of a stream without a `count`.
      rows: the number of rows to evaluate, from the start of the stream; 0 for all.

    Raises:
      InputError: there is no batch; when called, a label or a token is not in the model's range.
    """

    def __init__(
        self,
        model: Model,
        loss: Loss,
        stream: Batches,
        mesh: jax.sharding.Mesh | None,
        batches: int,
        rows: int = 0,
    ):
        at_least("eval_batches", batches)
        at_least("eval_rows", rows, 0)
        size = stream.batch_size
        most = getattr(stream, "count", None)
        count = (rows or batches * size) if most is None else min(rows or most, most)
        self._model = model
        self._mesh = mesh
        self._once = Once(stream, count)
        self._placed = ShardedLoader(self._once, mesh)
        loss = checked_loss(loss)
        self._score = jax.jit(lambda params, batch: loss(model, params, batch, None, train=False))
        self._reads_weights: bool | None = None

    def __call__(self, params: tree.Params) -> dict[str, float]:
        """Evaluate parameters.

        Each value is the weighted mean over the rows, a Python float; NaN if no row has weight.
        """
        rows: list[dict[str, Any]] = []
        for j in range(self._once.steps):
            value, metrics = self._score(params, self._batch(params, j))
            if not np.isfinite(float(value)):
                explain(self._model, self._once, j, "heldout")  # says if a label is not a class
                for found in not_finite(self._once, j).values():
                    raise InputError(f"heldout: {found}; allowed: finite numbers")
            rows.append({"loss": value, "weight": np.float32(1), **metrics})
        weights = np.array([float(row["weight"]) for row in rows])
        total = weights.sum()
        # NaN, since a mean over nothing must not count as the best
        share = weights / total if total else np.full(len(weights), np.nan)
        names = [name for name in rows[0] if name not in ("weight", "tokens")]
        return {
            f"heldout_{name}": float(np.dot(share, [float(row[name]) for row in rows]))
            for name in names
        }

    def _batch(self, params: tree.Params, j: int) -> dict[str, Any]:
        left = self._once.count - j * self._once.batch_size
        if left >= self._once.batch_size:
            return self._placed.batch(j)
        if self._reads_weights is None:
            count = self._once.steps * self._once.batch_size
            full = ShardedLoader(
                dataclasses.replace(self._once, count=count, weighted=True), self._mesh
            )
            weighed = [
                float(self._score(params, part.batch(j))[1].get("weight", 0))
                for part in (full, self._placed)
            ]
            self._reads_weights = weighed[0] != weighed[1]
        if self._reads_weights:
            return self._placed.batch(j)
        check_rows(left, self._mesh)
        return self._placed.batch(j, slice(0, left))
