"""The command line of an experiment."""

from __future__ import annotations

import json

import jax
import pytest

from jaxmodel.errors import InputError
from jaxmodel.report import experiment


def run(quick, seed):
    print("noise")
    return [("a", 1.5 + seed, "x", ">= 2")], {"form": "short" if quick else "long"}


def printed(capsys, *args):
    experiment("What it is.\n\nMore.", "less of it", run, args)
    return json.loads(capsys.readouterr().out)


def test_rows_and_protocol_and_nothing_else_on_standard_output(capsys):
    got = printed(capsys)
    assert got["rows"] == [{"name": "a", "value": 1.5, "unit": "x", "goal": ">= 2", "met": False}]
    assert got["seconds"] >= 0 and got["protocol"]["form"] == "long"
    assert (got["protocol"]["quick"], got["protocol"]["seed"], got["protocol"]["jax"]) == (
        False,
        0,
        jax.__version__,
    )
    other = printed(capsys, "--quick", "--seed", "3", "--json", "-")
    assert other["rows"][0]["value"] == 4.5 and other["rows"][0]["met"] is True
    assert (other["protocol"]["quick"], other["protocol"]["seed"], other["protocol"]["form"]) == (
        True,
        3,
        "short",
    )


def test_a_file_and_help(capsys, tmp_path):
    experiment("", "", run, ["--json", str(tmp_path / "x.json")])
    assert json.loads((tmp_path / "x.json").read_text())["rows"]
    with pytest.raises(InputError, match="--json"):  # before the work
        experiment(
            "", "", lambda *_: pytest.fail("ran"), ["--json", str(tmp_path / "missing" / "x.json")]
        )
    capsys.readouterr()
    with pytest.raises(SystemExit):
        printed(capsys, "--help")
    out = capsys.readouterr().out
    assert "What it is." in out and "More." not in out and "less of it" in out
