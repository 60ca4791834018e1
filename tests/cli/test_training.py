"""`jaxmodel train`, `resume`, `replay`: what a run leaves is all that it takes to go on with it or to compute a step again."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from jaxmodel import hub
from jaxmodel.cli import main

SIZES = ["--width", 16, "--depth", 2, "--heads", 2, "--context", 16, "--batch", 4, "--vocab", 260, "--eval-batches", 2]


def run(capsys, *args):
    """Exit code, what `--json -` printed, and standard error."""
    with pytest.raises(SystemExit) as end:
        main([str(arg) for arg in args] + ["--json", "-"])
    out, err = capsys.readouterr()
    return end.value.code, json.loads(out) if out.strip() else None, err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    room = tmp_path_factory.mktemp("runs")
    (room / "a.txt").write_text("\n\n".join(f"{i} is less than {i + 1} and more than {i - 1}." for i in range(300)))
    rows = [json.dumps({"text": f"twice {i} is {2 * i}, and three times {i} is {3 * i}."}) for i in range(300)]
    (room / "b.jsonl").write_text("\n".join(rows))
    return room


def options(room):
    mixed = ["--data", room / "a.txt", room / "b.jsonl", "--weights", 3, 1, "--pack", "--augment", "token_dropout(0, rate=0.1)"]
    often = ["--steps", 12, "--save-every", 4, "--log-every", 1, "--accumulate", 2, "--average", 0.9, "--sample", "1 is"]
    return ["train", *SIZES, *mixed, *often, "--heldout", room / "a.txt"]


@pytest.fixture(scope="module")
def trained(folder):
    with pytest.raises(SystemExit) as end:
        more = ("--runs", folder / "good", "--profile", "--tensorboard", "--json", folder / "trained.json")
        main([str(arg) for arg in (*options(folder), *more)])
    assert end.value.code == 0
    (place,) = (folder / "good").glob("*-train")
    return place, json.loads((folder / "trained.json").read_text())


def test_what_a_run_leaves(trained):
    place, result = trained
    assert [row["step"] for row in result["history"]] == list(range(1, 13)) and result["steps"] == 12
    assert [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()] == result["history"]
    assert {"loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu", "data_wait", "bad"} < set(result["history"][0])
    assert (place / "report.html").read_text().count("<svg") == 4
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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--weights", 1, 2, 3], "--weights: 3 given for 2 texts of --data; allowed: one for each"),
        (["--augment", "token_drop(0)"], "'token_drop' is not known; allowed: .*nearest: token_dropout"),
        (["--mesh", "data=*,tensor=*"], "mesh: 'data=\\*,tensor=\\*' is not readable"),
        (["--schedule", "linear"], "'linear' for argument '--schedule'. Expected one of"),
        (["--accumulate", 3], "accumulate: 3 micro-batches do not divide a batch of 4 rows"),
        (["--processes", 3], "batch: its rows do not divide over 3 processes of 1 devices"),
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
    (changed / "config.json").write_text(json.dumps({**config, "beta2": 0.5}))
    code, _, err = run(capsys, "resume", changed, "--runs", folder / "runs")
    assert code == 2 and "of another config: train.beta2 was 0.95, is 0.5" in err


def test_data_that_changed_is_refused(trained, folder, capsys):
    place, _ = trained
    changed = folder / "other" / place.name
    shutil.copytree(place, changed)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**config, "weights": [1.0, 1.0]}))
    code, _, err = run(capsys, "resume", changed, "--runs", folder / "runs")
    assert code == 2 and "a run goes on with the data that it began with" in err


@pytest.mark.parametrize("verb", ["resume", "replay"])
def test_no_run_folder(verb, tmp_path, capsys):
    code, _, err = run(capsys, verb, tmp_path, *(["--step", 1] if verb == "replay" else []), "--runs", tmp_path / "runs")
    assert code == 2 and "is no run folder" in err
