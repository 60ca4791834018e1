"""`rehearse`: the first step of a run on shapes alone, so that what does not fit is known before anything is read or made."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import jax

from jaxmodel import tree
from jaxmodel.models import Model
from jaxmodel.train.config import TrainConfig, make_optimizer, split_by
from jaxmodel.train.losses import Loss, next_token
from jaxmodel.train.placing import check_rows
from jaxmodel.train.state import init_state, state_shardings
from jaxmodel.train.step import Augment, make_step


def rehearse(
    model: Model,
    config: TrainConfig,
    batch: Mapping[str, Any],
    *,
    params: tree.Params | None = None,
    mesh: jax.sharding.Mesh | None = None,
    loss: Loss = next_token,
    augment: Augment | None = None,
) -> None:
    """Trace a step as `fit` would take it; nothing is computed, compiled or kept.

    Args:
      model: what is to be trained, and so on as for `fit`.
      config: how.
      batch: of a whole batch the arrays, or their shapes and dtypes.
      params: to start from, or their shapes; None for fresh ones.
      mesh: None for one device.
      loss: of the run.
      augment: of the run.

    Raises:
      InputError: what `fit` would refuse in its first step: a mesh that does not divide the rows, the heads or the layers, or
        has an axis that the model does not know, micro-batches that do not divide, an augmentation of other batches.

    >>> from jaxmodel.models import gpt2
    >>> model = gpt2.model(gpt2.SIZES["tiny"])
    >>> tokens = jax.ShapeDtypeStruct((4, 8), "int32")
    >>> try:
    ...     rehearse(model, TrainConfig(accumulate=3), {"tokens": tokens, "targets": tokens})
    ... except ValueError as error:
    ...     print(error)
    accumulate: 3 micro-batches do not divide a batch of 4 rows
    """
    for rows in {a.shape[0] for a in batch.values()}:
        check_rows(rows, mesh)
    optimizer, guard, exchange = make_optimizer(config), config.guard(), config.made_exchange()
    carried: dict[str, Any] = {"average": config.average > 0, "guard": guard, "exchange": exchange}
    options: dict[str, Any] = {name: getattr(config, name) for name in ("trainable", "accumulate", "average", "pipeline")}
    step = make_step(model, loss, optimizer, augment=augment, guard=guard, exchange=exchange, **options)

    def start(key: jax.Array, params: tree.Params | None) -> Any:
        params = split_by(config, model.init(key) if params is None else params)
        return init_state(params, optimizer, config.trainable, **carried)

    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        state = jax.eval_shape(start, jax.random.key(0), params)
        if mesh is not None:
            state_shardings(state, model.rules, mesh)
        jax.eval_shape(step, state, {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in batch.items()})
