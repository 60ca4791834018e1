"""A training step compiled for a mesh whose devices need not be here, and without any of its arrays."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import optax

from jaxmodel import sharding, train
from jaxmodel.models import Model
from jaxmodel.train.placing import check_rows


def compile_step(
    model: Model,
    loss: train.Loss,
    optimizer: optax.GradientTransformation,
    batch: Mapping[str, jax.ShapeDtypeStruct],
    mesh: jax.sharding.Mesh,
    exchange: train.Exchange | None = None,
) -> jax.stages.Compiled:
    """The program of `train.make_step` as `fit` runs it: the state placed by the model's rules and donated.

    Args:
      model: what is trained.
      loss: see `jaxmodel.train.losses`.
      optimizer: any optax transformation.
      batch: shapes of a whole batch, rows first.
      mesh: of any devices, those of `topology` too.
      exchange: see `train.make_step`.

    Raises:
      InputError: a mesh that does not fit the model or does not divide the rows.
    """
    for count in {a.shape[0] for a in batch.values()}:
        check_rows(count, mesh)
    start = lambda key: train.init_state(model.init(key), optimizer, exchange=exchange)
    rows = jax.NamedSharding(mesh, jax.P(tuple(name for name in sharding.BATCH_AXES if name in mesh.shape)))
    placed = lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place)
    step, key = train.make_step(model, loss, optimizer, exchange=exchange), jax.random.key(0)  # made on a device that is here
    with jax.set_mesh(mesh):  # the memory of an exchange has a row for each of its devices
        state = jax.eval_shape(start, key)
        places = train.state_shardings(state, model.rules, mesh)
        run = jax.jit(step, donate_argnums=0, out_shardings=(places, None))
        return run.lower(jax.tree.map(placed, state, places), {name: placed(a, rows) for name, a in batch.items()}).compile()
