"""`jaxmodel resume` with options: what may change does, and is kept; what may not is refused."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from jaxmodel.cli import main, rerun
from jaxmodel.cli.main import read
from jaxmodel.cli.options import Resume, Train
from jaxmodel.cli.train_options import CHANGEABLE
from tests.cli.conftest import run

TEXT = "\n\n".join(f"{i} is less than {i + 1} and more than {i - 1}." for i in range(300))
SHORT = "--width 16 --depth 2 --heads 2 --context 16 --batch 8 --vocab 260 --eval-batches 2"
OFTEN = "--steps 6 --save-every 3 --log-every 1"
FORM = f"{OFTEN} --patience 2 --eval-every 2 --ema-decay 0.9 --spike 20"
CHANGED = (
    "--steps 8 --learning-rate 0.001 --warmup-steps 2 --schedule wsd --final-lr-fraction 0.2 "
    "--stable-fraction 0.7 --step-size 2 --gamma 0.2 --weight-decay 0.2 --max-grad-norm 2 --b2 0.9 "
    "--gradient-accumulation-steps 2 --ema-decay 0.8 --batch 4 --augment token_dropout(0) "
    "--eval-every 1 --eval-batches 1 --patience 7 --dtype bfloat16 --activation-dtype bfloat16 "
    "--remat full --unroll 2 --devices 1 --on-bad-step stop --spike 9 --save-every 4 "
    "--save-seconds 60 --watchdog 300 --notices http://localhost:1/ --log-every 2 --profile "
    "--tensorboard --sample 2"
)
ELSEWHERE = {"microbatches", "pipeline", "mesh"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a run on one device."""
    room = tmp_path_factory.mktemp("resume")
    (room / "a.txt").write_text(TEXT)
    texts = ["--data", room / "a.txt", "--heldout", room / "a.txt", "--runs", room / "runs"]
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in ("train", *SHORT.split(), *FORM.split(), *texts)])
    assert end.value.code == 0
    (place,) = (room / "runs").iterdir()
    return place


def copy(place: Path, to: Path, upto: int) -> Path:
    """A copy of the run as it was when it was killed behind the checkpoint of a step."""
    made = Path(shutil.copytree(place, to))
    for one in (made / "checkpoints").glob("step-*"):
        if int(one.name.removeprefix("step-")) > upto:
            shutil.rmtree(one)
    (made / "report.json").unlink()
    return made


def losses(place: Path) -> dict[int, float]:
    lines = (place / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["loss"] for row in map(json.loads, lines)}


def test_on_a_mesh_of_eight_devices_the_losses_are_the_same(tmp_path, devices8):
    (tmp_path / "a.txt").write_text(TEXT)
    texts = ["--data", "a.txt", "--heldout", "a.txt"]
    once = ["train", *SHORT.split(), *OFTEN.split(), *texts]
    again = ["resume", "{run}", "--devices", "8", "--mesh", "fsdp=4,tensor=2"]
    devices8(
        f"""
        import contextlib, os, pathlib, shutil
        from jaxmodel.cli import main
        os.chdir({str(tmp_path)!r})
        with contextlib.suppress(SystemExit):
            main({once})
        (run,) = pathlib.Path("runs").iterdir()
        shutil.copytree(run, "killed")
        shutil.rmtree("killed/checkpoints/step-000000006")
        main([word.format(run="killed") for word in {again}])
    """,
        fresh=True,
    )
    (whole,) = (tmp_path / "runs").iterdir()
    place = tmp_path / "killed"
    assert json.loads((place / "report.json").read_text())["mesh"] == {"fsdp": 4, "tensor": 2}
    assert losses(place) == pytest.approx(losses(whole), rel=1e-5)
    config = json.loads((place / "config.json").read_text())
    assert (config["mesh"], config["devices"]) == ("fsdp=4,tensor=2", 8)
    written = yaml.safe_load((place / "config.yaml").read_text())["run"]
    assert (written["mesh"], written["devices"]) == ("fsdp=4,tensor=2", 8)


@pytest.mark.filterwarnings("ignore:Error writing persistent compilation cache entry")
def test_all_that_may_change_changes_at_once_and_is_kept(trained, tmp_path, capsys):
    place = copy(trained, tmp_path / "run", upto=6)
    places = ["--heldout", tmp_path / "b.txt", "--out", tmp_path / "out"]
    (tmp_path / "b.txt").write_text(TEXT * 2)
    words = ["resume", str(place), *CHANGED.split(), *map(str, places)]
    options = read(words)
    assert options.given.keys() == set(CHANGEABLE) - ELSEWHERE
    code, result, said = run(capsys, *words)
    assert code == 0 and result["steps"] == 8 and result["out"] == str(tmp_path / "out"), said
    kept = rerun.trained_by(str(place))
    assert {name: getattr(kept, name) for name in options.given} == options.given
    assert read(["train", "--config", str(place / "config.yaml")]) == dataclasses.replace(
        kept, out=None, runs="runs"
    )


def test_every_other_option_of_train_is_refused(trained, capsys):
    fixed = {field.name for field in dataclasses.fields(Train)} - {*CHANGEABLE, "json", "runs"}
    for name in sorted(fixed):
        code, _, said = run(capsys, "resume", trained, f"--{name.replace('_', '-')}", "1")
        assert code == 2 and "a run that goes on cannot change it" in said, said
        assert (
            f"--{name.replace('_', '-')}:" in said and "allowed: --steps, --learning-rate" in said
        )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("--patience 0", "--patience: 0 given for a run with 2, .* allowed: above 0"),
        ("--spike 0", "--spike: 0.0 given for a run with 20.0, .* allowed: above 0"),
        ("--ema-decay 0", "--ema-decay: 0.0 given for a run with 0.9"),
        ("--schedule plateau", "--schedule: plateau given for a run with cosine, .* allowed: con"),
        ("--mesh fdsp=1", "--mesh: 'fdsp' is not known"),
        ("--mesh fsdp=2", "needs 2 devices; there are 1"),
        ("--batch 0", "--batch: 0 given; allowed: a whole number of at least 1"),
        ("--eval-batches 0", "--eval-batches: 0 given"),
        ("--notices nowhere", "--notices: 'nowhere' given; allowed: a URL"),
        ("--microbatches 4", "--microbatches: 4 given without an axis pipeline"),
        ("--stepz 4", "--stepz is unknown; nearest --steps"),
    ],
)
def test_what_cannot_be_leaves_the_run_as_it_was(trained, capsys, change, says):
    names = ("config.json", "config.yaml")
    before = [(trained / name).read_bytes() for name in names]
    code, _, said = run(capsys, "resume", trained, *change.split())
    assert code == 2 and re.search(says, said), said
    assert [(trained / name).read_bytes() for name in names] == before


def test_options_mean_the_same_as_those_of_train():
    of_train = {field.name: field for field in dataclasses.fields(Train)}
    assert set(CHANGEABLE) <= of_train.keys()
    for name in CHANGEABLE:
        assert f"      {name}: " in (Resume.__doc__ or ""), "its sentence in the help"
