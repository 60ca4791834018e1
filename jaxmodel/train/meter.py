"""The speed of a run in the rows of its history.

It is tokens per second, utilisation, and the share of time spent waiting for data.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from typing import Any

import jax

from jaxmodel import tree
from jaxmodel.models import Model
from jaxmodel.train import flops


class ThroughputMeter:
    """Counters between two rows of the history.

    Args:
      model: the model, whose sizes give the operations of a token.
      params: all parameters.
      most: the operations per second that the devices can do, see `flops.peak`; None leaves the
        utilisation out.
      trainable: which leaves train, see `tree.partition`.
    """

    def __init__(
        self,
        model: Model,
        params: tree.Params,
        most: float | None,
        trainable: tree.Trains = None,
    ):
        self._model = model
        self._shapes = jax.eval_shape(lambda p: p, params)
        self._trainable = trainable
        self._most = most
        self._cost = functools.cache(self._operations)  # of a token, by the length of its row
        self._began = self._since = time.perf_counter()
        self._seen = 0
        self._waited = 0.0
        self._unit = "rows"
        self._length = 0
        self._bad = 0
        self.steps = 0

    def _operations(self, length: int) -> float:
        config = self._model.config
        experts = getattr(config, "experts", 0) and config.experts_per_token / config.experts
        trains = tree.partition(self._shapes, self._trainable)[0]
        return flops.per_token(self._model, self._shapes, length, experts or 1.0, trains=trains)

    @contextlib.contextmanager
    def waits(self) -> Iterator[None]:
        """Count the time in the block as waiting for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def count(self, batch: dict[str, Any]) -> None:
        """Count a step that was started with this batch."""
        self.steps += 1
        self._unit = "tokens" if "tokens" in batch else "rows"
        self._length = batch["tokens"].shape[1] if "tokens" in batch else 0
        self._seen += batch["tokens"].size if "tokens" in batch else len(next(iter(batch.values())))

    def bad(self, steps: int) -> None:
        """Count skipped steps."""
        self._bad += steps

    def row(self, metrics: dict[str, Any], rate: float | None = None) -> dict[str, Any]:
        """Return the metrics of the last step, its learning rate if known, and the counts.

        The counts are those since the row before.
        """
        values = {
            name: float(value) for name, value in metrics.items() if name not in ("weight", "bad")
        }
        now = time.perf_counter()
        speed = self._seen / (now - self._since)
        found = {
            **values,
            f"{self._unit}_per_second": speed,
            "data_wait": self._waited / (now - self._since),
        }
        if rate is not None:
            found["learning_rate"] = rate
        if self._unit == "tokens" and self._most is not None:
            found["mfu"] = speed * self._cost(self._length) / self._most
        found |= {"bad": self._bad, "seconds": now - self._began}
        self._since = time.perf_counter()
        self._seen = 0
        self._waited = 0.0
        self._bad = 0
        return found

    def shown(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return what of a row is shown beside the progress bar."""
        kept = {"loss": row["loss"], f"{self._unit}/s": round(row[f"{self._unit}_per_second"])}
        if "mfu" in row:
            kept["mfu"] = f"{100 * row['mfu']:.1f}%"
        if "heldout_loss" in row:
            kept["heldout"] = row["heldout_loss"]
        return {**kept, "data": f"{100 * row['data_wait']:.1f}%"}
