"""Plain JSON from anything, --json targets, goals."""

from __future__ import annotations

import dataclasses
import enum
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from jaxmodel.errors import InputError
from jaxmodel.report.json_out import check_target, clean_stdout, emit, goal_met, rows, to_plain


@dataclasses.dataclass(frozen=True)
class Inner:
    dtype: object
    path: Path


class Kind(enum.StrEnum):
    A = "a"


@pytest.mark.parametrize(
    ("given_", "plain"),
    [
        (np.float32(0.5), 0.5),
        (np.float64("inf"), None),
        (np.bool_(True), True),
        (np.int64(3), 3),
        (jnp.bfloat16(1.5), 1.5),
        (jnp.arange(3), [0, 1, 2]),
        (jnp.array([1.0, jnp.nan]), [1.0, None]),
        (jnp.ones((1, 2), jnp.bfloat16), [[1.0, 1.0]]),
        (jnp.ones(2, jnp.int4), [1, 1]),
        (np.array(2.0), 2.0),
        (Inner(jnp.bfloat16, Path("a/b")), {"dtype": "bfloat16", "path": "a/b"}),
        (np.dtype("int8"), "int8"),
        (jnp.zeros(1).dtype, "float32"),
        (np.float16, "float16"),
        (Kind.A, "a"),
        ({Kind.A: {3, 1}, 2: (1, "x")}, {"a": [1, 3], "2": [1, "x"]}),
        ((i for i in range(2)), [0, 1]),
        (10**30, 10**30),
    ],
)
def test_to_plain(given_, plain):
    out = to_plain(given_)
    assert out == plain and type(out) is type(plain)
    assert json.loads(json.dumps(out, allow_nan=False)) == plain


@pytest.mark.parametrize("bad", [object(), b"bytes", lambda: 0, jax.ShapeDtypeStruct, int])
def test_to_plain_refuses_what_is_no_data(bad):
    with pytest.raises(TypeError, match="cannot write a"):
        to_plain({"x": [bad]})


def test_emit_to_standard_output_and_nothing_else_there(capsys):
    with clean_stdout("-"):
        print("noise")
    emit({"nll": float("nan"), "text": "größer \ud800"}, "-")
    out, err = capsys.readouterr()
    assert json.loads(out) == {"nll": None, "text": "größer \ud800"}
    assert err == "noise\n"


def test_emit_to_a_file_or_nowhere(tmp_path, capsys):
    with clean_stdout("x"):
        print("kept")
    emit([1], str(tmp_path / "x.json"))
    emit([1], None)
    assert json.loads((tmp_path / "x.json").read_text()) == [1]
    assert capsys.readouterr().out == "kept\n"


def test_check_target(tmp_path):
    for fine in (None, "-", str(tmp_path / "x.json"), "x.json", "/dev/null"):
        check_target(fine)
    for bad in (tmp_path, tmp_path / "missing" / "x.json"):
        with pytest.raises(InputError, match="--json"):
            check_target(str(bad))


@pytest.mark.parametrize(
    ("value", "goal", "met"),
    [
        (2.5, ">= 2.5", True),
        (2.4999, ">=2.5", False),
        (0.002, "<= 0.002", True),
        (0.002, "< 2e-3", False),
        (np.float32(3), "> -1", True),
        (0, "== 0", True),
        (
            3.38833,
            "3.38783 +- 0.0005",
            True,
        ),  # in binary fractions the difference is more than 0.0005
        (3.38733, "3.38783 ± 0.0005", True),
        (3.388331, "3.38783 +- 0.0005", False),
        (float("nan"), "<= 1", False),
        (float("inf"), ">= 1", False),
        (None, ">= 1", False),
        (7, None, None),
    ],
)
def test_goal_met(value, goal, met):
    assert goal_met(value, goal) is met


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_goals_compare_as_python_does(value, limit):
    assert goal_met(value, f">= {limit!r}") is (value >= limit)
    assert goal_met(value, f"< {limit!r}") is (value < limit)


@pytest.mark.parametrize(
    "goal", ["", "2.5", "at least 2", ">= nan", ">= 2.5x", "=> 2", "1 +- ", ">= 1 2"]
)
def test_a_goal_that_cannot_be_read(goal):
    with pytest.raises(InputError, match=r"^goal: .* cannot be read; allowed:"):
        rows([("x", 1, "", goal)], 0.0, {})


def test_a_value_that_is_no_number():
    with pytest.raises(InputError, match=r"^value: 'fast' "):
        goal_met("fast", "> 1")


def test_rows():
    out = rows(
        [("nll", jnp.float32(3.5), "nats", "<= 3"), ("text", "Paris", "")],
        2.0,
        {"seed": np.int32(0)},
    )
    assert out == {
        "rows": [
            {"name": "nll", "value": 3.5, "unit": "nats", "goal": "<= 3", "met": False},
            {"name": "text", "value": "Paris", "unit": "", "goal": None, "met": None},
        ],
        "seconds": 2.0,
        "protocol": {"seed": 0},
    }
