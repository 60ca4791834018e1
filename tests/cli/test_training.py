"""`jaxmodel train`, `resume`, `replay`: what a run leaves is all that it takes to go on with it or
to compute a step again.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys

import pytest
from rich.console import Console

from jaxmodel import hub, report, sharding
from jaxmodel.checkpoint import places
from jaxmodel.cli import main, training
from jaxmodel.cli.options import Replay, Train, defaults
from jaxmodel.report.training import page as page_of, read_rows
from tests.cli.conftest import run

SIZES = [
    "--width",
    16,
    "--depth",
    2,
    "--heads",
    2,
    "--context",
    16,
    "--batch",
    4,
    "--vocab",
    260,
    "--eval-batches",
    2,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    room = tmp_path_factory.mktemp("runs")
    (room / "a.txt").write_text(
        "\n\n".join(f"{i} is less than {i + 1} and more than {i - 1}." for i in range(300))
    )
    rows = [
        json.dumps({"text": f"twice {i} is {2 * i}, and three times {i} is {3 * i}."})
        for i in range(300)
    ]
    (room / "b.jsonl").write_text("\n".join(rows))
    return room


def options(room):
    mixed = [
        "--data",
        room / "a.txt",
        room / "b.jsonl",
        "--weights",
        3,
        1,
        "--pack",
        "--augment",
        "token_dropout(0, rate=0.1)",
    ]
    often = [
        "--steps",
        12,
        "--save-every",
        4,
        "--log-every",
        1,
        "--gradient-accumulation-steps",
        2,
        "--ema-decay",
        0.9,
        "--sample",
        "1 is",
    ]
    return ["train", *SIZES, *mixed, *often, "--heldout", room / "a.txt"]


@pytest.fixture(scope="module")
def trained(folder):
    with pytest.raises(SystemExit) as end:
        more = (
            "--runs",
            folder / "good",
            "--profile",
            "--tensorboard",
            "--json",
            folder / "trained.json",
        )
        main([str(arg) for arg in (*options(folder), *more)])
    assert end.value.code == 0
    (place,) = (folder / "good").glob("*-train")
    return place, json.loads((folder / "trained.json").read_text())


def test_what_a_run_leaves(trained, sound_page):
    place, result = trained
    assert [row["step"] for row in result["history"]] == list(range(1, 13)) and result[
        "steps"
    ] == 12
    assert [
        json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()
    ] == result["history"]
    assert {
        "loss",
        "grad_norm",
        "learning_rate",
        "tokens_per_second",
        "mfu",
        "data_wait",
        "bad",
    } < set(result["history"][0])
    page = sound_page(place / "report.html")
    assert (
        page.count("<svg") == 4 and "tokens per second" in page and "norm of the gradient" in page
    )
    drawn = ("loss", "learning_rate", "grad_norm", "speed")
    assert all((place / "plots" / f"{name}.png").stat().st_size > 5000 for name in drawn)
    assert list(place.glob("tensorboard/events*")) and list(place.glob("profile/**/*.xplane.pb"))
    config = json.loads((place / "config.json").read_text())
    assert config["resolved"]["augment"] == "token_dropout(token=0)"
    assert [text["documents"] for text in config["resolved"]["data"]] == [300, 300, 300]
    ledger = result["ledger"]
    kinds = sum(value for name, value in ledger.items() if name not in ("wall", "goodput"))
    assert kinds == pytest.approx(ledger["wall"], rel=5e-3)
    assert hub.from_pretrained(result["out"]).model.config.width == 16


def test_a_run_that_goes_on_ends_in_the_same_bits(trained, folder, capsys):
    place, result = trained
    broken = folder / "broken" / place.name
    shutil.copytree(place, broken)
    shutil.rmtree(broken / "checkpoints" / "step-000000012")
    (broken / "report.json").unlink()
    code, again, said = run(capsys, "resume", broken, "--runs", folder / "runs")
    assert code == 0 and "restoring step 8" in said
    assert again["fingerprint"] == result["fingerprint"]
    assert [row["loss"] for row in again["history"]] == [row["loss"] for row in result["history"]]
    assert again["ledger"]["wall"] > result["ledger"]["wall"]


def test_replay_computes_a_step_again(trained, folder, capsys):
    place, result = trained
    before = sorted(place.rglob("*"))
    code, found, _ = run(capsys, "replay", place, "--step", 7, "--runs", folder / "replays")
    assert code == 0 and found["same"] is True and found["from"] == 4 and found["data_step"] == 6
    assert found["loss"] == result["history"][6]["loss"]
    assert sorted(place.rglob("*")) == before


def test_a_step_that_the_run_made_of_another_batch_is_refused(trained, folder, capsys):
    """As after `--on-bad-step rewind`, where the checkpoint before the step is of the time before
    the run
    went back.
    """
    place, result = trained
    rewound = folder / "rewound" / place.name
    shutil.copytree(place, rewound)
    rows = [{**row, "data_step": row["step"] - 1 + (row["step"] > 5)} for row in result["history"]]
    (rewound / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = run(capsys, "replay", rewound, "--step", 7, "--runs", folder / "replays")
    assert (
        code == 2
        and "made it of batch 7, but a replay from the checkpoint before comes to batch 6; " in err
    )
    assert "allowed: steps behind the checkpoint of step 8" in err
    code, found, _ = run(capsys, "replay", rewound, "--step", 5, "--runs", folder / "replays")
    assert code == 0 and found["same"] is True and found["data_step"] == 4


def test_a_run_that_stopped_early_and_one_that_cannot_save_its_end(folder, capsys, monkeypatch):
    more = (
        "--patience",
        1,
        "--eval-every",
        2,
        "--learning-rate",
        0,
        "--save-every",
        0,
        "--out",
        folder / "early",
    )
    code, result, _ = run(
        capsys,
        *options(folder),
        *more,
        "--depth",
        1,
        "--gradient-accumulation-steps",
        1,
        "--runs",
        folder / "stops",
    )
    assert code == 0 and result["steps"] == 4 and result["problem"] is None
    (place,) = (folder / "stops").iterdir()
    code, _, err = run(capsys, "replay", place, "--step", 5, "--runs", folder / "replays")
    assert code == 2 and "--step: 5 given; the run stopped early at step 4" in err
    for gone in (place / "checkpoints", folder / "early"):
        shutil.rmtree(gone)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(places, "write", full)
    code, again, err = run(capsys, "resume", place, "--runs", folder / "runs")
    assert code == 2 and err.splitlines()[-1].startswith(
        "jaxmodel: checkpoints: the last state could not be saved in "
    ), err
    assert (
        again["fingerprint"]
        == result["fingerprint"]
        == json.loads((place / "report.json").read_text())["fingerprint"]
    )
    assert hub.from_pretrained(folder / "early").model.config.width == 16


def test_a_loss_that_is_not_finite_is_no_lack_of_rows():
    rows = [{"step": 6, "loss": None, "heldout_loss": None}]
    result = {
        "stopped": False,
        "out": "there",
        "steps": 6,
        "history": rows,
        "loss": None,
        "heldout_loss": None,
        "problem": None,
    }
    result |= {
        "parameters": 1,
        "devices": 1,
        "mesh": {},
        "tokens_per_second": 1.0,
        "ledger": {"goodput": 1.0},
    }
    result["processor"] = "A, 2 cores, AVX2"
    console = Console(record=True, width=200)
    training.show(result, console)
    training.show({**result, "history": []}, console)
    first, second = console.export_text().splitlines()
    assert "1 tokens/s on A, 2 cores, AVX2, goodput" in first
    assert "loss not finite, held-out not finite" in first and "nothing was left to train" in second


@pytest.mark.parametrize(
    ("devices", "wanted"),
    [
        ({"devices": 8}, [8]),
        ({"launch": {"processes": 2, "devices_per_process": 3}}, [6]),
        ({"processes": 2, "devices_per_process": 3}, [6]),  # as `train` wrote it once
        ({}, []),
    ],
)
def test_a_replay_has_the_devices_of_the_run(devices, wanted, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sharding, "simulate_devices", asked.append)
    config = {"verb": "train", **dataclasses.asdict(Train()), **devices}
    made = report.start_run("train", config, tmp_path)
    training.prepare_replay(Replay(folder=str(made.folder), step=1))
    assert asked == wanted


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--weights", 1, 2, 3], "--weights: 3 given for 2 texts of --data; allowed: one for each"),
        (
            ["--augment", "token_drop(0)"],
            "'token_drop' is not known; allowed: .*nearest: token_dropout",
        ),
        (["--mesh", "data=*,tensor=*"], "mesh: 'data=\\*,tensor=\\*' cannot be read"),
        (["--schedule", "linear"], "--schedule: 'linear' is not known; allowed: constant, "),
        (
            ["--gradient-accumulation-steps", 3],
            "gradient-accumulation-steps: 3 micro-batches do not divide a batch of 4 rows",
        ),
        (["--processes", 3], "--batch: 4 rows do not divide over 3 processes of 1 devices"),
    ],
)
def test_bad_options(change, said, folder, capsys):
    code, _, err = run(capsys, *options(folder), *change, "--runs", folder / "runs")
    assert code == 2 and re.search(said, err), err


def test_a_run_of_another_config_is_refused(trained, folder, capsys):
    place, _ = trained
    changed = folder / "changed" / place.name
    shutil.copytree(place, changed)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**config, "b2": 0.5}))
    code, _, err = run(capsys, "resume", changed, "--runs", folder / "runs")
    assert code == 2 and "train.b2 was 0.95, is 0.5; to" in err


def test_an_ended_run_goes_on_with_more_steps_and_another_rate(trained, folder, capsys):
    place, result = trained
    longer = folder / "longer" / place.name
    shutil.copytree(place, longer)
    code, again, said = run(capsys, "resume", longer, "--steps", 14, "--learning-rate", 0.001)
    assert (
        code == 0 and "steps was 12, is 14" in said and "learning_rate was 0.003, is 0.001" in said
    )
    assert [row["step"] for row in again["history"]] == list(range(1, 15)) and again["steps"] == 14
    assert [row["loss"] for row in again["history"][:12]] == [
        row["loss"] for row in result["history"]
    ]
    assert again["history"][13]["learning_rate"] < again["history"][12]["learning_rate"] < 0.001
    code, ended, said = run(capsys, "resume", longer)  # as it is now
    assert code == 0 and "the run is complete" in said
    assert ended["fingerprint"] == again["fingerprint"]
    before = (longer / "config.json").read_bytes()
    code, _, err = run(capsys, "resume", longer, "--batch", 7)  # the run has 2 micro-batches
    assert (longer / "config.json").read_bytes() == before  # as if it had not been tried
    assert code == 2 and "2 micro-batches do not divide a batch of 7 rows" in err
    code, more, _ = run(capsys, "resume", longer, "--batch", 6, "--steps", 15)
    assert code == 0 and more["steps"] == 15  # behind 56 rows, which 6 does not divide
    code, _, err = run(capsys, "resume", longer, "--steps", 0)
    assert code == 2 and "--steps: 0 given; allowed: a whole number of at least 1" in err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": "20"}, 'steps is "20"; allowed: a whole number'),
        ({"pack": 1}, "pack is 1; allowed: true or false"),
        ({"mesh": 5}, "mesh is 5; allowed: a text or null"),
        ({"data": "a.txt"}, 'data is "a.txt"; allowed: a list, each a text'),
        ({"data": None}, "data is null; allowed: a list, each a text"),
        ({"weights": [1, True]}, "weights[1] is true; allowed: a number"),
        ({"remat": 1}, 'remat is 1; allowed: "none", "full", "dots"'),
        ({"batch": 0}, "batch: 0 given; allowed: a whole number of at least 1"),
        ({"verb": []}, "verb: [] is not known"),
    ],
)
def test_a_config_of_wrong_types_is_refused(change, said, trained, folder, capsys):
    place, _ = trained
    changed = folder / "types"
    changed.mkdir(exist_ok=True)
    shutil.copy(place / "versions.json", changed)
    (changed / "config.json").write_text(
        json.dumps({**json.loads((place / "config.json").read_text()), **change})
    )
    code, _, err = run(capsys, "resume", changed, "--runs", folder / "runs")
    assert code == 2 and f"{changed}/config.json: " in err and said in err, err


def test_a_run_that_was_stopped_is_not_repeated(trained, folder, capsys):
    place, result = trained
    changed = folder / "stopped"
    changed.mkdir()
    for name in ("versions.json", "config.json"):
        shutil.copy(place / name, changed)
    (changed / "report.json").write_text(json.dumps({**result, "stopped": True, "steps": 5}))
    code, _, err = run(capsys, "rerun", changed, "--runs", folder / "runs")
    assert code == 2 and "was stopped at step 5; resume it first" in err


def test_data_that_changed_is_refused(trained, folder, capsys):
    place, _ = trained
    changed = folder / "other" / place.name
    shutil.copytree(place, changed)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**config, "weights": [1.0, 1.0]}))
    code, _, err = run(capsys, "resume", changed, "--runs", folder / "runs")
    assert code == 2 and "a run must continue with the data that it began with" in err


@pytest.mark.parametrize("verb", ["resume", "replay"])
def test_no_run_folder(verb, tmp_path, capsys):
    code, _, err = run(
        capsys,
        verb,
        tmp_path,
        *(["--step", 1] if verb == "replay" else []),
        "--runs",
        tmp_path / "runs",
    )
    assert code == 2 and "is not a run folder" in err


def test_a_page_without_the_package_that_draws(trained, tmp_path, monkeypatch, sound_page):
    """It says in a line what is missing, and has all the rest."""
    place, result = trained
    rows = read_rows(place / "metrics.jsonl")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    made = page_of(report.read_run(place), rows, result, 12, defaults(Train()))
    (tmp_path / "report.html").write_text(made)
    assert "There are no plots here" in sound_page(tmp_path / "report.html") and "<svg" not in made
    assert "pip install" in made and f"{rows[-1]['loss']:.4f}" in made
