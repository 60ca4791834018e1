"""`fit`: the loop around a step. It is short, to be copied and changed where it does not fit."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmodel import tree
from jaxmodel.checkpoint.manager import Checkpoints
from jaxmodel.checkpoint.records import flat
from jaxmodel.data import Batches, prefetch
from jaxmodel.data.given import Passed, as_batches, listed
from jaxmodel.data.image_folder import same_classes
from jaxmodel.data.stream import fingerprints
from jaxmodel.distributed.supervise import RunMonitor
from jaxmodel.errors import InputError
from jaxmodel.hub import Bundle
from jaxmodel.losses import Loss, default_loss
from jaxmodel.losses.chosen import checked_loss
from jaxmodel.models import Model, check_params
from jaxmodel.progress import bar
from jaxmodel.report.training import History
from jaxmodel.train import early, flops, memory, position, statistics
from jaxmodel.train.config import TrainConfig, rate_of, schedule_of
from jaxmodel.train.evaluation import Evaluator
from jaxmodel.train.gradients import GradientFn, Objective, value_and_grad
from jaxmodel.train.meter import ThroughputMeter
from jaxmodel.train.placing import ShardedLoader, check_batch, explain, not_finite
from jaxmodel.train.program import Program
from jaxmodel.train.rewind import BadSteps
from jaxmodel.train.state import TrainState, averaged
from jaxmodel.train.step import Augment, check_optimizer

AHEAD = 2
"""The number of steps that may be queued on the devices.

