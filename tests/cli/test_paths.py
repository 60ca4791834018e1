"""Files that options name: `~`, spaces, and `-` for standard input, in every verb that reads."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys

import jax
import pytest

from jaxmodel import hub
from jaxmodel.cli.main import read
from jaxmodel.cli.options import VERBS
from jaxmodel.cli.paths import PATHS
from jaxmodel.cli.words import checked, kinds
from jaxmodel.models import bert
from tests.cli.conftest import TEXT, run

QUICK = ["--max-new-tokens", 2]


def words_with(verb, name, value):
    """A command line of a verb in which one option has this value."""
    words = [verb]
    for other, kind in kinds(VERBS[verb]).items():
        if kind.placed:
            words.append(value if other == name else "train" if verb == "launch" else "bash")
        elif other == name:
            words.append(f"--{other}={value}")
        elif kind.label:
            words.append(f"--{other}=1")
    return words


@pytest.mark.parametrize("verb", VERBS)
def test_a_tilde_is_the_home_folder_in_every_path(verb, monkeypatch):
    monkeypatch.setenv("HOME", "/rooms/some one")
    for name in PATHS & {name.replace("-", "_") for name in kinds(VERBS[verb])}:
        made = checked(words_with(verb, name, "~/my models/a b"))
        assert any(word.endswith("/rooms/some one/my models/a b") for word in made), (name, made)
        assert not any("~" in word for word in made), name
    for name in {"prompt", "stop", "sample"} & kinds(VERBS[verb]).keys():  # texts stay as they are
        assert any("~/x" in word for word in checked(words_with(verb, name, "~/x")))


@pytest.fixture
def home(folder, tmp_path, monkeypatch):
    """A home folder with a space in its name, a model and a text in it."""
    room = tmp_path / "some one"
    shutil.copytree(folder / "tiny", room / "my models" / "tiny")
    (room / "my models" / "a text.txt").write_text(TEXT)
    (room / "my models" / "my recipe.yaml").write_text("base: rtn(bits=8)\n")
    monkeypatch.setenv("HOME", str(room))
    return room


def test_home_folders_and_spaces_in_the_verbs_that_read(home, tmp_path, capsys):
    model = "~/my models/tiny"
    runs = ["--runs", tmp_path / "runs"]
    score = ["--data=~/my models/a text.txt", "--window", 16, "--max-windows", 2]
    code, scored, said = run(capsys, "eval", model, *score, *runs)
    assert code == 0 and scored["predictions"] == 30, said
    code, summed, _ = run(capsys, "summary", model)
    assert code == 0 and summed["weights"] is True
    small = ["--recipe=~/my models/my recipe.yaml", "--out=~/my models/small one"]
    assert run(capsys, "compress", model, *small, *runs)[0] == 0
    code, text, _ = run(capsys, "generate", "~/my models/small one", "The quick", *QUICK, *runs)
    assert code == 0 and len(text["ids"]) <= 2
    chosen = read(["train", "--data=~/my models/a text.txt", "--init=~/my models/tiny"])
    assert chosen.data == (str(home / "my models" / "a text.txt"),)
    assert chosen.init == str(home / "my models" / "tiny")


@pytest.fixture
def standard_input(monkeypatch):
    def give(content):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    return give


def test_standard_input_in_the_verbs_that_read(folder, tmp_path, capsys, standard_input):
    runs = ["--runs", tmp_path / "runs"]
    score = ["--window", 16, "--max-windows", 2, *runs]
    _, wanted, _ = run(capsys, "eval", folder / "tiny", "--data", folder / "text.txt", *score)
    standard_input(TEXT.encode())
    code, found, said = run(capsys, "eval", folder / "tiny", "--data", "-", *score)
    assert code == 0 and found["nll"] == wanted["nll"], said

    standard_input(b"The quick")
    code, found, _ = run(capsys, "generate", folder / "tiny", "-", *QUICK, *runs)
    assert code == 0 and found["prompt"] == "The quick"
    standard_input(b"base: rtn(bits=4, group=16)\n")
    code, found, said = run(
        capsys, "compress", folder / "tiny", "--recipe", "-", "--out", tmp_path / "small", *runs
    )
    assert code == 0 and found["bits_per_weight"] < 9, said
    standard_input(b"train: {steps: 7}\n")
    assert read(["train", "--config", "-", "--batch", "3"]).steps == 7
    standard_input(b"train: {steps: 7}\n")
    assert "--steps=7" in read(["launch", "--processes=2", "train", "--config=-"]).command


def test_predict_reads_standard_input(tmp_path, capsys, standard_input):
    tokenizer = hub.train_bpe([TEXT], 280)
    config = bert.SIZES["tiny"]
    changed = {"vocab": tokenizer.vocab_size, "head": "classify", "labels": ("bad", "good")}
    model = bert.model(type(config)(**{**vars(config), **changed}))
    bundle = hub.Bundle(model, jax.jit(model.init)(jax.random.key(0)), tokenizer)
    bundle.save_pretrained(tmp_path / "judge")
    (tmp_path / "one.txt").write_text("The quick brown fox")
    standard_input(b"The quick brown fox")
    words = ["--input", tmp_path / "one.txt", "-", "--runs", tmp_path / "runs"]
    code, found, said = run(capsys, "predict", tmp_path / "judge", *words)
    assert code == 0, said
    one, other = found["rows"]
    assert one["top"] == other["top"] and os.path.basename(other["file"]) == "standard-input"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "--data", "-"], "--data: '-' given for a run, which must find its data again"),
        (["resume", "x", "--heldout", "-"], "--heldout: '-' given for a run"),
        (["generate", "m", "-", "--chat", "--system", "-"], "--system: '-' given twice"),
        (["predict", "m", "-", "-"], "--input: '-' given twice"),
    ],
)
def test_standard_input_that_cannot_be_used(words, says, capsys, standard_input):
    standard_input(b"text")
    code, _, said = run(capsys, *words)
    assert code == 2 and says in said and said.count("\n") == 1, said


def test_a_prompt_that_is_no_text(capsys, standard_input):
    standard_input(b"\xff\xfe")
    code, _, said = run(capsys, "generate", "m", "-")
    assert code == 2 and "--prompt: standard input is no UTF-8 text" in said
    assert json.dumps(said).count("\\n") == 1
