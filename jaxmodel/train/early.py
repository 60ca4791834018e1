"""Early stopping (Prechelt, 1998).

The best parameters so far are kept in `state.extra["best"]`, also over restarts.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmodel import tree
from jaxmodel.train.state import TrainState, replaced


def init(state: TrainState, trainable: tree.Trains = None) -> TrainState:
    """Return the state with a record of the best evaluation.

    It holds the held-out loss, the parameters that train, and the number of evaluations since.
    """
    trains = (
        state.extra["average"]
        if "average" in state.extra
        else tree.partition(state.params, trainable)[0]
    )
    best = {
        "loss": jnp.float32(jnp.inf),
        "since": jnp.int32(0),
        "params": jax.tree.map(jnp.copy, trains),
    }
    return dataclasses.replace(state, extra={**state.extra, "best": best})


@functools.partial(jax.jit, donate_argnums=0)
def update(state: TrainState, loss: Any) -> TrainState:
    """Return the state after an evaluation; a loss that is not finite is never better."""
    memory = state.extra["best"]
    loss = jnp.asarray(loss, jnp.float32)
    better = loss < memory["loss"]
    now = tree.flatten(state.extra.get("average", state.params))
    params = tree.map_leaves(
        lambda path, old: optax.tree.where(better, now[path], old), memory["params"]
    )
    best = {
        "loss": jnp.where(better, loss, memory["loss"]),
        "since": jnp.where(better, jnp.int32(0), memory["since"] + jnp.int32(1)),
        "params": params,
    }
    return dataclasses.replace(state, extra={**state.extra, "best": best})


def over(state: TrainState, patience: int) -> bool:
    """Return whether the last `patience` evaluations were no better."""
    return int(state.extra["best"]["since"]) >= patience


def best(state: TrainState) -> TrainState:
    """Return the state with its best parameters, if there was an evaluation."""
    memory = state.extra["best"]
    if not jnp.isfinite(memory["loss"]):
        return state
    average = {"average": memory["params"]} if "average" in state.extra else {}
    return dataclasses.replace(
        state, params=replaced(state.params, memory["params"]), extra={**state.extra, **average}
    )