More would only hold batches in memory; fewer would let the devices wait for the host.
"""

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
    supervisor: RunMonitor | None = None,
) -> tuple[TrainState, list[Row]]:
    """Train a model on data.

    Args:
      model: the model to train; its `rules` place it on the mesh. For a bundle, its model is
        trained from its parameters on.
      data: batches by step, such as a `data.Stream`; or a dict of arrays `[N, ...]`, a pair
        `(x, y)` of them, rows such as a `data.ImageFolder`, a list of batches, or an iterable of
        batches such as a DataLoader (which cannot be moved to where a run stopped, so it allows no
        checkpoints); see `data.given.as_batches`.
      config: see `TrainConfig`.
      callbacks: each is called with every row of the history.
      params: parameters to start from; None for fresh ones from the seed.
      state: a state to continue from, up to `config.steps` steps in all; it stays usable. The
        result is that of an uninterrupted run. If it stands between two batches of the size given
        now, give `train.position.at_row(state, batch_size)`.
      heldout: the data of the held-out loss, in the same forms. For data with a `count`, such as a
        `Stream`, each row (or each of the first `config.eval_rows`) is evaluated once; for data
        without an end, the first `config.eval_batches` batches are.
      batch_size: the number of rows in a batch of arrays; None for 32. A stream has its own.
      mesh: None for one device.
      loss: see `jaxmodel.losses`; your own function may return only the mean over the rows. None
        chooses by what the batch holds: `classification` for `labels`, `next_token` for integer
        `targets`, `regression()` for others.
      optimizer: an optax transformation; None for `make_optimizer(config)`.
      augment: a function that changes batches in training; see `jaxmodel.data.augment`.
      gradients: see `make_step`.
      checkpoints: where states are saved, as the config says, and from where an interrupted run
        continues: a folder, a remote place such as gs:// or s3://, or `Checkpoints` with settings.
        They belong to this run: its config, loss, optimiser, data and given params are stored with
        them, and another run that is started there is refused, with what differs.
      supervisor: see `RunMonitor`; if it stops the run, the state is saved and returned as it is.

    Returns:
      The last state (with early stopping, that of the best parameters), and the history of the
      whole run, including the part before a restart from checkpoints. The history is a list of
      rows, dicts of Python ints and floats:

      - step (int): the number of updates made.
      - data_step (int): the index of the batch, from 0.
      - loss (float): the training loss of that batch, in the unit of the loss (nats for a cross
        entropy); its other metrics (float) stand beside it.
      - grad_norm (float): the global L2 norm of the gradient before clipping.
      - learning_rate (float): the rate of the update; absent if the optimiser was given.
      - tokens_per_second (float), or rows_per_second if batches have no tokens: the speed since
        the row before, of all devices together.
      - mfu (float): model FLOP utilisation, 0 to 1; absent if the peak is not known.
      - data_wait (float): the share of the time that was spent waiting for data, 0 to 1.
      - bad (int): the number of skipped steps since the row before.
      - seconds (float): the wall time since this call began to train.
      - heldout_loss (float) and other held-out metrics: in rows with an evaluation.

      The statistics of batch norms, also those of a Flax module, are measured on the first 1,024
      rows of the stream before each evaluation and at the end, which costs a forward pass (see
      `recalibrate_batch_norm`); with a moving average, they are those of the averaged weights.

    Raises:
      InputError: the mesh does not divide a batch or the parameters; tokens, targets or labels, in
        any batch, are not in the model's range; held-out images have other classes; `data` or
        `loss` has a wrong form; a state or a checkpoint belongs to another config, or a checkpoint
        to other data; there are bad steps and `config.on_bad_step` says so.
    """
    if isinstance(model, Bundle):
        model, params = model.model, model.params if params is None else params
    if not isinstance(model, Model):
        raise InputError(
            f"model: {type(model).__name__} given; allowed: a Model, a Bundle; models.from_linen "
            "makes a Model from a Flax module"
        )
    if params is not None:
        check_params(model, params)
    check_optimizer(optimizer)
    stream, heldout = _given(model, data, heldout, config, batch_size)
    if isinstance(stream, Passed):
        _check_passed(stream, checkpoints is not None, state)
    loss = default_loss(model, stream.batch(0)) if loss is None else loss
    checked_loss(loss)
    how: dict[str, Any] = {
        "optimizer": optimizer,
        "mesh": mesh,
        "augment": augment,
        "gradients": gradients,
    }
    program = Program(model, config, loss=loss, **how)
    _check_judging(config, stream, heldout, checkpoints is not None)
    supervisor = supervisor or RunMonitor()
    placed = ShardedLoader(stream, mesh)
    most = flops.peak(model.policy.compute_dtype)  # measured before the mesh is set
    with contextlib.ExitStack() as opened, program.on_mesh():
        if checkpoints is not None and not isinstance(checkpoints, Checkpoints):
            checkpoints = Checkpoints(checkpoints)
            opened.callback(checkpoints.close, raises=False)  # errors of saving were already raised
        if checkpoints is not None:
            identity = _identity(program, stream, heldout, params)
            resized = functools.partial(fingerprints, stream)
            checkpoints.state_run(identity, stream.fingerprint, program.environment, resized)
        run = _Run(program, placed, heldout, callbacks, checkpoints, supervisor, most)
        run.begin(params, state)
        with bar(config.steps, "train", done=run.i, unit="step", first="compiling") as shown:
            while not run.is_over():
                batch = run.next_batch()
                if batch is None:
                    break
                metrics = run.step(batch)
                if run.went_back():
                    continue
                shown.advance(run.i - shown.done)
                score = None
                if "heldout" in run.due and (heldout is not None or run.i == config.steps):
                    run.measure_statistics()
                if "row" in run.due:
                    row, score = run.row(metrics)
                    shown.advance(0, **run.meter.shown(row))
                run.save(score)
        run.finish()
    return run.state, History(run.history)


@dataclasses.dataclass
class _Run:
    """The progress of a run: its state, its history, and steps whose metrics were not read yet."""

    program: Program
    placed: ShardedLoader
    heldout: Batches | None
    callbacks: Sequence[Callable[[Row], None]]
    checkpoints: Checkpoints | None
    supervisor: RunMonitor
    most: float | None  # operations per second that the devices can do
    history: list[Row] = dataclasses.field(default_factory=list)
    unread: collections.deque[tuple[int, Any]] = dataclasses.field(
        default_factory=collections.deque
    )  # steps whose metrics wait
    due: set[str] = dataclasses.field(default_factory=set)
    i: int = 0
    stop: bool = False
    over: bool = False
    bad: list[int] = dataclasses.field(default_factory=list)
    state: TrainState = dataclasses.field(init=False)
    like: TrainState = dataclasses.field(init=False)  # its shapes and places
    scorer: Evaluator | None = dataclasses.field(init=False)
    with_statistics: Callable[[TrainState], TrainState] = dataclasses.field(init=False)
    meter: ThroughputMeter = dataclasses.field(init=False)
    bad_steps: BadSteps = dataclasses.field(init=False)
    feed: Iterator[Any] = dataclasses.field(init=False)
    rate: optax.Schedule | None = dataclasses.field(init=False)

    @property
    def stream(self) -> Batches:
        """The batches, before they are placed on devices."""
        return self.placed.stream

    def begin(self, params: tree.Params | None, state: TrainState | None) -> None:
        """Start anew, or continue from a state or from a checkpoint."""
        program = self.program
        config = self.program.config
        self.like = program.shapes(params)
        restored = None if self.checkpoints is None else self.checkpoints.restore(self.like)
        if restored is not None and self.checkpoints is not None:
            self.history = self.checkpoints.history(int(restored.step))
            self.supervisor.ledger.restored(int(restored.step))
            found = restored
        elif state is not None:
            position.check_size(state, self.stream.batch_size)
            key = jax.random.key(config.seed)
            found = _going_on(state, self.like, lambda params: program.start(key, params).extra)
        else:
            found = program.init(params=params)
        self.state = position.at_row(found, self.stream.batch_size)
        self.i = int(self.state.step)
        if not jax.tree.leaves(tree.partition(self.state.params, program.trainable)[0]):
            raise InputError("trainable: nothing trains")
        if config.steps < self.i:
            raise InputError(f"steps: {config.steps} given; {self.i} have already been taken")
        judge = config.eval_batches, config.eval_rows
        model = program.model
        mesh = program.mesh
        loss = program.loss
        self.scorer = (
            None if self.heldout is None else Evaluator(model, loss, self.heldout, mesh, *judge)
        )
        self.with_statistics = statistics.of_run(model, loss, self.stream, mesh, self.state.params)
        self.meter = ThroughputMeter(model, self.state.params, self.most, program.trainable)
        self.bad_steps = BadSteps(config.on_bad_step)
        self.placed = ShardedLoader(position.from_here(self.stream, self.state), mesh)
        self.feed = _feed(self.placed, self.state, config)
        self.rate = schedule_of(config) if program.optimizer is None else None
        self.over = bool(config.patience) and early.over(self.state, config.patience)
        if restored is not None and jax.process_index() == 0:
            ended = "the run is complete; nothing is left to train"
            then = ended if self.over or self.i == config.steps else "going on"
            print(
                f"jaxmodel: step {self.i} of {config.steps} is restored; {then}",
                file=sys.stderr,
                flush=True,
            )

    def is_over(self) -> bool:
        """Return whether all steps were made, or the run was stopped."""
        return self.i >= self.program.config.steps or self.stop or self.over

    def next_batch(self) -> dict[str, Any] | None:
        """Return the batch of the next step; None (and a message) if the data has ended."""
        with self.supervisor.spend("data", self.i), self.meter.waits():
            batch = next(self.feed, None)
        if batch is None:
            told = (
                f"jaxmodel: data: ended after {self.i} of {self.program.config.steps} steps; "
                f"the run stops there"
            )
            print(told, file=sys.stderr, flush=True)
            self.measure_statistics()
        elif not self.meter.steps:
            check_batch(self.program.model, self.state.params, batch)
        return batch

    def step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Start a step; its metrics may not be available yet."""
        config = self.program.config
        model = self.program.model
        rows = self.stream.batch_size // self.placed.parts
        full = memory.explained(
            self._compiled_with(batch), config.gradient_accumulation_steps, rows, model.policy.remat
        )
        with self.supervisor.spend("compute" if self.meter.steps else "compile", self.i), full:
            self.state, metrics = self.program.step(self.state, batch)
            self.unread.append((self.i, metrics))
            self.meter.count(batch)
            self.i += 1
            self.due, self.stop = config.due(self.i), self.supervisor.stop(self.i)
            self.bad = _read(self.unread, 0 if self.due or self.stop else AHEAD)
        return metrics

    def went_back(self) -> bool:
        """Handle the bad steps found, and return whether the run is at an earlier step now."""
        self.meter.bad(len(self.bad))
        bad = {}
        for number in self.bad:
            place = int(self.state.data_step) - (self.i - number)
            explain(self.program.model, self.stream, place)
            bad[number] = not_finite(self.stream, place)
        back = self.bad_steps.rewind_to(bad, self.i, self.checkpoints)
        if back is None:
            self.supervisor.ledger.at(self.i)
            return False
        assert self.checkpoints is not None
        with self.supervisor.spend("checkpoint", self.i):
            restored = self.checkpoints.restore(self.like, at_most=back)
            self.state = self.bad_steps.rewind(self.state, self.i, back, restored)
        self.i = back
        self.stop = False
        self.history[:] = [row for row in self.history if row["step"] <= back]
        self.feed = _feed(self.placed, self.state, self.program.config)
        self.unread.clear()
        return True

    def measure_statistics(self) -> None:
        """Set the statistics of batch norms, if the model has some."""
        with self.supervisor.spend("evaluate", self.i):
            self.state = self.with_statistics(self.state)

    def row(self, metrics: dict[str, Any]) -> tuple[Row, float | None]:
        """Return a row of the history, and the held-out loss if it is due."""
        config = self.program.config
        score = None
        used = (
            None
            if self.rate is None
            else rate_of(self.rate, self.state.opt_state, bool(metrics["bad"]))
        )
        row = {
            "step": self.i,
            "data_step": int(self.state.data_step) - 1,
            **self.meter.row(metrics, used),
        }
        if self.scorer is not None and "heldout" in self.due:
            with self.supervisor.spend("evaluate", self.i):
                row |= self.scorer(averaged(self.state))
                score = row["heldout_loss"]
                if config.patience:
                    self.state = early.update(self.state, score)
                    self.over = early.over(self.state, config.patience)
        if (
            not self.history and row["grad_norm"] == 0
        ):  # perhaps adapters that the model does not read
            print(
                "jaxmodel: the gradient is zero: the loss does not depend on what trains",
                file=sys.stderr,
                flush=True,
            )
        self.history.append(row)
        for callback in self.callbacks:
            callback(row)
        return row, score

    def save(self, score: float | None = None) -> None:
        """Save the state if that is due."""
        config = self.program.config
        checkpoints = self.checkpoints
        if checkpoints is None:
            return
        if (
            self.stop
            or "save" in self.due
            or checkpoints.late(config.save_seconds, "row" in self.due)
        ):
            with self.supervisor.spend("checkpoint", self.i):
                checkpoints.save(self.state, score=score, history=self.history)
                self.supervisor.ledger.at(self.i, saved=True)

    def finish(self) -> None:
        """Save the last state, and take the best parameters if the run may stop early."""
        if self.checkpoints is not None:
            with self.supervisor.spend("checkpoint", self.i):
                self.checkpoints.save(
                    self.state, history=self.history
                )  # nothing where it is there already
                self.supervisor.ledger.at(self.i, saved=True)
                self.checkpoints.wait(
                    raises=False
                )  # what was trained is not lost with it: `close` raises
        if self.program.config.patience and not self.stop:
            self.state = self.with_statistics(early.best(self.state))

    def _compiled_with(self, batch: dict[str, Any]) -> Callable[[int, str], Any]:
        """Return a function that compiles the step with other micro-batches or `remat`."""
        program = self.program

        def compiled(accumulate: int, remat: str) -> Any:
            # here, since a trace in every step would cost more than the rest of the loop
            params = jax.eval_shape(lambda params: params, self.like.params)
            policy = dataclasses.replace(program.model.policy, remat=remat)
            config = dataclasses.replace(program.config, gradient_accumulation_steps=accumulate)
            other = dataclasses.replace(
                program, model=program.model.with_policy(policy), config=config
            )
            return other.compile(batch, params)

        return compiled


