"""`TrainState`: everything that a training run carries from step to step."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jaxmodel import axes, sharding, tree
from jaxmodel.brief import brief
from jaxmodel.leaves.leaf import register
from jaxmodel.optim.guard import Guard
from jaxmodel.optim.masters import with_masters
from jaxmodel.optim.quantized import dense
from jaxmodel.report.shown import card
from jaxmodel.report.table import size
from jaxmodel.train.exchange import GradientCompression, residual_shardings


@register
class TrainState:
    """The state of a training run, a pytree; with the seed and the data it determines the rest.

    Attributes:
      step: int32, the number of updates made.
      data_step: int32, the index of the next batch; it is separate from `step`, so that a run can
        skip bad data. The batch begins with row `data_step * batch_size + first_row` of the stream,
        by two int32 of `extra` that `fit` keeps: `batch_size`, and `first_row`, which is 0 unless
        the batch size was changed during the run (see `data.Shifted`).
      params: the whole tree, trained and frozen.
      opt_state: the state of the optimiser, for the part that trains.
      extra: further named pytrees (averages, the best so far).
    """

    step: Any
    data_step: Any
    params: Any
    opt_state: Any
    extra: Any = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"TrainState({', '.join(f'{name} {value}' for name, value in self._facts().items())})"
        )

    def _repr_html_(self) -> str:
        return card("TrainState", self._facts())

    def _facts(self) -> dict[str, Any]:
        """Return facts from shapes alone; for counters, their value if it is available."""
        leaves = tree.flatten(self.params) if isinstance(self.params, dict) else {}
        known = [leaf for leaf in leaves.values() if hasattr(leaf, "shape")]
        facts: dict[str, Any] = {
            name: _number(getattr(self, name)) for name in ("step", "data_step")
        }
        facts["parameters"] = (
            f"{sum(math.prod(leaf.shape) for leaf in known):,} in {len(leaves)} leaves"
        )
        for name in ("params", "opt_state", "extra"):
            facts[f"{name} bytes"] = size(
                sum(a.nbytes for a in jax.tree.leaves(getattr(self, name)) if hasattr(a, "nbytes"))
            )
        return facts


def _number(counter: Any) -> Any:
    """Return a counter, unless its value would have to be waited for."""
    if (
        isinstance(counter, jax.Array)
        and not isinstance(counter, Tracer)
        and not counter.is_deleted()
        and counter.ndim == 0
    ):
        ready: Any = getattr(counter, "is_ready", lambda: True)
        return int(counter) if counter.is_fully_addressable and ready() else brief(counter)
    return brief(counter)


def init_state(
    params: tree.Params,
    optimizer: optax.GradientTransformation,
    trainable: tree.Trains = None,
    *,
    average: bool = False,
    guard: Guard | None = None,
    exchange: GradientCompression | None = None,
) -> TrainState:
    """Make the state before the first step.

    Args:
      params: the parameters; segments are split if rules of `trainable` treat their layers
        differently.
      optimizer: any optax transformation; for weights in 16 bits it keeps float32 copies, see
        `optim.masters`.
      trainable: see `tree.partition`; None for all but the state of a foreign module. For a model
        with other statistics use `axes.trainable(model.axes)`.
      average: whether the state holds a moving average of what trains, for
        `make_step(average=...)`.
      guard: the guard whose memory the state holds; `make_step(guard=...)` must be given the same.
      exchange: the gradient compression whose residual the state holds, for
        `make_step(exchange=...)`; it is made for the mesh in use.
    """
    tree.check(params)
    among = axes.trainable(axes.UNDECLARED) if trainable is None else trainable
    trains, frozen = tree.partition(params, among)
    zero = jnp.zeros((), jnp.int32)
    extra: dict[str, Any] = {}
    if average:
        # in float32, since bfloat16 would lose small steps; in separate buffers, since a step
        # donates both
        extra["average"] = jax.tree.map(lambda a: jnp.array(a, jnp.float32), dense(trains))
    if guard is not None:
        extra["guard"] = guard.init()
    if exchange is not None and (residual := exchange.residual(trains)) is not None:
        extra["residual"] = residual
    return TrainState(
        zero, zero, tree.combine(trains, frozen), with_masters(optimizer).init(dense(trains)), extra
    )


def averaged(state: TrainState) -> tree.Params:
    """Return the parameters to evaluate and to keep.

    They are the moving average (and the frozen parameters) if the state has one, else `params`.
    """
    if "average" not in state.extra:
        return state.params
    return replaced(state.params, state.extra["average"])


def replaced(params: tree.Params, new: tree.Params) -> tree.Params:
    """Replace some leaves of the parameters; new arrays get the dtypes of the old ones."""
    found = tree.flatten(new)

    def one(path: str, old: tree.Leaf) -> tree.Leaf:
        leaf = found.get(path, old)
        return leaf.astype(old.dtype) if isinstance(leaf, jax.Array) else leaf

    return tree.map_leaves(one, params)


def state_shardings(state: TrainState, rules: tree.Rules, mesh: jax.sharding.Mesh) -> TrainState:
    """Return the sharding of each part of a state (of arrays or shape structs).

    Parameters are placed by rules, the optimiser's state like its parameters.
    """
    _, placed = sharding.shardings(rules, state.params, mesh)
    everywhere = jax.sharding.NamedSharding(mesh, jax.P())
    extra = sharding.inherit(
        {name: part for name, part in state.extra.items() if name != "residual"}, placed, mesh
    )
    if "residual" in state.extra:
        extra["residual"] = residual_shardings(state.extra["residual"], placed, mesh)
    return TrainState(
        everywhere,
        everywhere,
        placed,
        sharding.inherit(state.opt_state, placed, mesh),
        extra,
    )
