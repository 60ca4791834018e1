"""The pure function in `fit`: one training step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmodel import axes, tree
from jaxmodel.data.augment.base import Augment
from jaxmodel.errors import InputError, one_of
from jaxmodel.losses import Loss
from jaxmodel.losses.chosen import checked_loss
from jaxmodel.models import Model
from jaxmodel.optim import quantized
from jaxmodel.optim.guard import Guard
from jaxmodel.optim.masters import with_masters
from jaxmodel.rng import fold
from jaxmodel.train.exchange import GradientCompression
from jaxmodel.train.gradients import GradientFn, Objective, accumulated, value_and_grad
from jaxmodel.train.pipeline import one_forward_one_backward
from jaxmodel.train.state import TrainState

type Step = Callable[[TrainState, Mapping[str, Any]], tuple[TrainState, dict[str, jax.Array]]]

PIPELINES = ("gpipe", "1f1b")


def make_step(
    model: Model,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    seed: int = 0,
    trainable: tree.Trains = None,
    accumulate: int = 1,
    augment: Augment | None = None,
    average: float = 0.0,
    guard: Guard | None = None,
    gradients: Callable[[Objective], GradientFn] = value_and_grad,
    exchange: GradientCompression | None = None,
    pipeline: str = "gpipe",
) -> Step:
    """Make the pure function `step(state, batch) -> (state, metrics)`, to be jitted with donation.

    All randomness of a step is folded from `(seed, data_step)`, so skipping a batch skips its
    randomness too.

    Args:
      model: the model to train.
      loss: see `jaxmodel.losses`. A loss with a keyword `state` also gets the state before the step
        (with the step number and the moving average; see `mean_teacher`), which has no gradient.
      optimizer: any optax transformation, for the part that trains. Its `update` also gets
        `value`, the loss.
      seed: the seed of all randomness of the steps.
      trainable: see `tree.partition`; None for all but the model's statistics.
      accumulate: the number of micro-batches of a batch; see `gradients.accumulated`.
      augment: a function that changes the batch before it is used.
      average: decay d of a moving average of the parameters, `a <- d a + (1 - d) p` with
        `d <- min(d, (1 + i) / (10 + i))` at step i, kept in `state.extra["average"]`
        (`init_state(average=True)`); 0 for none.
      guard: which steps are skipped; the state must be made with the same, `init_state(guard=...)`.
        None to skip none.
      gradients: a function that makes the gradient function of the objective.
      exchange: gradient compression over the data axis, once per step; with error feedback it needs
        a state made for it, `init_state(exchange=...)`.
      pipeline: the schedule on a mesh with stages, "gpipe" (the model's own) or "1f1b" (see
        `train.pipeline`; it replaces `gradients`).

    Returns:
      The step. Its metrics, float32 scalars, are those of the loss, `loss`, `grad_norm` and, with a
      guard, `bad` (1 for a skipped step).

    Raises:
      InputError: the pipeline is unknown; when called, the state was made with other parts than
        these (see `init_state`).
    """
    one_of("pipeline", pipeline, PIPELINES)
    check_optimizer(optimizer)
    update = with_masters(optimizer).update
    loss = checked_loss(loss)
    among = axes.trainable(model.axes) if trainable is None else trainable
    needs_state = "state" in inspect.signature(loss).parameters

    def step(
        state: TrainState, batch: Mapping[str, Any]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        _check_halves(state, average, guard, exchange)
        rng = jax.random.fold_in(jax.random.key(seed), state.data_step)
        batch = dict(batch) if augment is None else augment(fold(rng, "augment"), dict(batch))
        trains, frozen = tree.partition(state.params, among)

        def objective(
            trains: tree.Params, batch: Mapping[str, Any], rng: jax.Array
        ) -> tuple[jax.Array, dict[str, jax.Array]]:
            more: Any = {"state": state} if needs_state else {}
            return loss(model, tree.combine(trains, frozen), batch, rng, **more)

        plain = (
            gradients(objective)
            if pipeline == "gpipe"
            else one_forward_one_backward(model, loss, frozen)
        )
        extra = dict(state.extra)
        run = accumulated(plain, accumulate)
        if exchange is None:
            (value, metrics), grads = run(trains, batch, rng)
        else:
            ((value, metrics), grads), residual = exchange(run, model.rules)(
                trains, batch, rng, extra.get("residual")
            )
            extra |= {} if residual is None else {"residual": residual}
        norm = optax.tree.norm(optax.tree.cast(grads, jnp.float32))
        updates, opt_state = update(grads, state.opt_state, quantized.dense(trains), value=value)
        # A barrier for each leaf, so that adding updates rounds the same whatever follows: a good
        # step with a guard equals one without, bit for bit.
        updates = jax.tree.map(jax.lax.optimization_barrier, updates)
        trained: Any = quantized.apply_updates(trains, updates, fold(rng, "round"))
        metrics = {**metrics, "loss": value, "grad_norm": norm}
        if "average" in extra:
            # skipped steps do not count
            taken = extra["guard"]["good"] if "guard" in extra else state.step
            extra["average"] = moving_average(
                extra["average"], quantized.dense(trained), average, taken
            )
        if guard is not None:
            ok, extra["guard"] = guard.judge(extra["guard"], value, norm)
            kept = {name: extra[name] for name in extra if name != "guard"}
            old = (trains, state.opt_state, {name: state.extra[name] for name in kept})
            trained, opt_state, kept = optax.tree.where(ok, (trained, opt_state, kept), old)
            extra |= kept
            metrics["bad"] = 1 - ok.astype(jnp.float32)
        one = jnp.int32(1)
        return TrainState(
            state.step + one, state.data_step + one, tree.combine(trained, frozen), opt_state, extra
        ), metrics

    return step


def check_optimizer(optimizer: Any) -> None:
    """Refuse an optimiser that is not a transformation of optax; None is the default of `fit`.

    Raises:
      InputError: it is none; the message says how to choose one by name.
    """
    if optimizer is not None and not hasattr(optimizer, "update"):
        allowed = "an optax transformation; to choose one by name, use TrainConfig(optimizer=...)"
        raise InputError(f"optimizer: {optimizer!r:.60} given; allowed: {allowed}")


def _check_halves(
    state: TrainState, average: float, guard: Guard | None, exchange: GradientCompression | None
) -> None:
    """Refuse a part that only the step or only the state knows, which would do nothing or harm."""
    made = {"average": average > 0, "guard": guard is not None}
    for name, wanted in made.items():
        if wanted != (name in state.extra):
            told = f"make_step({name}=...)", f"init_state({name}=...)"
            has, lacks = told if wanted else reversed(told)
            raise InputError(
                f"{name}: given to {has.partition('(')[0]} only; allowed: both {has} and {lacks}, "
                "or neither"
            )
    if guard is not None:
        kept = jax.eval_shape(guard.init)
        memory = state.extra["guard"]
        if jax.tree.map(jnp.shape, memory) != jax.tree.map(jnp.shape, kept):
            raise InputError(
                f"guard: {guard} given for a state that was made with another; allowed: the same "
                f"in both"
            )
    if "residual" in state.extra and (exchange is None or exchange.kind != "top_k"):
        raise InputError(
            "exchange: the state has a residual, made by init_state(exchange=...); allowed: the "
            "same in make_step"
        )


def moving_average(average: Any, new: Any, decay: float, step: jax.Array) -> Any:
    """Return `d a + (1 - d) p` for every leaf, with `d = min(decay, (1 + step) / (10 + step))`.

    So the first steps are soon forgotten.
    """
    i = step.astype(jnp.float32)
    d = jnp.minimum(jnp.float32(decay), (1 + i) / (10 + i))
    return jax.tree.map(
        lambda a, p: (a + (1 - d) * (p.astype(jnp.float32) - a)).astype(a.dtype), average, new
    )
