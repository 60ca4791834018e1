"""`fit`: the loop around a step. Short, to be copied and changed where it does not serve."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmodel import tree
from jaxmodel.data import Batches, prefetch
from jaxmodel.errors import InputError
from jaxmodel.models import Model
from jaxmodel.report import bar
from jaxmodel.sharding import BATCH_AXES
from jaxmodel.train.config import TrainConfig, adamw, split_by
from jaxmodel.train.losses import Loss, next_token
from jaxmodel.train.state import TrainState, init_state, state_shardings
from jaxmodel.train.step import make_step


def fit(
    model: Model,
    stream: Batches,
    config: TrainConfig = TrainConfig(),
    *,
    params: tree.Params | None = None,
    state: TrainState | None = None,
    heldout: Batches | None = None,
    mesh: jax.sharding.Mesh | None = None,
    loss: Loss = next_token,
    optimizer: optax.GradientTransformation | None = None,
    on_log: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Train a model on a stream of batches.

    Args:
      model: what is trained; its `rules` place it on the mesh.
      stream: batches by step.
      config: see `TrainConfig`.
      params: to start from; default fresh ones from the seed.
      state: to go on from, up to `config.steps` updates in all; it stays usable. The result is that of a run without a stop.
      heldout: stream of a held-out loss.
      mesh: None for one device.
      loss: see `jaxmodel.train.losses`.
      optimizer: default `adamw(config)`.
      on_log: called with each row of the history.

    Returns:
      The last state and the history: rows with step, loss, grad_norm, the other metrics of the loss, tokens_per_second
      (rows_per_second where batches have no tokens), seconds, and heldout_loss where one was taken.
    """
    optimizer = optimizer or adamw(config)
    if stream.batch_size % _batch_parts(mesh):
        raise InputError(
            f"batch: {stream.batch_size} rows do not divide over the {_batch_parts(mesh)} devices of {BATCH_AXES} in the mesh"
        )

    def start(key: jax.Array, params: tree.Params | None) -> TrainState:
        params = model.init(key) if params is None else params
        return init_state(split_by(config, params), optimizer, config.trainable)

    key = jax.random.key(config.seed)
    step = make_step(model, loss, optimizer, seed=config.seed, trainable=config.trainable)
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        where = None if mesh is None else state_shardings(jax.eval_shape(start, key, params), model.rules, mesh)
        if state is None:
            current: TrainState = jax.jit(start, out_shardings=where)(key, params)
        else:
            current = jax.device_put(jax.tree.map(jnp.copy, state), where)  # a copy, because the steps donate theirs
        done, next_batch = int(current.step), int(current.data_step)
        run = jax.jit(step, donate_argnums=0, out_shardings=(where, None))
        score = jax.jit(lambda params, batch: loss(model, params, batch, None, train=False)[0])
        history: list[dict[str, Any]] = []
        began = time.perf_counter()
        since, seen = began, 0
        with bar(config.steps - done, "train") as shown:
            for i, batch in enumerate(prefetch(stream, next_batch, next_batch + config.steps - done), start=done + 1):
                current, metrics = run(current, _put(batch, mesh))
                unit = "tokens" if "tokens" in batch else "rows"
                seen += batch["tokens"].size if unit == "tokens" else stream.batch_size
                shown.advance(1)
                due = config.eval_every and i % config.eval_every == 0
                if not (i == done + 1 or i % config.log_every == 0 or i == config.steps or due):
                    continue
                row = {"step": i, **{name: float(value) for name, value in metrics.items()}}
                now = time.perf_counter()
                row |= {f"{unit}_per_second": seen / (now - since), "seconds": now - began}
                if heldout is not None and (i == config.steps or due):
                    batches = (heldout.batch(j) for j in range(config.eval_batches))
                    row["heldout_loss"] = float(np.mean([float(score(current.params, _put(b, mesh))) for b in batches]))
                since, seen = time.perf_counter(), 0
                shown.advance(0, loss=row["loss"], **{f"{unit}_s": round(row[f"{unit}_per_second"])})
                history.append(row)
                if on_log is not None:
                    on_log(row)
    return current, history


def _batch_parts(mesh: jax.sharding.Mesh | None) -> int:
    """Into how many parts the rows of a batch are cut."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES if axis in mesh.shape) if mesh is not None else 1


def _put(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh | None) -> dict[str, jax.Array]:
    if mesh is None:
        return jax.device_put(batch)
    axes = tuple(axis for axis in BATCH_AXES if axis in mesh.shape)
    return jax.device_put(batch, jax.sharding.NamedSharding(mesh, jax.P(axes)))
