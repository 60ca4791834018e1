"""The pure function under `fit`: one step of training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmodel import tree
from jaxmodel.models import Model
from jaxmodel.train.losses import Loss
from jaxmodel.train.state import TrainState

type Step = Callable[[TrainState, Mapping[str, Any]], tuple[TrainState, dict[str, jax.Array]]]


def make_step(
    model: Model, loss: Loss, optimizer: optax.GradientTransformation, *, seed: int = 0, trainable: tree.Rules | None = None
) -> Step:
    """`step(state, batch) -> (state, metrics)`: pure, to be jitted with the state donated.

    Args:
      model: what is trained.
      loss: see `jaxmodel.train.losses`.
      optimizer: any optax transformation, over the part that trains.
      seed: the randomness of step `i` is `fold_in(key(seed), i)`.
      trainable: rules, path -> bool; see `tree.partition`.

    Returns:
      The step. Its metrics are those of the loss, with `loss` and `grad_norm`.
    """

    def step(state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        trains, frozen = tree.partition(state.params, trainable)

        def objective(trains: tree.Params) -> tuple[jax.Array, dict[str, jax.Array]]:
            return loss(model, tree.combine(trains, frozen), batch, rng)

        (value, metrics), grads = jax.value_and_grad(objective, has_aux=True)(trains)
        updates, opt_state = optimizer.update(grads, state.opt_state, trains)
        new = dataclasses.replace(
            state,
            step=state.step + jnp.int32(1),
            data_step=state.data_step + jnp.int32(1),
            params=tree.combine(optax.apply_updates(trains, updates), frozen),  # pyright: ignore[reportArgumentType]
            opt_state=opt_state,
        )
        return new, {**metrics, "loss": value, "grad_norm": optax.tree.norm(grads)}

    return step
