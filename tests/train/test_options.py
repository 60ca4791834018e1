"""Settings out of range are refused where they are made, in one line; a score over nothing is no
score.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodel
from jaxmodel import data, losses, optim, train
from jaxmodel.errors import InputError, within
from jaxmodel.models import gpt2, mlp
from jaxmodel.optim import optimizers
from jaxmodel.train.evaluation import Evaluator
from jaxmodel.train.options import RANGES
from jaxmodel.train.rewind import BadSteps

MODEL = mlp.model(mlp.SIZES["tiny"])
WIDTH = MODEL.inputs(1, 1)["features"].shape[-1]

REFUSED = {
    **dict.fromkeys(("steps", "gradient_accumulation_steps", "log_every", "eval_batches"), (0, -1)),
    **dict.fromkeys(("warmup_steps", "step_size", "patience", "eval_every", "save_every"), (-1,)),
    **dict.fromkeys(
        ("learning_rate", "weight_decay", "max_grad_norm", "spike", "save_seconds"),
        (-1e-9, math.nan, math.inf),
    ),
    **dict.fromkeys(("final_lr_fraction", "stable_fraction"), (-0.1, 1.1, math.nan)),
    **dict.fromkeys(("gamma", "top_k_fraction"), (0.0, -0.1, 1.1, math.nan)),
    **dict.fromkeys(("b2", "ema_decay"), (-0.1, 1.0, math.nan)),
    "seed": (-1, 2**32),
}
ALLOWED = {
    **dict.fromkeys(("warmup_steps", "step_size", "patience", "eval_every", "save_every"), (0, 3)),
    **dict.fromkeys(
        ("learning_rate", "weight_decay", "max_grad_norm", "spike", "save_seconds"), (0.0, 3.0)
    ),
    **dict.fromkeys(("final_lr_fraction", "stable_fraction"), (0.0, 1.0)),
    **dict.fromkeys(("gamma", "top_k_fraction"), (1e-9, 1.0)),
    **dict.fromkeys(("b2", "ema_decay"), (0.0, 0.999)),
    **dict.fromkeys(
        ("steps", "gradient_accumulation_steps", "log_every", "eval_batches"), (1, 10**9)
    ),
    "seed": (0, 2**32 - 1),
}
NAMES = ("optimizer", "schedule", "pipeline", "gradient_compression", "on_bad_step")


def each(table: dict) -> list[tuple]:
    return [(name, value) for name, values in table.items() for value in values]


@pytest.mark.parametrize("kind", [train.TrainOptions, train.TrainConfig])
@pytest.mark.parametrize(("name", "value"), each(REFUSED))
def test_what_is_out_of_range_is_refused_where_it_is_given(kind, name, value):
    with pytest.raises(InputError, match=rf"^{name}: .*allowed: ") as error:
        kind(**{name: value})
    assert repr(value) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "value"), each(ALLOWED))
def test_the_ends_of_the_ranges_are_within(name, value):
    assert getattr(train.TrainConfig(**{name: value}), name) == value


def test_every_setting_has_a_range_or_names():
    fields = {field.name for field in dataclasses.fields(train.TrainOptions)}
    assert fields == {*RANGES, *NAMES} == {*REFUSED, *NAMES} == {*ALLOWED, *NAMES}


@pytest.mark.parametrize("value", [True, "1", None, 1j])
@pytest.mark.parametrize("name", RANGES)
def test_what_is_no_number_is_refused(name, value):
    with pytest.raises(InputError, match=rf"^{name}: {re.escape(repr(value))} given; allowed: "):
        within(name, value, RANGES[name])


@pytest.mark.parametrize("value", [1, np.int64(1), np.float32(0.5), np.float64(0.5)])
def test_numbers_of_every_kind_are_numbers(value):
    within("learning_rate", value, RANGES["learning_rate"])


def test_names_are_checked_where_they_are_given():
    """In a process of its own: here, the types of all arguments are checked."""
    program = f"""
        import dataclasses
        from jaxmodel.errors import InputError
        from jaxmodel.train.options import TrainOptions
        for name in {NAMES}:
            for value in ("Stop", "", None):
                try:
                    dataclasses.replace(TrainOptions(), **{{name: value}})
                except InputError as error:
                    print(error)
    """
    env = {**os.environ, "PYTHONPATH": str(Path(jaxmodel.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    said = done.stdout.splitlines()
    assert [line.split(" is not known; allowed: ")[0] for line in said] == [
        f"{name}: {value!r}" for name in NAMES for value in ("Stop", "", None)
    ]
    assert "on_bad_step: 'Stop' is not known; allowed: rewind, skip, stop (nearest: stop)" in said


def test_a_changed_config_is_checked_too():
    config = train.TrainConfig(steps=3)
    assert dataclasses.replace(config, steps=4).steps == 4
    with pytest.raises(
        InputError, match="save_every: -1 given; allowed: a whole number of at least 0"
    ):
        dataclasses.replace(config, save_every=-1)
    with pytest.raises(
        InputError, match="on_bad_step: 'Stop' is not known; allowed: rewind, skip, stop"
    ):
        BadSteps("Stop")


@pytest.mark.parametrize("name", optimizers.NAMES)
def test_every_optimiser_may_be_named(name):
    assert train.TrainConfig(optimizer=name).optimizer == name


def test_no_clip_is_no_limit():
    grads = {"w": jnp.array([300.0, 400.0])}
    for clip, factor in ((0.0, 1.0), (5.0, 0.01)):
        config = train.TrainConfig(
            optimizer="sgd",
            max_grad_norm=clip,
            warmup_steps=0,
            schedule="constant",
            learning_rate=0.1,
            weight_decay=0.0,
        )
        optimizer = train.make_optimizer(config)
        updates: Any = optimizer.update(grads, optimizer.init(grads), grads)[0]
        np.testing.assert_allclose(updates["w"], -0.1 * factor * grads["w"], rtol=1e-6)


@pytest.mark.parametrize("rate", [-1.0, math.nan, math.inf])
def test_a_rate_that_is_none(rate):
    with pytest.raises(
        InputError, match=f"rate: {rate} given; allowed: a finite number of at least 0"
    ):
        optim.schedule("constant", rate, 10)


def scores(weights: list[float], batches: int = 2) -> dict[str, float]:
    random = np.random.default_rng(0)
    rows = {
        "features": random.normal(size=(4, WIDTH)).astype(np.float32),
        "labels": np.zeros(4, np.int32),
        "weights": np.array(weights, np.float32),
    }
    scorer = Evaluator(MODEL, losses.classification, data.Stream(rows, 2), None, batches)
    return scorer(jax.jit(MODEL.init)(jax.random.key(0)))


def test_a_loss_over_nothing_is_not_the_best():
    found = scores([0, 0, 0, 0])
    assert set(found) == {"heldout_loss", "heldout_accuracy"} and all(
        map(math.isnan, found.values())
    )
    assert 0 < scores([0, 0, 0, 1])["heldout_loss"] < math.inf
    with pytest.raises(
        InputError, match="eval_batches: 0 given; allowed: a whole number of at least 1"
    ):
        scores([1, 1, 1, 1], batches=0)


def test_a_compiled_step_refuses_rows_that_the_mesh_does_not_divide():
    mesh = jax.sharding.Mesh(
        np.array(jax.devices()[:1] * 4).reshape(2, 2), ("data", "fsdp")
    )  # it never runs
    batch = {name: jax.ShapeDtypeStruct((6, 8), jnp.int32) for name in ("tokens", "targets")}
    with pytest.raises(
        InputError,
        match="batch: 6 rows cannot be divided among the 4 devices of data x fsdp in the mesh",
    ):
        train.Program(gpt2.model(gpt2.SIZES["tiny"]), loss=losses.next_token, mesh=mesh).compile(
            batch
        )


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("lr", "learning_rate"),
        ("epochs", "steps are counted"),
        ("num_warmup_steps", "warmup_steps"),
        ("learnig_rate", "learning_rate"),
    ],
)
def test_a_name_that_is_no_field_is_answered_with_the_one_that_is(given, meant):
    with pytest.raises(InputError, match=f"TrainConfig: '{given}' is not a field; .*{meant}"):
        train.TrainConfig(**{given: 1})
    with pytest.raises(InputError, match=f"TrainConfig: '{given}' is not a field; .*{meant}"):
        dataclasses.replace(train.TrainConfig(), **{given: 1})


def test_help_of_the_config_says_what_each_value_is():
    said = inspect.getdoc(train.TrainConfig) or ""
    for field in dataclasses.fields(train.TrainConfig):
        assert re.search(rf"^ +{field.name}: \S+ \S+", said, re.MULTILINE), field.name
