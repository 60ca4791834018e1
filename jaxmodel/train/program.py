"""`Program`: what a training run computes, built once and used by every caller.

    program = Program(model, TrainConfig(steps=100), loss=next_token)
    state = program.init()
    for i in range(100):
        state, metrics = program.step(state, program.place(stream.batch(i)))

A guard, a moving average or gradient compression has a part in the state and a part in the step.
Both are made from one record here, so neither can lack what the other has. `fit`, `find_lr` and the
planning of a step are callers like any other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmodel import axes, sharding, tree
from jaxmodel.errors import InputError
from jaxmodel.losses import Loss
from jaxmodel.losses.chosen import checked_loss
from jaxmodel.models import Model, check_params
from jaxmodel.ops.product import compiler_options
from jaxmodel.train import early, placing
from jaxmodel.train.config import TrainConfig, make_optimizer, split_by
from jaxmodel.train.gradients import GradientFn, Objective, value_and_grad
from jaxmodel.train.identity import run_identity
from jaxmodel.train.position import BATCH_SIZE, FIRST_ROW
from jaxmodel.train.state import TrainState, init_state, state_shardings
from jaxmodel.train.step import Augment, Step, check_optimizer, make_step


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A model, and how it is trained.

    Attributes:
      model: the model to train.
      config: see `TrainConfig`.
      loss: see `jaxmodel.losses`.
      optimizer: an optax transformation over what trains; None for the one that the config
        describes.
      mesh: None for one device.
      augment: `(key, batch) -> batch`, in training; see `jaxmodel.data.augment`.
      gradients: a function that makes the gradient function of the objective.

    Raises:
      InputError: the model, the loss or the optimiser has the wrong type.
    """

    model: Model
    config: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    _: dataclasses.KW_ONLY
    loss: Loss
    optimizer: optax.GradientTransformation | None = None
    mesh: jax.sharding.Mesh | None = None
    augment: Augment | None = None
    gradients: Callable[[Objective], GradientFn] = value_and_grad

    def __post_init__(self) -> None:
        if not isinstance(self.model, Model):
            raise InputError(
                f"model: {type(self.model).__name__} given; allowed: a Model, such as bundle.model"
            )
        checked_loss(self.loss)
        check_optimizer(self.optimizer)

    # ------------------------------------------------------------------------------- pure functions

    def start(self, key: jax.Array, params: tree.Params | None = None) -> TrainState:
        """Make the state before the first step.

        It is pure, so it can be mapped over keys or traced for its shapes.

        Args:
          key: the random key of fresh parameters.
          params: parameters to start from instead.
        """
        c = self.config
        params = split_by(c, self.model.init(key) if params is None else params)
        memories: dict[str, Any] = {
            "average": c.ema_decay > 0,
            "guard": c.guard(),
            "exchange": c.made_exchange(),
        }
        state = init_state(params, self._optimizer, self.trainable, **memories)
        state.extra.update({name: jnp.int32(0) for name in (BATCH_SIZE, FIRST_ROW)})
        return early.init(state, self.trainable) if c.patience else state

    @functools.cached_property
    def update(self) -> Step:
        """The pure step `(state, batch) -> (state, metrics)`."""
        c = self.config
        options: dict[str, Any] = {
            "seed": c.seed,
            "accumulate": c.gradient_accumulation_steps,
            "average": c.ema_decay,
            "pipeline": c.pipeline,
            "trainable": self.trainable,
            "guard": c.guard(),
            "exchange": c.made_exchange(),
            "augment": self.augment,
            "gradients": self.gradients,
        }
        return make_step(self.model, self.loss, self._optimizer, **options)

    # -------------------------------------------------------------------------- compiled and placed

    def init(self, key: jax.Array | None = None, params: tree.Params | None = None) -> TrainState:
        """Make the state before the first step, on the mesh.

        Args:
          key: the random key of fresh parameters; None for that of `config.seed`.
          params: parameters to start from, which stay usable.
        """
        if params is not None:
            check_params(self.model, params)
        key = jax.random.key(self.config.seed) if key is None else key
        with self.on_mesh():
            if params is not None and self.mesh is not None:
                params = sharding.place(self.model.rules, params, self.mesh)
            places = jax.tree.map(lambda a: a.sharding, self.shapes(params))
            return jax.jit(self._start, out_shardings=places)(key, params)

    def step(
        self, state: TrainState, batch: Mapping[str, Any]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Make one step; the given state is donated and cannot be used again.

        Returns:
          The next state, and float32 scalars: the metrics of the loss, `loss`, `grad_norm` and
          `bad` (1 for a skipped step).
        """
        with self.on_mesh():
            return self._compiled_for(state)(state, batch)

    def place(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Place a batch on the mesh, rows over its batch axes.

        With several processes, each takes its rows of the whole batch.

        Raises:
          InputError: rows that do not divide over the mesh.
        """
        rows = len(next(iter(batch.values())))
        placing.check_rows(rows, self.mesh)
        if self.mesh is None:
            return dict(batch)
        where = placing.rows_sharding(self.mesh)
        if jax.process_count() == 1:
            return jax.device_put(dict(batch), where)
        whole = lambda a: jax.make_array_from_callback(
            a.shape, where, lambda index: np.asarray(a[index])
        )
        return {name: whole(np.asarray(a)) for name, a in batch.items()}

    def compile(
        self, batch: Mapping[str, Any], params: tree.Params | None = None
    ) -> jax.stages.Compiled:
        """Compile the step for a mesh whose devices need not be here, without any of its arrays.

        Args:
          batch: shapes of a whole batch, or a batch, rows first.
          params: shapes of other parameters than `model.init` makes.

        Raises:
          InputError: a mesh that does not fit the model or does not divide the rows.
        """
        self._check_rows(batch)
        where = None if self.mesh is None else placing.rows_sharding(self.mesh)
        state = self.shapes(params)
        given = {
            name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)
            for name, a in batch.items()
        }
        with self.on_mesh():
            return self._jitted(state).lower(state, given).compile()

    def rehearse(self, batch: Mapping[str, Any], params: tree.Params | None = None) -> None:
        """Trace a step on shapes alone, to find misfits before anything is read, made or compiled.

        Args:
          batch: of a whole batch the arrays, or their shapes and dtypes.
          params: to start from, or their shapes; None for fresh ones.

        Raises:
          InputError: a mesh that does not divide the rows, the heads or the layers, or has an axis
            that the model does not know; micro-batches that do not divide, an augmentation of other
            batches.

        >>> from jaxmodel.models import gpt2
        >>> from jaxmodel.losses import next_token
        >>> config = TrainConfig(gradient_accumulation_steps=3)
        >>> program = Program(gpt2.model(gpt2.SIZES["tiny"]), config, loss=next_token)
        >>> tokens = jax.ShapeDtypeStruct((4, 8), "int32")
        >>> try:
        ...     program.rehearse({"tokens": tokens, "targets": tokens})
        ... except ValueError as error:
        ...     print(error)
        accumulate: 3 micro-batches do not divide a batch of 4 rows
        """
        self._check_rows(batch)
        state = self.shapes(params)
        given = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in batch.items()}
        with self.on_mesh():
            jax.eval_shape(self.update, state, given)

    def shapes(self, params: tree.Params | None = None) -> TrainState:
        """Return the state as `jax.ShapeDtypeStruct`s with their shardings."""
        key = jax.random.key(0)  # made on a local device
        with self.on_mesh():
            shapes = jax.eval_shape(self._start, key, params)
        if self.mesh is None:
            one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            places = jax.tree.map(lambda _: one, shapes)
        else:
            places = state_shardings(shapes, self.model.rules, self.mesh)
        return jax.tree.map(
            lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), shapes, places
        )

    def on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which the program's mesh is in use."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    # ----------------------------------------------------------------------------------- what it is

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """The plain values that determine a run, besides its data and its start."""
        named: dict[str, Any] = {
            "loss": self.loss,
            "optimizer": self.optimizer,
            "augment": self.augment,
        }
        named |= {} if self.gradients is value_and_grad else {"gradients": self.gradients}
        return run_identity(self.model, self.config, **named)

    @property
    def environment(self) -> dict[str, Any]:
        """The environment of a run's bits: mesh, processes, devices, processors, jaxlib."""
        return placing.environment(self.mesh)

    @functools.cached_property
    def trainable(self) -> tree.Trains:
        """The rules of which leaves train: the config's, or all but the model's statistics."""
        rules = self.config.trainable
        return axes.trainable(self.model.axes) if rules is None else rules

    # --------------------------------------------------------------------------------------- inside

    @functools.cached_property
    def _start(self) -> Callable[..., TrainState]:
        """The method `start` as one object for all calls.

        A method that is looked up anew each time would be traced anew by JAX.
        """
        return self.start

    @functools.cached_property
    def _optimizer(self) -> optax.GradientTransformation:
        return (
            make_optimizer(self.config, self.model.axes)
            if self.optimizer is None
            else self.optimizer
        )

    def _check_rows(self, batch: Mapping[str, Any]) -> None:
        for rows in {a.shape[0] for a in batch.values()}:
            placing.check_rows(rows, self.mesh)

    @functools.cached_property
    def _steps(self) -> dict[Any, Any]:
        return {}

    def _compiled_for(self, state: TrainState) -> Any:
        """Return the jitted step for states of this structure.

        Its shardings are those of the first state with the structure.
        """
        structure = jax.tree.structure(state)
        if structure not in self._steps:
            self._steps[structure] = self._jitted(state)
        return self._steps[structure]

    def _jitted(self, state: TrainState) -> Any:
        places = jax.tree.map(lambda a: a.sharding, state)
        here = self.mesh is None or self.mesh.devices.flat[0].platform == jax.default_backend()
        kernels = compiler_options(self.model.policy.compute_dtype) if here else None
        return jax.jit(
            self.update, donate_argnums=0, out_shardings=(places, None), compiler_options=kernels
        )
