"""The learning-rate range test: a short run whose rate grows until the loss does."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from jaxmodel import tree
from jaxmodel.brief import briefly
from jaxmodel.data.given import as_batches
from jaxmodel.errors import InputError, at_least
from jaxmodel.losses import Loss, default_loss
from jaxmodel.models import Model
from jaxmodel.optim.schedules import Schedule
from jaxmodel.progress import progress
from jaxmodel.report import plot
from jaxmodel.train.config import TrainConfig
from jaxmodel.train.placing import ShardedLoader
from jaxmodel.train.program import Program


@briefly
@dataclasses.dataclass(frozen=True, eq=False)
class RateSearch:
    """The result of `find_lr`.

    Attributes:
      rates: `[N]`, the growing rates of the updates; N is smaller than asked if the loss diverged.
      losses: `[N]`, the loss of the batch before each update.
      smoothed: `[N]`, the losses averaged in both directions with weights `smoothing^|i - j|`, so
        that the average does not lag behind.
      suggestion: the rate at which `smoothed` falls most steeply over the logarithm of the rate;
        None if it never falls.
    """

    rates: Float[np.ndarray, " N"]
    losses: Float[np.ndarray, " N"]
    smoothed: Float[np.ndarray, " N"]
    suggestion: float | None

    def _repr_svg_(self) -> str | None:
        with contextlib.suppress(InputError):  # matplotlib is missing
            return self.plot()._repr_svg_()
        return None

    def plot(self, fmt: str = "svg") -> plot.Picture:
        """Plot the losses over the rates, with the suggestion; `fmt` is svg or png.

        The axis ends where the losses explode.
        """
        # beyond this the plot would only show that the loss diverges
        most = 1.5 * max(self.losses[0], self.smoothed[0])
        series = {
            name: (self.rates, np.where(loss <= most, loss, np.nan))
            for name, loss in (("loss", self.losses), ("smoothed", self.smoothed))
        }
        marks = (
            {}
            if self.suggestion is None
            else {f"suggested: {self.suggestion:.2g}": self.suggestion}
        )
        title = "" if marks else "No rate lowers the loss"
        return plot.curves(series, "learning rate", "loss", title, fmt, logx=True, marks=marks)


def find_lr(
    model: Model,
    data: Any,
    loss: Loss | None = None,
    *,
    params: tree.Params | None = None,
    optimizer: Callable[[Schedule], optax.GradientTransformation] = optax.adam,
    low: float = 1e-6,
    high: float = 1.0,
    steps: int = 100,
    smoothing: float = 0.9,
    diverged: float = 4.0,
    seed: int = 0,
    trainable: tree.Rules | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> RateSearch:
    """Train with a growing rate and find where the loss falls most steeply (Smith, 2017).

    The rate of step i is `low (high / low)^(i / (steps - 1))`. One step is compiled and run on the
    batches 0, 1, 2, ... of the stream. Given params are not changed.

    Args:
      model: the model to be trained.
      data: batches by step, arrays, or other forms that `fit` takes.
      loss: see `jaxmodel.losses`; None chooses by what the batch holds, as in `fit`.
      params: parameters to start from; None for fresh ones from the seed.
      optimizer: a function rate -> optimiser; each optimiser needs its own rate.
      low: the first rate.
      high: the last rate.
      steps: the largest number of updates, at least 8.
      smoothing: the factor of the averages, from 0 to below 1.
      diverged: the search ends when the moving average of the losses exceeds its minimum by this
        factor, or a loss is not finite.
      seed: the seed of the params and of each step's randomness.
      trainable: rules, path -> bool; see `tree.partition`.
      mesh: None for one device.

    Returns:
      See `RateSearch`. The suggestion is where the loss is steepest, so it is on the safe side of
      the largest good rate.

    Raises:
      InputError: the rates do not grow, a setting is out of range, or the mesh does not divide a
        batch.

    >>> from jaxmodel import data
    >>> from jaxmodel.models import mlp
    >>> from jaxmodel.losses import classification
    >>> arrays = {"features": np.eye(4, dtype=np.float32), "labels": np.arange(4)}
    >>> stream = data.Stream(arrays, batch_size=4)
    >>> model = mlp.model(mlp.Config(4, (8,), 4))
    >>> found = find_lr(model, stream, classification, steps=20, low=1e-4, high=0.3)
    >>> bool(found.losses[-1] < found.losses[0]), found.suggestion in found.rates
    (True, True)
    """
    if not 0 < low < high < math.inf:
        raise InputError(f"low, high: {low}, {high} given; allowed: 0 < low < high")
    if not 0 <= smoothing < 1 or not diverged > 1:
        raise InputError(
            f"smoothing, diverged: {smoothing}, {diverged} given; allowed: 0 to below 1, above 1"
        )
    at_least("steps", steps, 8)

    def rate(step: jax.typing.ArrayLike) -> jax.Array:
        return low * jnp.exp(math.log(high / low) / (steps - 1) * jnp.asarray(step, jnp.float32))

    stream = as_batches(data, input_name=next(iter(model.inputs(1, 1))), seed=seed)
    loss = default_loss(model, stream.batch(0)) if loss is None else loss
    config = TrainConfig(seed=seed, trainable=trainable)
    program = Program(model, config, loss=loss, optimizer=optimizer(rate), mesh=mesh)
    losses: list[float] = []
    average = 0.0
    least = math.inf
    state = program.init(params=params)
    placed = ShardedLoader(stream, mesh)
    for i in progress(range(steps), "learning rates"):
        state, metrics = program.step(state, placed.batch(i))
        value = float(metrics["loss"])
        average = smoothing * average + (1 - smoothing) * value
        now = average / (1 - smoothing ** (i + 1))
        least = min(least, now)
        if i and not now <= diverged * abs(least):  # written so that NaN ends the search too
            break
        losses.append(value)
    rates = np.geomspace(low, high, steps)[: len(losses)]
    found = np.asarray(losses)
    smoothed = _smoothed(found, smoothing)
    return RateSearch(rates, found, smoothed, steepest(rates, smoothed))


def steepest(rates: Float[np.ndarray, " N"], losses: Float[np.ndarray, " N"]) -> float | None:
    """Return the rate at which losses fall most steeply over the logarithm of the rate.

    Rates after the minimum are not considered. None if the losses do not fall.

    >>> steepest(np.array([1e-3, 1e-2, 1e-1, 1.0]), np.array([4.0, 3.9, 2.0, 9.0]))
    0.01
    """
    stop = int(np.argmin(losses)) + 1
    if stop < 2:
        return None
    falls = np.diff(losses[:stop]) / np.diff(np.log(rates[:stop]))
    return float(rates[int(np.argmin(falls))])


def _smoothed(losses: np.ndarray, smoothing: float) -> np.ndarray:
    places = np.arange(len(losses))
    weights = smoothing ** np.abs(places[:, None] - places[None, :]).astype(np.float64)
    return weights @ losses / weights.sum(axis=1)
