"""Numbers of a run's rows are those of the run: the rate that was used, operations, each step once;
halves that must agree.
"""

from __future__ import annotations

import dataclasses
import struct

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodel import adapt, data, losses, optim, train, tree
from jaxmodel.errors import InputError
from jaxmodel.models import gpt2, llama, mlp
from jaxmodel.report import training as page
from jaxmodel.train import flops
from jaxmodel.train.exchange import GradientCompression
from jaxmodel.train.state import init_state
from jaxmodel.train.step import make_step

MODEL = mlp.model(mlp.Config(1, (4,), 3))
ROWS = {
    "features": np.linspace(0, 1, 16, dtype=np.float32)[:, None],
    "labels": (np.arange(16) % 3).astype(np.int32),
}


class Broken:
    """Batches of which some are not finite."""

    batch_size = 4
    fingerprint = "broken"

    def __init__(self, *bad: int):
        self.bad = bad

    def batch(self, step, rows=slice(None)):
        features = np.full((4, 1), np.nan if int(step) in self.bad else 1.0, np.float32)
        return {"features": features[rows], "labels": np.arange(4, dtype=np.int32)[rows] % 3}


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8", "sgd", "adafactor", "muon"])
def test_the_rate_of_a_row_is_the_one_that_was_used(optimizer):
    """As if the bad batches had never come."""
    config = train.TrainConfig(
        steps=9, warmup_steps=3, log_every=1, optimizer=optimizer, final_lr_fraction=0.0
    )
    run = lambda stream, steps: train.fit(
        MODEL, stream, dataclasses.replace(config, steps=steps), loss=losses.classification
    )[1]
    rows = run(Broken(2, 3, 6), 9)
    rates = [row["learning_rate"] for row in rows if not row["bad"]]
    rate = optim.schedule("cosine", config.learning_rate, 9, warmup_steps=3, final_lr_fraction=0.0)
    np.testing.assert_allclose(rates, [float(rate(i)) for i in range(6)], rtol=1e-6)


def test_a_rate_that_a_plateau_lowered():
    config = train.TrainConfig(
        steps=8,
        warmup_steps=0,
        log_every=1,
        schedule="plateau",
        step_size=1,
        gamma=0.5,
        final_lr_fraction=0.1,
        optimizer="sgd",
        weight_decay=0.0,
    )
    flat = lambda model, params, batch, rng, *, train=True: (
        0 * jnp.sum(params["head"]) + 1.0,
        {"weight": jnp.float32(1)},
    )
    _, rows = train.fit(MODEL, Broken(), config, loss=flat)
    assert [row["learning_rate"] / 1e-3 for row in rows[:4]] == pytest.approx([1, 0.5, 0.25, 0.125])


# --------------------------------------------------------------------------------------- operations


def counted(model, trains, frozen, rows=2, length=32) -> float:
    """XLA's own count of the gradient's operations for a token; of one layer, as it counts a loop
    once.
    """
    batch = {name: jnp.zeros((rows, length), jnp.int32) for name in ("tokens", "targets")}
    gradient = jax.jit(
        jax.grad(lambda t, f: losses.next_token(model, tree.combine(t, f), batch)[0])
    )
    return gradient.lower(trains, frozen).compile().cost_analysis()["flops"] / (rows * length)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "rules", [None, adapt.ADAPTERS, ((".*", True),), (("head|norm/.*", True), (".*", False))]
)
def test_operations_are_those_that_xla_counts(tied, rules):
    if tied and rules is not None and rules[0][0].startswith("head"):
        pytest.skip("it has no head of its own")
    config = dataclasses.replace(llama.SIZES["tiny"], vocab=4096, depth=1, tied=tied)
    model = llama.model(config)
    params = jax.jit(model.init)(jax.random.key(0))
    if rules == adapt.ADAPTERS:
        model, params = adapt.lora(
            model, params, [(".*/attn/(q|v)", adapt.LoRA(4)), (".*", None)], jax.random.key(1)
        )
    trains, frozen = tree.partition(params, rules)
    got = flops.per_token(model, jax.eval_shape(lambda p: p, params), 32, trains=trains)
    assert got == pytest.approx(counted(model, trains, frozen), rel=0.08)


def test_frozen_layers_in_front_cost_their_forward_pass():
    model = gpt2.model(gpt2.Config(64, 32, 4, 2, 16))
    params = jax.jit(model.init)(jax.random.key(0))
    layer = 12 * 32 * 32
    head = 64 * 32
    assert flops.per_token(model, params, 0) == 6 * (4 * layer + head)
    rules = [("blocks/[23]/.*", True), (".*", False)]
    part, _ = tree.match(rules, params)
    trains = tree.partition(part, rules)[0]
    assert (
        flops.per_token(model, part, 0, trains=trains) == 2 * 2 * layer + 6 * 2 * layer + 4 * head
    )


