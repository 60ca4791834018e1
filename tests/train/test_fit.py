"""The loop: a broken run goes on to the same bits, bad batches are passed, the best weights come
back, one compilation.
"""

from __future__ import annotations

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodel import checkpoint, data, distributed, losses, optim, train, tree
from jaxmodel.errors import InputError
from jaxmodel.models import cnn, mlp
from jaxmodel.train.state import init_state
from jaxmodel.train.step import make_step, moving_average

MODEL = mlp.model(mlp.SIZES["tiny"])
WIDTH = MODEL.inputs(1, 1)["features"].shape[-1]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Batches of a tiny problem; those of the steps in `broken` hold a value that is not finite."""

    broken: tuple[int, ...] = ()
    noise: float = 0.0
    batch_size: int = 8

    @property
    def fingerprint(self):
        return str(self)

    def batch(self, step, rows=slice(None)):
        random = np.random.default_rng(int(step))
        features = random.normal(size=(self.batch_size, WIDTH)).astype(np.float32)
        labels = (features[:, 0] > 0).astype(np.int32)
        labels = np.where(
            random.random(self.batch_size) < self.noise,
            random.integers(0, 4, self.batch_size),
            labels,
        )
        if int(step) in self.broken:
            features[0, 0] = np.inf
        return {"features": features[rows], "labels": labels.astype(np.int32)[rows]}


def fit(config, folder=None, stream=Rows(), stop=None, **more):
    supervisor = distributed.RunMonitor(stop=lambda i: i == stop)
    if folder is None:
        return train.fit(
            MODEL, stream, config, loss=losses.classification, supervisor=supervisor, **more
        )
    with checkpoint.Checkpoints(folder) as checkpoints:
        return train.fit(
            MODEL,
            stream,
            config,
            loss=losses.classification,
            checkpoints=checkpoints,
            supervisor=supervisor,
            **more,
        )


CONFIG = train.TrainConfig(
    steps=12,
    gradient_accumulation_steps=2,
    ema_decay=0.9,
    save_every=5,
    log_every=1,
    learning_rate=1e-2,
)


@pytest.fixture(scope="module")
def never_stopped():
    return fit(CONFIG)


@pytest.mark.parametrize("stop", [1, 5, 8])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(stop, never_stopped, tmp_path, capsys):
    whole, history = never_stopped
    first, before = fit(CONFIG, tmp_path, stop=stop)
    assert int(first.step) == stop
    second, after = fit(CONFIG, tmp_path)
    assert checkpoint.fingerprint(second) == checkpoint.fingerprint(whole)
    assert f"step {stop} of 12 is restored; going on" in capsys.readouterr().err
    losses = [row["loss"] for row in history]
    assert [row["loss"] for row in before] == losses[:stop] and [
        row["loss"] for row in after
    ] == losses
    if stop == 8:
        third, same = fit(CONFIG, tmp_path)  # it was through
        assert checkpoint.fingerprint(third) == checkpoint.fingerprint(whole) and same == after
        assert (
            "step 12 of 12 is restored; the run is complete; nothing is left to train"
            in capsys.readouterr().err
        )


def test_to_rewind_goes_back_to_a_checkpoint_and_past_the_bad_batch(tmp_path):
    state, history = fit(
        dataclasses.replace(CONFIG, on_bad_step="rewind"), tmp_path, Rows(broken=(7,))
    )
    # by hand: batches 0 to 4, of which there is a checkpoint, then from 8 on
    optimizer = train.make_optimizer(CONFIG)
    guard = CONFIG.guard()
    step = jax.jit(
        make_step(MODEL, losses.classification, optimizer, accumulate=2, average=0.9, guard=guard)
    )
    want = init_state(jax.jit(MODEL.init)(jax.random.key(0)), optimizer, average=True, guard=guard)
    for place in (0, 1, 2, 3, 4, 8, 9, 10, 11, 12, 13, 14):
        want = dataclasses.replace(want, data_step=jnp.int32(place))
        want, _ = step(want, jax.device_put(Rows().batch(place)))
    assert tree.fingerprint(state.params) == tree.fingerprint(want.params)
    assert (int(state.step), int(state.data_step)) == (12, 15)
    assert [row["step"] for row in history] == list(range(1, 13))
    killed, _ = fit(
        dataclasses.replace(CONFIG, on_bad_step="rewind"), tmp_path / "b", Rows(broken=(7,)), stop=8
    )
    resumed, _ = fit(
        dataclasses.replace(CONFIG, on_bad_step="rewind"), tmp_path / "b", Rows(broken=(7,))
    )
    assert int(killed.data_step) == 11 and checkpoint.fingerprint(
        resumed
    ) == checkpoint.fingerprint(state)


def test_early_stopping_takes_the_best_weights(tmp_path):
    """The labels of training are noise, so the held-out loss gets worse in the end."""
    config = train.TrainConfig(
        steps=400, learning_rate=3e-2, eval_every=10, eval_batches=4, patience=3, weight_decay=0.0
    )
    stream = Rows(noise=0.9)
    heldout = Rows(batch_size=64)
    state, history = fit(config, stream=stream, heldout=heldout)
    judged = {row["step"]: row["heldout_loss"] for row in history if "heldout_loss" in row}
    best = min(judged, key=judged.get)
    assert int(state.step) == best + 30 < 400  # three evaluations without a better one
    again, _ = train.fit(
        MODEL, stream, dataclasses.replace(config, patience=0), loss=losses.classification,
        supervisor=distributed.RunMonitor(stop=lambda i: i == best),
    )  # fmt: skip
    assert tree.fingerprint(again.params) == tree.fingerprint(state.params)
    broken, _ = fit(config, tmp_path, stream, stop=best + 15, heldout=heldout)
    resumed, _ = fit(config, tmp_path, stream, heldout=heldout)
    assert (
        checkpoint.fingerprint(resumed) == checkpoint.fingerprint(state)
        and int(broken.step) == best + 15
    )
    through, rows = fit(config, tmp_path, stream, heldout=heldout)
    assert rows[-1]["step"] == best + 30 and checkpoint.fingerprint(
        through
    ) == checkpoint.fingerprint(state)


HELDOUT_LOSS = jax.jit(
    lambda params, batch: losses.classification(MODEL, params, batch, train=False)[0]
)


@pytest.mark.parametrize("how", ["average", "quantised", "bfloat16"])
def test_the_best_weights_are_those_that_were_judged(how):
    """Those of the average, all that train of compressed ones, and in the dtype that they had."""
    config = train.TrainConfig(
        steps=12, learning_rate=0.1, warmup_steps=0, patience=2, eval_every=1, eval_batches=1
    )
    params = jax.jit(MODEL.init)(jax.random.key(0))
    if how == "average":
        config = dataclasses.replace(config, ema_decay=0.5)
    elif how == "bfloat16":
        config = dataclasses.replace(config, ema_decay=0.5)
        params = tree.cast(params, jnp.bfloat16)
    else:
        params = optim.quantize_weights(params, [(".*_bias", None), (".*", 8)])
        config = dataclasses.replace(config, trainable=[(".*", True)])
    dtypes = [a.dtype for a in jax.tree.leaves(params)]
    state, history = fit(config, params=params, heldout=Rows(noise=0.5))
    losses = [row["heldout_loss"] for row in history]
    assert min(losses) < losses[-1]
    assert float(HELDOUT_LOSS(train.averaged(state), Rows(noise=0.5).batch(0))) == pytest.approx(
        min(losses), rel=1e-5
    )
    assert [a.dtype for a in jax.tree.leaves(state.params)] == dtypes


def test_an_average_moves_where_bfloat16_would_not():
    state = init_state({"w": jnp.ones(2, jnp.bfloat16)}, optax.sgd(0.0), average=True)
    average = state.extra["average"]
    move = jax.jit(
        lambda average, i: moving_average(average, {"w": jnp.full(2, 1.5, jnp.bfloat16)}, 0.999, i)
    )
    for i in range(3000):
        average = move(average, np.int32(i))
    assert float(average["w"][0]) == pytest.approx(1.5, abs=0.03)
    assert (
        train.averaged(dataclasses.replace(state, extra={"average": average})).get("w").dtype
        == jnp.bfloat16
    )


def test_a_batch_left_out_leaves_the_average_too():
    """As if it had never come, though it counts as a step."""
    config = dataclasses.replace(CONFIG, gradient_accumulation_steps=1, steps=6, log_every=1)
    step = jax.jit(
        make_step(MODEL, losses.classification, optax.sgd(0.1), average=0.999, guard=config.guard())
    )
    states = []
    for stream in (Rows(broken=(0, 1, 2)), Rows()):
        start = init_state(
            jax.jit(MODEL.init)(jax.random.key(0)),
            optax.sgd(0.1),
            average=True,
            guard=config.guard(),
        )
        state = start if stream.broken else dataclasses.replace(start, data_step=jnp.int32(3))
        for i in range(0 if stream.broken else 3, 6):
            state, _ = step(state, stream.batch(i))
        states.append(state)
    left_out, never = states
    assert int(left_out.step) == 6 and int(never.step) == 3
    for part in (lambda s: s.params, lambda s: s.extra["average"]):
        jax.tree.map(np.testing.assert_array_equal, part(left_out), part(never))


def test_rows_name_their_batch(tmp_path):
    stream = Rows(broken=(7,))
    config = train.TrainConfig(steps=10, save_every=5, log_every=1, on_bad_step="rewind")
    _, history = fit(config, tmp_path, stream)
    assert {row["step"]: row["data_step"] for row in history} == {
        i: i - 1 if i <= 5 else i + 2 for i in range(1, 11)
    }


def test_a_last_checkpoint_that_fails_does_not_cost_the_run(tmp_path, monkeypatch):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    monkeypatch.setattr(type(checkpoints._arrays), "wait", lambda self: 1 / 0)
    state, _ = train.fit(
        MODEL,
        Rows(),
        train.TrainConfig(steps=2),
        loss=losses.classification,
        checkpoints=checkpoints,
    )
    assert int(state.step) == 2
    with pytest.raises(
        InputError,
        match="the last state could not be saved .* .division by zero.; the last good step is none",
    ):
        checkpoints.close()


@functools.cache
def state(step: int) -> train.TrainState:
    start = init_state(jax.jit(MODEL.init)(jax.random.key(0)), optax.sgd(0.1))
    return dataclasses.replace(start, step=jnp.int32(step))


REFUSED = {
    "patience: 2 given without held-out batches": {
        "config": train.TrainConfig(patience=2, eval_every=20)
    },
    "on_bad_step: 'rewind' given without checkpoints": {
        "config": train.TrainConfig(on_bad_step="rewind")
    },
    "trainable: nothing trains": {"config": train.TrainConfig(trainable=[(".*", False)])},
    "steps: 2 given; 3 have already been taken": {"state": 3},
    "state: it belongs to another model, optimizer or config; only one of the two has opt_state": {
        "state": 0
    },
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_trained_is_refused(said):
    options = {"config": train.TrainConfig(steps=2), **REFUSED[said]}
    if "state" in options:  # at that step
        options["state"] = state(options["state"])
    more = {"optimizer": optax.sgd(0.1)} if said.startswith("steps") else {}
    with pytest.raises(InputError, match=said):
        fit(options.pop("config"), **options, **more)


def test_what_has_no_part_in_the_loss_is_said(capsys):
    """As adapters have not in a model that was not made for them."""
    params = {**jax.jit(MODEL.init)(jax.random.key(0)), "adapter": jnp.ones(3)}
    fit(train.TrainConfig(steps=1, trainable=[("adapter", True), (".*", False)]), params=params)
    assert (
        "the gradient is zero: the loss does not depend on what trains" in capsys.readouterr().err
    )


def test_heldout_metrics_are_reported_as_it_goes():
    _, history = fit(
        train.TrainConfig(steps=9, eval_every=3, eval_batches=2), heldout=Rows(batch_size=32)
    )
    judged = [row for row in history if "heldout_loss" in row]
    assert [row["step"] for row in judged] == [3, 6, 9]
    assert all(0 <= row["heldout_accuracy"] <= 1 for row in judged)


def test_one_compilation_of_the_step_also_after_a_restore(tmp_path, caplog):
    def compiled():
        found = sum(
            "Finished XLA compilation of jit(step)" in record.getMessage()
            for record in caplog.records
        )
        caplog.clear()
        return found

    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
        fit(CONFIG, tmp_path, stop=7, heldout=Rows())
        first = compiled()
        fit(CONFIG, tmp_path, heldout=Rows())
        assert (first, compiled()) == (1, 1)


def test_checkpoints_by_time(tmp_path):
    fit(dataclasses.replace(CONFIG, save_every=0, save_seconds=1e-6, log_every=4), tmp_path)
    assert checkpoint.Checkpoints(tmp_path, read_only=True).steps()[-2:] == [8, 12]


def test_callbacks_see_every_row():
    seen = []
    _, history = train.fit(
        MODEL,
        Rows(),
        train.TrainConfig(steps=3, log_every=1),
        [seen.append],
        loss=losses.classification,
    )
    assert seen == history and [row["step"] for row in seen] == [1, 2, 3]


@pytest.mark.parametrize("schedule", ["constant", "step", "cosine", "wsd", "one_cycle", "plateau"])
def test_every_schedule_trains(schedule):
    config = train.TrainConfig(
        steps=40, schedule=schedule, learning_rate=1e-2, warmup_steps=4, step_size=10, log_every=39
    )
    _, history = fit(config)
    assert history[-1]["loss"] < history[0]["loss"]


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_data_that_is_not_finite_is_named_once(value, capsys):
    """The step is left out, and one line says which leaf of which row it was."""
    model = cnn.model(cnn.SIZES["tiny"])
    pixels = np.ones((64, *model.inputs(1, 1)["pixels"].shape[1:]), np.float32)
    pixels[[37, 50], 2, 1, 0] = value
    given = {"pixels": pixels, "labels": np.arange(64, dtype=np.int32) % 2}
    config = train.TrainConfig(steps=16, log_every=1)
    stream = data.Stream(given, 8, seed=0)
    state, history = train.fit(model, stream, config)
    bad = [not np.isfinite(stream.batch(i)["pixels"]).all() for i in range(16)]
    assert [bool(row["bad"]) for row in history] == bad and 2 <= sum(bad) <= 4
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(state.params))
    said = [line for line in capsys.readouterr().err.splitlines() if "jaxmodel: data" in line]
    assert len(said) == 1
    assert f"pixels hold {value} in row " in said[0] and said[0].endswith("(`bad` in the history)")
    assert "row 37;" in said[0] or "row 50;" in said[0]


def test_held_out_data_that_is_not_finite_is_refused():
    with pytest.raises(InputError, match="heldout: features hold inf in row .*; allowed: finite"):
        fit(train.TrainConfig(steps=4, eval_every=2, eval_batches=3), heldout=Rows(broken=(1,)))