def _identity(
    program: Program, stream: Batches, heldout: Batches | None, params: tree.Params | None
) -> dict[str, Any]:
    """Return what a checkpoint belongs to.

    It is the program, the rows of a batch, the parameters that were given, and what may end the
    run.
    """
    found = {**program.identity, "batch_size": stream.batch_size}
    if heldout is not None and program.config.patience:
        found["heldout"] = heldout.fingerprint
    if params is not None and all(
        getattr(a, "is_fully_addressable", True) for a in jax.tree.leaves(params)
    ):
        found["params"] = tree.fingerprint(params)
    return found


def _check_judging(
    config: TrainConfig, stream: Batches, heldout: Batches | None, saves: bool
) -> None:
    """Refuse a patience or rewinding that cannot work, and held-out images of other classes."""
    if config.patience and heldout is None:
        raise InputError(f"patience: {config.patience} given without held-out batches")
    config.check_patience()
    same_classes(stream, heldout)
    if config.on_bad_step == "rewind" and not saves:
        raise InputError("on_bad_step: 'rewind' given without checkpoints to go back to")


def _going_on(
    state: TrainState, like: TrainState, extra: Callable[[tree.Params], dict[str, Any]]
) -> TrainState:
    """Return a copy of the state, placed like `like`, with the missing entries of `extra`.

    It is a copy because steps donate their state.
    """
    given = dataclasses.replace(state, extra={**like.extra, **state.extra})
    if jax.tree.structure(given) != jax.tree.structure(like):
        differ = (
            ", ".join(sorted(flat(given).keys() ^ flat(like).keys())[:4]) or "the kind of some leaf"
        )
        raise InputError(
            "state: it belongs to another model, optimizer or config; only one of the two has "
            f"{differ}"
        )
    where = jax.tree.map(lambda a: a.sharding, like)
    params = jax.device_put(state.params, where.params)
    whole = {**jax.jit(extra, out_shardings=where.extra)(params), **state.extra}
    return jax.tree.map(
        jnp.copy, jax.device_put(dataclasses.replace(state, params=params, extra=whole), where)
    )