# ----------------------------------------------------------------------------------- each step once


def events(folder) -> tuple[list[int], list[int]]:
    """Steps of the loss, and those of marks to purge."""
    from tensorboardX.proto import event_pb2

    steps = []
    marks = []
    for file in sorted(folder.glob("events*"), key=lambda file: file.name.rsplit(".", 1)[-1]):
        raw = file.read_bytes()
        at = 0
        while at + 12 <= len(raw):
            (size,) = struct.unpack("<Q", raw[at : at + 8])
            event = event_pb2.Event.FromString(raw[at + 12 : at + 12 + size])
            at += 16 + size
            if event.HasField("session_log"):
                marks.append(event.step)
                steps = [step for step in steps if step < event.step]
            steps += [event.step for value in event.summary.value if value.tag == "loss"]
    return steps, marks


def test_rows_of_a_run_that_goes_back_come_once(tmp_path):
    folder = tmp_path / "board"
    for steps in (
        [1, 2, 3, 4, 5, 3, 4, 5, 6],
        [5, 6, 7],
    ):  # a rewind; then killed behind step 6, and resumed from 4
        with page.tensorboard(folder) as write:
            for step in steps:
                write({"step": step, "loss": 1.0 / step})
    assert events(folder) == ([1, 2, 3, 4, 5, 6, 7], [3, 5])


@pytest.mark.parametrize("settings", [{}, {"eval_every": 10}, {"eval_every": 7, "patience": 6}])
def test_a_patience_that_never_ends_is_refused(settings):
    config = train.TrainConfig(**{"steps": 40, "patience": 4, **settings})
    stream = data.Stream(ROWS, 8)
    with pytest.raises(
        InputError, match="patience: . given for 40 steps with . held-out loss.*allowed"
    ):
        train.fit(MODEL, stream, config, heldout=stream, loss=losses.classification)


def test_the_largest_patience_still_stops():
    stream = data.Stream(ROWS, 8)
    config = train.TrainConfig(steps=40, patience=3, eval_every=10, learning_rate=0.0)
    state, _ = train.fit(MODEL, stream, config, heldout=stream, loss=losses.classification)
    assert int(state.step) == 40  # at the last of four
    state, _ = train.fit(
        MODEL,
        stream,
        dataclasses.replace(config, patience=2),
        heldout=stream,
        loss=losses.classification,
    )
    assert int(state.step) == 30


# ------------------------------------------------------------------------------------------- halves

SGD = optax.sgd(0.1)
PARTS = {
    "guard": ({"guard": optim.Guard()}, {"guard": optim.Guard()}),
    "average": ({"average": 0.9}, {"average": True}),
}


@pytest.mark.parametrize("name", PARTS)
def test_halves_that_do_not_agree_are_refused(name):
    in_step, in_state = PARTS[name]
    params = jax.jit(MODEL.init)(jax.random.key(0))
    batch = {k: a[:4] for k, a in ROWS.items()}
    make = lambda **more: jax.jit(make_step(MODEL, losses.classification, SGD, **more))
    start = lambda **more: init_state(params, SGD, **more)
    make(**in_step)(start(**in_state), batch)
    make()(start(), batch)
    with pytest.raises(
        InputError,
        match=f"{name}: given to make_step only; allowed: both make_step.* and init_state.*or "
        f"neither",
    ):
        make(**in_step)(start(), batch)
    with pytest.raises(InputError, match=f"{name}: given to init_state only"):
        make()(start(**in_state), batch)


def test_guards_and_exchanges_of_another_kind():
    params = jax.jit(MODEL.init)(jax.random.key(0))
    batch = {k: a[:4] for k, a in ROWS.items()}
    step = make_step(MODEL, losses.classification, SGD, guard=optim.Guard(6.0))
    for other in (optim.Guard(), optim.Guard(6.0, window=4)):
        with pytest.raises(
            InputError, match="guard: .* given for a state that was made with another"
        ):
            step(init_state(params, SGD, guard=other), batch)
    state = init_state(params, SGD)
    state.extra["residual"] = {}
    for exchange in (None, GradientCompression("int8")):
        with pytest.raises(InputError, match="exchange: the state has a residual"):
            make_step(MODEL, losses.classification, SGD, exchange=exchange)(state, batch)
