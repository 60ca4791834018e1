"""Run folders."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel.errors import InputError
from jaxmodel.report import read_run, run as run_file, start_run

CONFIG = {
    "verb": "demo",
    "seed": np.int64(3),
    "dtype": jnp.bfloat16,
    "rate": float("inf"),
    "data": Path("a"),
}


def test_a_run_comes_back(tmp_path):
    run = start_run("demo", CONFIG, tmp_path / "deep" / "runs")
    assert run.folder.parent == tmp_path / "deep" / "runs"
    assert len(run.folder.name) == len("20260101-000000-demo") and run.folder.name.endswith("-demo")
    run.log(step=0, loss=jnp.float32(2.5))
    run.log(step=1, loss=float("nan"))
    back = read_run(run.folder)
    assert back == run
    assert back.config == {
        "verb": "demo",
        "seed": 3,
        "dtype": "bfloat16",
        "rate": None,
        "data": "a",
    }
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 0, "loss": 2.5},
        {"step": 1, "loss": None},
    ]


def test_what_the_options_came_to_is_added(tmp_path):
    run = start_run("train", {"verb": "train", "seed": 1}, tmp_path)
    run.resolve(model={"width": np.int64(8)}, rate=0.5)
    run.resolve(data=("a", 1))
    resolved = {"model": {"width": 8}, "rate": 0.5, "data": ["a", 1]}
    assert (
        run.config
        == read_run(run.folder).config
        == {"verb": "train", "seed": 1, "resolved": resolved}
    )


def test_versions_say_what_it_ran_on(tmp_path):
    versions = json.loads((start_run("v", {}, tmp_path).folder / "versions.json").read_text())
    assert versions["python"] == platform.python_version()
    assert versions["jax"] == jax.__version__ and versions["numpy"] == np.__version__
    assert {"jaxmodel", "jaxlib", "flax", "optax", "platform", "git"} <= set(versions)
    assert versions["devices"] == {
        "platform": "cpu",
        "kind": "cpu",
        "count": jax.device_count(),
        "processes": 1,
    }
    assert versions["cpu"]["count"] == len(os.sched_getaffinity(0)) and versions["cpu"]["model"]
    if platform.machine() == "x86_64":
        shown = set(Path("/proc/cpuinfo").read_text().split("flags")[1].splitlines()[0].split())
        assert set(versions["cpu"]["flags"]) < shown and ("avx2" in shown) == (
            "avx2" in versions["cpu"]["flags"]
        )


def test_git_commit_and_dirt(tmp_path, monkeypatch):
    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", tmp_path, *who, *words], check=True, capture_output=True, text=True
        ).stdout

    monkeypatch.setattr(run_file, "__file__", str(tmp_path / "run.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert run_file._git() is None  # no repository
    git("init")
    assert run_file._git() is None  # no commit yet
    git("commit", "--allow-empty", "-m", "x")
    assert run_file._git() == {"commit": git("rev-parse", "HEAD").strip(), "dirty": False}
    (tmp_path / "new.py").touch()
    assert run_file._git()["dirty"] is True


def test_runs_started_at_once_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(run_file, "versions", dict)
    monkeypatch.setattr(run_file.time, "strftime", lambda form: "20260101-000000")
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda i: start_run("x", {"i": i}, tmp_path), range(8)))
    assert len({run.folder for run in runs}) == 8
    assert {"20260101-000000-x", "20260101-000000-x-2", "20260101-000000-x-8"} <= set(
        os.listdir(tmp_path)
    )
    assert [read_run(run.folder).config["i"] for run in runs] == list(range(8))


def test_saved_files(tmp_path):
    run = start_run("x", {}, tmp_path)
    assert run.save_bytes("plots/loss.png", b"png") == run.folder / "plots" / "loss.png"
    assert (run.folder / "plots" / "loss.png").read_bytes() == b"png"
    assert json.loads(run.save_json("report.json", {"a": jnp.arange(2)}).read_text()) == {
        "a": [0, 1]
    }
    for outside in ("../x", "/tmp/x", ""):
        with pytest.raises(InputError, match="leads out of the run folder"):
            run.path(outside)


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".hidden", "a b"])
def test_names_that_cannot_be(tmp_path, name):
    with pytest.raises(InputError, match=r"^name: .*; allowed: letters"):
        start_run(name, {}, tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_root_that_is_a_file(tmp_path):
    (tmp_path / "runs").touch()
    with pytest.raises(InputError, match=r"^folder: .* is a file; allowed: a folder"):
        start_run("x", {}, tmp_path / "runs")


@pytest.mark.parametrize("content", [None, "", "[]", "{"])
def test_what_is_no_run_folder(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(
        InputError, match=r"is not a run folder \(config.json .*; allowed: runs/<time>-<name>"
    ):
        read_run(tmp_path)