def _given(
    model: Model, data: Any, heldout: Any, config: TrainConfig, batch_size: int | None
) -> tuple[Batches, Batches | None]:
    """Return the training and held-out data as batches."""
    name = next(iter(model.inputs(1, 1)))
    stream = as_batches(data, input_name=name, batch_size=batch_size, seed=config.seed)
    if heldout is None:
        return stream, None
    own = None if isinstance(heldout, Batches) else batch_size
    judged = as_batches(heldout, input_name=name, batch_size=own, argument="heldout")
    return stream, listed(judged, config.eval_batches) if isinstance(judged, Passed) else judged


def _check_passed(stream: Passed, saves: bool, state: TrainState | None) -> None:
    """Refuse what an iterable cannot do: start at a batch, or give a process its own rows."""
    allowed = "a data.Stream, arrays, or a list of batches"
    if saves:
        raise InputError(
            "checkpoints: given with an iterable of batches, which cannot continue where a run "
            f"stopped; allowed: {allowed}"
        )
    if state is not None and (number := int(state.data_step)):
        raise InputError(
            f"state: at batch {number}, given with an iterable of batches; allowed: {allowed}, or "
            f"params=state.params"
        )
    if jax.process_count() > 1:
        raise InputError(
            f"data: an iterable given to several processes, each of which makes its own rows; "
            f"allowed: {allowed}"
        )


def _feed(placed: ShardedLoader, state: TrainState, config: TrainConfig) -> Iterator[Any]:
    """Return the batches from a state on."""
    first = int(state.data_step)
    if isinstance(placed.stream, Passed):
        return map(placed.batch, range(first, first + config.steps - int(state.step)))
    return prefetch(placed, first, first + config.steps - int(state.step))


def _read(unread: collections.deque[tuple[int, Any]], ahead: int) -> list[int]:
    """Wait until all but `ahead` of the queued steps are done, and return the bad ones."""
    bad = []
    while len(unread) > ahead:
        number, metrics = unread.popleft()
        if float(metrics["bad"]) > 0:
            bad.append(number)
    return bad
