"""The position of a run in its data, counted in rows, whatever the size of its batches."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxmodel.data import Batches, Shifted
from jaxmodel.errors import InputError
from jaxmodel.train.state import TrainState

BATCH_SIZE, FIRST_ROW = "batch_size", "first_row"
"""In `TrainState.extra`: the rows of a batch (0 before a loop has begun), and the row at which the
batch of `data_step` 0 would begin, which is not 0 behind a change of the batch size.
"""


def next_row(state: TrainState) -> int:
    """Return how many rows a run has taken from its data: the number of the next one."""
    first = int(state.extra.get(FIRST_ROW, 0))
    return int(state.data_step) * int(state.extra[BATCH_SIZE]) + first


def at_row(state: TrainState, batch_size: int) -> TrainState:
    """Return the state with the position of its data in batches of `batch_size`.

    The next row stays the next: the batch of `data_step` s holds the rows from
    `s * batch_size + first_row` on, with `first_row` below the batch size.
    """
    then = int(state.extra[BATCH_SIZE])
    if then == batch_size:
        return state
    row = next_row(state) if then else int(state.data_step) * batch_size  # 0: no loop has begun yet
    data_step, first = divmod(row, batch_size)
    extra = dict(state.extra)
    for name, value in ((BATCH_SIZE, batch_size), (FIRST_ROW, first)):
        extra[name] = jax.device_put(jnp.int32(value), extra[name].sharding)
    step = jax.device_put(jnp.int32(data_step), state.data_step.sharding)
    return dataclasses.replace(state, data_step=step, extra=extra)


def check_size(state: TrainState, batch_size: int) -> None:
    """Refuse a batch size at which `data_step` alone no longer says where a state stands.

    Raises:
      InputError: the rows that were taken are not a whole number of such batches.
    """
    then = int(state.extra.get(BATCH_SIZE, 0))
    if then and then != batch_size and (row := next_row(state)) % batch_size:
        raise InputError(
            f"batch_size: {batch_size} given for a state that has taken {row} rows in batches of "
            f"{then}; allowed: a divisor of {row}; or a state from "
            f"train.position.at_row(state, {batch_size}), which counts from that row on"
        )


def counted_as(state: TrainState, other: TrainState) -> TrainState:
    """Return the state with the batches of another one of the same run, at its position."""
    place = {name: other.extra[name] for name in (BATCH_SIZE, FIRST_ROW)}
    extra = {
        name: jax.device_put(jnp.copy(place[name]), a.sharding) if name in place else a
        for name, a in state.extra.items()
    }
    return dataclasses.replace(state, extra=extra)


def from_here(stream: Batches, state: TrainState) -> Batches:
    """Return batches whose number `state.data_step` begins with the run's next row."""
    first = int(state.extra[FIRST_ROW])
    return Shifted(stream, first) if first else stream
