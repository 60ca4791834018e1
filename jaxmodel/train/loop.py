"""`fit`: the loop around a step. Short, to be copied and changed where it does not serve."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmodel import ops, sharding, tree
from jaxmodel.data import Batches, as_batches, prefetch
from jaxmodel.data.given import Passed, listed
from jaxmodel.data.image_folder import same_classes
from jaxmodel.errors import InputError
from jaxmodel.hub import Bundle
from jaxmodel.models import Model
from jaxmodel.report import bar
from jaxmodel.train import early, flops, memory, statistics
from jaxmodel.train.checkpoint import Checkpoints, flat
from jaxmodel.train.config import TrainConfig, make_optimizer, rate_of, schedule_of, split_by
from jaxmodel.train.evaluation import Scorer
from jaxmodel.train.gradients import GradientFn, Objective, value_and_grad
from jaxmodel.train.identity import run_identity
from jaxmodel.train.losses import Loss, checked_loss, default_loss
from jaxmodel.train.meter import Meter
from jaxmodel.train.placing import Placed, check_batch, environment, explain
from jaxmodel.train.rewind import BadSteps
from jaxmodel.train.state import TrainState, averaged, init_state, state_shardings
from jaxmodel.train.step import Augment, check_optimizer, make_step
from jaxmodel.train.supervise import Supervisor

AHEAD = 2
"""Steps that may wait on the devices: more would only hold batches, fewer would let the devices wait for the host."""

type Row = dict[str, Any]


def fit(
    model: Model | Bundle,
    data: Any,
    config: TrainConfig = TrainConfig(),
    callbacks: Sequence[Callable[[Row], None]] = (),
    *,
    params: tree.Params | None = None,
    state: TrainState | None = None,
    heldout: Any = None,
    batch_size: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    loss: Loss | None = None,
    optimizer: optax.GradientTransformation | None = None,
    augment: Augment | None = None,
    gradients: Callable[[Objective], GradientFn] = value_and_grad,
    checkpoints: Checkpoints | str | os.PathLike[str] | None = None,
    supervisor: Supervisor | None = None,
) -> tuple[TrainState, list[Row]]:
    """Train a model on data.

    Args:
      model: what is trained; its `rules` place it on the mesh. Of a bundle its model, from its parameters on.
      data: batches by step, such as a `data.Stream`; or a dict of arrays `[N, ...]`, a pair `(x, y)` of them, rows such as a
        `data.ImageFolder`, a list of batches, an iterable of them such as a DataLoader (which cannot be wound to where a run was
        broken, so it takes no checkpoints); see `data.given.as_batches`.
      config: see `TrainConfig`.
      callbacks: each is called with every row of the history.
      params: to start from; default fresh ones from the seed.
      state: to go on from, up to `config.steps` steps in all; it stays usable. The result is that of a run without a stop.
      heldout: the data of the held-out loss, likewise. Of data with a `count`, such as a `Stream`, each row is judged once, or
        the first `config.eval_rows`; of data without an end the first `config.eval_batches` batches.
      batch_size: rows in a batch of arrays; None for 32. A stream has its own.
      mesh: None for one device.
      loss: see `jaxmodel.train.losses`; a function of yours may return the mean over the rows alone. None for what the batch
        holds: `classification` of `labels`, `next_token` of `targets` that are whole numbers, `regression()` of others.
      optimizer: default `make_optimizer(config)`.
      augment: changes batches in training, see `jaxmodel.data.augment`.
      gradients: see `make_step`.
      checkpoints: where states are saved, as the config says, and from where a run that was broken goes on: a folder, a place
        such as gs:// or s3://, or `Checkpoints` with settings. They are of this run alone: its config, loss, optimiser and data
        and the params that were given are written down with them, and another run that is started there is refused, with what
        differs.
      supervisor: see `Supervisor`; where it stops the run, the state is saved and returned as it is.

    Returns:
      The last state (with early stopping: with its best parameters) and the history of the whole run, also of the part before a
      restart from checkpoints: rows with step, data_step (the number of its batch), loss, grad_norm, learning_rate, the other
      metrics of the loss, tokens_per_second and mfu (rows_per_second where batches have no tokens), data_wait (the share of time
      spent waiting for data), bad (steps left out since the row before), seconds, and where they were taken heldout_loss and the
      held-out metrics. The statistics of batch norms, those of a Flax module too, are measured on the first 1,024 rows of the
      stream before each held-out loss and at the end, at the cost of their forward pass (see `set_batch_statistics`); where
      there is a moving average they are those of its weights.

    Raises:
      InputError: a batch or parameters that the mesh does not divide; tokens, targets or labels that the model has not, in
        whatever batch; held-out images of other classes; data or a loss that are no such; a state or a checkpoint of another
        config, a checkpoint of other data; bad steps, as `config.bad` says.
    """
    if isinstance(model, Bundle):
        model, params = model.model, model.params if params is None else params
    if not isinstance(model, Model):
        raise InputError(
            f"model: {type(model).__name__} given; allowed: a Model, a Bundle; models.from_linen makes one of a Flax module"
        )
    check_optimizer(optimizer)
    stream, heldout = _given(model, data, heldout, config, batch_size)
    if isinstance(stream, Passed):
        _check_passed(stream, checkpoints is not None, state)
    loss = default_loss(model, stream.batch(0)) if loss is None else loss
    checked_loss(loss)
    if config.patience and heldout is None:
        raise InputError(f"patience: {config.patience} given without held-out batches to be judged by")
    config.check_patience()
    same_classes(stream, heldout)
    if config.bad == "rewind" and checkpoints is None:
        raise InputError("bad: 'rewind' given without checkpoints to go back to")
    named = {"loss": loss, "optimizer": optimizer, "augment": augment}
    named |= {} if gradients is value_and_grad else {"gradients": gradients}
    identity = run_identity(model, config, stream.batch_size, **named)
    identity |= {"heldout": heldout.fingerprint} if heldout is not None and config.patience else {}
    if (
        checkpoints is not None
        and params is not None
        and all(getattr(a, "is_fully_addressable", True) for a in jax.tree.leaves(params))
    ):
        identity["params"] = tree.fingerprint(params)
    rate = schedule_of(config) if optimizer is None else None
    optimizer = optimizer or make_optimizer(config)
    supervisor = supervisor or Supervisor()
    placed, guard, exchange = Placed(stream, mesh), config.guard(), config.made_exchange()

    def start(key: jax.Array, params: tree.Params | None) -> TrainState:
        params = split_by(config, model.init(key) if params is None else params)
        carried: dict[str, Any] = {"average": config.average > 0, "guard": guard, "exchange": exchange}
        made = init_state(params, optimizer, config.trainable, **carried)
        made.extra["batch_size"] = jnp.int32(stream.batch_size)
        return early.init(made, config.trainable) if config.patience else made

    key, most = jax.random.key(config.seed), flops.peak(model.policy.compute)
    options: dict[str, Any] = {name: getattr(config, name) for name in ("seed", "trainable", "average", "pipeline")}
    options |= {"augment": augment, "guard": guard, "gradients": gradients, "exchange": exchange}

    def jitted(model: Model, accumulate: int) -> Any:
        step = make_step(model, loss, optimizer, accumulate=accumulate, **options)
        kernels = ops.compiler_options(model.policy.compute)
        return jax.jit(step, donate_argnums=0, out_shardings=(where, None), compiler_options=kernels)

    def compiled(accumulate: int, remat: str) -> Any:
        other = model.with_policy(dataclasses.replace(model.policy, remat=remat))
        return jitted(other, accumulate).lower(like, jax.tree.map(_shape, batch)).compile()

    with contextlib.ExitStack() as opened, jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        if checkpoints is not None and not isinstance(checkpoints, Checkpoints):
            checkpoints = Checkpoints(checkpoints)
            opened.callback(checkpoints.close, raises=False)  # it has said what it could not save
        if checkpoints is not None:
            checkpoints.state_run(identity, stream.fingerprint, environment(mesh))
        like = _shapes(jax.eval_shape(start, key, params), model.rules, mesh)
        where = jax.tree.map(lambda a: a.sharding, like)
        current = None if checkpoints is None else checkpoints.restore(like)
        history: list[Row] = []
        restored = current is not None
        if current is not None:
            assert checkpoints is not None
            history = checkpoints.history(int(current.step))
            supervisor.ledger.restored(int(current.step))
        elif state is None:
            params = params if params is None or mesh is None else sharding.place(model.rules, params, mesh)
            current = jax.jit(start, out_shardings=where)(key, params)
        else:
            current = _going_on(state, like, lambda params: start(key, params).extra)
        current = _at_row(current, stream.batch_size)
        if not jax.tree.leaves(tree.partition(current.params, config.trainable)[0]):
            raise InputError("trainable: nothing trains")
        if config.steps < int(current.step):
            raise InputError(f"steps: {config.steps} given; {int(current.step)} were made already")
        run, batch = jitted(model, config.accumulate), {}
        judge = config.eval_batches, config.eval_rows
        scorer = None if heldout is None else Scorer(model, loss, heldout, mesh, *judge)
        settled = statistics.of_run(model, loss, stream, mesh, current.params)
        meter = Meter(model, current.params, most, config.trainable)
        i, feed = int(current.step), _feed(placed, current, config)
        unread = collections.deque[tuple[int, Any]]()  # steps that were begun and whose metrics nobody looked at
        answer = BadSteps(config.bad)
        stop, over = False, bool(config.patience) and early.over(current, config.patience)
        if restored and jax.process_index() == 0:
            then = "the run has ended there; nothing is left to train" if over or i == config.steps else "going on"
            print(f"jaxmodel: step {i} of {config.steps} is restored; {then}", file=sys.stderr, flush=True)
        with bar(config.steps, "train", done=i, unit="step", first="compiling") as shown:
            while i < config.steps and not stop and not over:
                with supervisor.spend("data", i), meter.waits():
                    batch = next(feed, None)
                if batch is None:
                    print(
                        f"jaxmodel: data: ended after {i} of {config.steps} steps; the run stops there",
                        file=sys.stderr,
                        flush=True,
                    )
                    current = settled(current)
                    break
                if not meter.steps:
                    check_batch(model, current.params, batch)
                rows = stream.batch_size // placed.parts
                full = memory.explained(compiled, config.accumulate, rows, model.policy.remat)
                with supervisor.spend("compute" if meter.steps else "compile", i), full:
                    current, metrics = run(current, batch)
                    unread.append((i, metrics))
                    meter.count(batch)
                    i += 1
                    due, stop = config.due(i), supervisor.stop(i)
                    bad = _read(unread, 0 if due or stop else AHEAD)
                    meter.bad(len(bad))
                    for number in bad:
                        explain(model, stream, int(current.data_step) - (i - number))
                    back = answer.rewind_to(bad, i, checkpoints)
                if back is not None:
                    assert checkpoints is not None
                    with supervisor.spend("checkpoint", i):
                        current, i, stop = answer.rewind(current, i, back, checkpoints.restore(like, at_most=back)), back, False
                    history[:] = [row for row in history if row["step"] <= i]
                    feed = _feed(placed, current, config)
                    unread.clear()
                    continue
                shown.advance(i - shown.done)
                supervisor.ledger.at(i)
                score = None
                if "heldout" in due and (scorer is not None or i == config.steps):
                    with supervisor.spend("evaluate", i):
                        current = settled(current)
                if "row" in due:
                    used = None if rate is None else rate_of(rate, current.opt_state, bool(metrics["bad"]))
                    row = {"step": i, "data_step": int(current.data_step) - 1, **meter.row(metrics, used)}
                    if scorer is not None and "heldout" in due:
                        with supervisor.spend("evaluate", i):
                            row |= scorer(averaged(current))
                            score = row["heldout_loss"]
                            if config.patience:
                                current = early.update(current, score)
                                over = early.over(current, config.patience)
                    shown.advance(0, **meter.shown(row))
                    if not history and row["grad_norm"] == 0:  # adapters that the model does not know?
                        print("jaxmodel: the gradient is zero: what trains has no part in the loss", file=sys.stderr, flush=True)
                    history.append(row)
                    for callback in callbacks:
                        callback(row)
                if checkpoints is not None and (stop or "save" in due or checkpoints.late(config.save_seconds, "row" in due)):
                    with supervisor.spend("checkpoint", i):
                        checkpoints.save(current, score=score, history=history)
                        supervisor.ledger.at(i, saved=True)
        if checkpoints is not None:
            with supervisor.spend("checkpoint", i):
                checkpoints.save(current, history=history)  # nothing where it is there already
                supervisor.ledger.at(i, saved=True)
                checkpoints.wait(raises=False)  # what was trained is not lost with it: `close` raises
        if config.patience and not stop:
            current = settled(early.best(current))
    return current, history


def _shapes(shapes: TrainState, rules: tree.Rules, mesh: jax.sharding.Mesh | None) -> TrainState:
    """The state as shape structs with the places of its arrays."""
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    where = jax.tree.map(lambda _: one, shapes) if mesh is None else state_shardings(shapes, rules, mesh)
    return jax.tree.map(lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), shapes, where)


def _going_on(state: TrainState, like: TrainState, extra: Callable[[tree.Params], dict[str, Any]]) -> TrainState:
    """A copy of the state, since steps donate theirs, in the places of `like`, with what it has not yet of `extra`."""
    given = dataclasses.replace(state, extra={**like.extra, **state.extra})
    if jax.tree.structure(given) != jax.tree.structure(like):
        differ = ", ".join(sorted(flat(given).keys() ^ flat(like).keys())[:4]) or "the kind of some leaf"
        raise InputError(f"state: it is of another model, optimizer or config; only one of both has {differ}")
    where = jax.tree.map(lambda a: a.sharding, like)
    params = jax.device_put(state.params, where.params)
    whole = {**jax.jit(extra, out_shardings=where.extra)(params), **state.extra}
    return jax.tree.map(jnp.copy, jax.device_put(dataclasses.replace(state, params=params, extra=whole), where))


def _at_row(state: TrainState, batch_size: int) -> TrainState:
    """The state at the batch that begins with its next row, where batches had another size until now."""
    then = int(state.extra["batch_size"])
    rows = int(state.data_step) * then
    if then == batch_size:
        return state
    if rows % batch_size:
        near = [n for n in range(1, 4 * max(then, batch_size)) if rows % n == 0]
        near = sorted(sorted(near, key=lambda n: abs(n - batch_size))[:4])
        raise InputError(
            f"batch_size: {batch_size} given to go on behind {rows} rows in batches of {then}, where some rows would come again "
            f"or be left out; allowed: a divisor of {rows}, such as {', '.join(map(str, near))}"
        )
    now = {"data_step": rows // batch_size, "batch_size": batch_size}
    old = {"data_step": state.data_step, "batch_size": state.extra["batch_size"]}
    new = {name: jax.device_put(jnp.int32(now[name]), a.sharding) for name, a in old.items()}
    extra = {**state.extra, "batch_size": new["batch_size"]}
    return dataclasses.replace(state, data_step=new["data_step"], extra=extra)


def _shape(a: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=getattr(a, "sharding", None))


def _given(model: Model, data: Any, heldout: Any, config: TrainConfig, batch_size: int | None) -> tuple[Batches, Batches | None]:
    """What was given as batches, training and held out."""
    name = next(iter(model.inputs(1, 1)))
    stream = as_batches(data, input_name=name, batch_size=batch_size, seed=config.seed)
    if heldout is None:
        return stream, None
    own = None if isinstance(heldout, Batches) else batch_size
    judged = as_batches(heldout, input_name=name, batch_size=own, argument="heldout")
    return stream, listed(judged, config.eval_batches) if isinstance(judged, Passed) else judged


def _check_passed(stream: Passed, saves: bool, state: TrainState | None) -> None:
    """Refuse what an iterable cannot do: be wound to a batch, or give a process its own rows."""
    allowed = "a data.Stream, arrays, or a list of batches"
    if saves:
        raise InputError(
            f"checkpoints: given with an iterable of batches, which cannot be wound to where a run was broken; allowed: {allowed}"
        )
    if state is not None and (number := int(state.data_step)):
        raise InputError(
            f"state: at batch {number}, given with an iterable of batches; allowed: {allowed}, or params=state.params"
        )
    if jax.process_count() > 1:
        raise InputError(f"data: an iterable given to several processes, each of which makes its own rows; allowed: {allowed}")


def _feed(placed: Placed, state: TrainState, config: TrainConfig) -> Iterator[Any]:
    """The batches from a state on."""
    first = int(state.data_step)
    if isinstance(placed.stream, Passed):
        return map(placed.batch, range(first, first + config.steps - int(state.step)))
    return prefetch(placed, first, first + config.steps - int(state.step))


def _read(unread: collections.deque[tuple[int, Any]], ahead: int) -> list[int]:
    """Wait until all but `ahead` of the steps that were begun are through; those of them that were bad."""
    bad = []
    while len(unread) > ahead:
        number, metrics = unread.popleft()
        if float(metrics["bad"]) > 0:
            bad.append(number)
    return bad
