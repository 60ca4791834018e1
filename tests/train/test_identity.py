"""Checkpoints are of one run:

`fit` refuses to go on with them as another, names what differs, and goes on where it may.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodel import checkpoint, data, losses, train, tree
from jaxmodel.errors import InputError
from jaxmodel.models import mlp
from jaxmodel.train.identity import FREE, JUDGING, described, short

ROWS = {
    "features": np.linspace(0, 1, 64, dtype=np.float32)[:, None],
    "labels": (np.arange(64) % 3).astype(np.int32),
}
STREAM = data.Stream(ROWS, 8)
MODEL = mlp.model(mlp.Config(1, (4,), 3))
CONFIG = train.TrainConfig(steps=3, log_every=1)


def fit(place, config=CONFIG, stream=STREAM, model=MODEL, loss=losses.classification, **more):
    return train.fit(model, stream, config, loss=loss, checkpoints=place, **more)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    fit(folder)
    return folder


OTHER = {
    "learning_rate": {"config": dataclasses.replace(CONFIG, learning_rate=0.5)},
    "seed": {"config": dataclasses.replace(CONFIG, seed=7)},
    "schedule": {"config": dataclasses.replace(CONFIG, schedule="constant")},
    "weight_decay": {"config": dataclasses.replace(CONFIG, weight_decay=0.9)},
    "decay": {"config": dataclasses.replace(CONFIG, decay=[(".*", True)])},
    "trainable": {"config": dataclasses.replace(CONFIG, trainable=[(".*", True)])},
    "steps": {"config": dataclasses.replace(CONFIG, steps=4)},
    "model.activation": {"model": mlp.model(dataclasses.replace(MODEL.config, activation="tanh"))},
    "loss": {"loss": functools.partial(losses.classification, smoothing=0.1)},
    "optimizer": {"optimizer": optax.sgd(0.1)},
    "augment": {"augment": lambda key, batch: batch},
    "params": {"params": jax.jit(MODEL.init)(jax.random.key(7))},
    "batch_size": {"stream": data.Stream(ROWS, 4)},
    "data": {"stream": data.Stream({**ROWS, "labels": ROWS["labels"][::-1]}, 8)},
}


@pytest.mark.parametrize("name", OTHER)
def test_another_run_is_refused_by_what_differs(name, saved):
    with pytest.raises(InputError, match=name) as caught:
        fit(saved, **OTHER[name])
    assert "\n" not in str(caught.value)
    if name != "data":
        assert f"allow_changes=['{name}']" in str(caught.value)


def test_every_value_of_the_config_tells_a_run_apart_but_for_what_is_written_down(saved):
    """A field that is added later is part of it, too."""
    told = {field.name for field in dataclasses.fields(CONFIG)} - {*FREE, *JUDGING}
    known = checkpoint.Checkpoints(saved, read_only=True).manifest(3)["identity"]["train"]
    assert set(known) == told
    fit(
        saved, dataclasses.replace(CONFIG, log_every=2, save_every=2, eval_every=1)
    )  # goes on: nothing is left to train


def test_a_change_that_is_allowed_is_said(tmp_path, capsys):
    fit(tmp_path)
    more = dataclasses.replace(CONFIG, steps=5, learning_rate=0.01)
    with pytest.raises(InputError, match="steps was 3, is 5"):
        fit(checkpoint.Checkpoints(tmp_path, allow_changes=["learning_rate"]), more)
    with checkpoint.Checkpoints(tmp_path, allow_changes=["learning_rate", "steps"]) as place:
        state, history = fit(place, more)
    assert int(state.step) == 5 and [row["step"] for row in history] == [1, 2, 3, 4, 5]
    assert "learning_rate was 0.001, is 0.01" in capsys.readouterr().err
    assert fit(tmp_path, more)[1] == history  # what it is now


def test_what_a_function_holds_is_told_and_is_the_same_in_another_process():
    program = (
        "import optax; from jaxmodel.train.identity import short; from jaxmodel.losses import "
        "supervised, next_token;"
        "print(short(optax.adam(optax.cosine_decay_schedule(0.1, 10))));"
        "print(short(supervised(smoothing=0.1))); print(short(next_token))"
    )
    run = functools.partial(
        subprocess.run, [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    out = [run(env={**os.environ, "PYTHONHASHSEED": seed}).stdout for seed in ("1", "2")]
    assert out[0] == out[1] and out[0].count(" with settings ") == 2
    assert out[0].endswith("\njaxmodel.losses.tokens.next_token\n")
    assert short(optax.adam(0.1)) != short(optax.adam(0.2))
    assert short(losses.supervised(smoothing=0.1)) != short(losses.supervised(smoothing=0.2))


def test_a_description_is_plain_whatever_it_is_of():
    def again(n):
        return again(n - 1) if n else 0

    rules = ((tree.optional("a"), True), (".*", np.float32(0.5)))
    for value in (
        again,
        rules,
        {"a": {1, 2}},
        jnp.ones(3),
        np.dtype("int8"),
        float("nan"),
        object(),
        [].append,
        mlp.Config,
    ):
        assert described(value) == described(value)
    assert described(rules) != described(((tree.optional("b"), True), (".*", np.float32(0.5))))
    assert described(jnp.ones(3)) != described(jnp.zeros(3))
