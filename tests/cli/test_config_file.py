"""`jaxmodel train --config FILE`: what a file says is what options say, and what is wrong in it is
one line.
"""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from jaxmodel.cli import main
from jaxmodel.cli.groups import BOX_OF, SECTIONS, section
from jaxmodel.cli.main import read
from jaxmodel.cli.options import Train
from jaxmodel.errors import InputError

YAML = """
model: {width: 32, heads: 2}
data: {data: [english, pydoc], weights: [1, 2], pack: true}
optim: {learning-rate: 1e-3, clip: 2.0}
train: {steps: 7}
"""
TOML = """
[model]
width = 32
heads = 2
[data]
data = ["english", "pydoc"]
weights = [1, 2]
pack = true
[optim]
learning_rate = 1e-3
max_grad_norm = 2.0
[train]
steps = 7
"""
WORDS = "--width 32 --heads 2 --data english pydoc --weights 1 2 --pack --learning-rate 1e-3"


@pytest.mark.parametrize(("name", "text"), [("a.yaml", YAML), ("a.toml", TOML)])
def test_a_file_says_what_options_say(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    config = str(tmp_path / name)
    wanted = read(["train", *WORDS.split(), "--max-grad-norm", "2", "--steps", "7"])
    assert read(["train", "--config", config]) == wanted
    assert read(["train", f"--config={config}", "--steps", "9"]) == dataclasses.replace(
        wanted, steps=9
    )
    changed = read(["train", "--no-pack", "--data", "pydoc", "--weights=1", "--config", config])
    assert (changed.data, changed.weights, changed.pack) == (("pydoc",), (1.0,), False)


def test_a_printed_config_gives_the_same_options(tmp_path, capsys):
    words = ["train", *WORDS.split(), "--mesh", "fsdp=2", "--trainable", "head", ".*norm.*"]
    with pytest.raises(SystemExit) as end:
        main([*words, "--print-config"])
    printed = capsys.readouterr().out
    assert end.value.code == 0 and list(yaml.safe_load(printed)) == list(SECTIONS)
    (tmp_path / "printed.yml").write_text(printed)
    assert read(["train", "--config", str(tmp_path / "printed.yml")]) == read(words)


def test_every_option_has_a_section():
    fields = {field.name for field in dataclasses.fields(Train)}
    assert fields | {"adapter"} == BOX_OF.keys()  # --adapter is of the other verbs
    assert {section(name) for name in fields} == set(SECTIONS)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("optim: {learning_rat: 3}", "optim.learning_rat is unknown; nearest optim.learning_rate"),
        ("optm: {learning_rate: 3}", "section: 'optm' is not known; .*nearest: optim"),
        ("model: {steps: 3}", "model.steps: allowed: in section 'train'"),
        ("steps: 3", "'steps' belongs in 'train'"),
        ("stream: bfloat16", "'activation_dtype' belongs in 'model'"),
        ("train: {steps: x}", "--steps: 'x' given; allowed: a whole number"),
        ("train: {steps: {a: 1}}", "train.steps: {'a': 1} given; allowed: a value"),
        ("optim: {optimizer: adam}", "--optimizer: 'adam' is not known; .*nearest: adamw"),
        ("train: [1]", "train: allowed: options with their values"),
        ("[1]", "allowed: the sections model, data, optim, train, run"),
        ("train: {steps: 3", "not YAML"),
        ("train: {config: a.yaml}", "train.config is unknown"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line(tmp_path, text, says):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=says) as caught:
        read(["train", "--config", str(path)])
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_file_with_processes_starts_these(tmp_path):
    """As `train` had them among its options once."""
    path = tmp_path / "old.yaml"
    path.write_text("run: {processes: 2, elastic: true}\ntrain: {steps: 3}")
    made = read(["train", "--config", str(path)])
    assert (made.processes, made.elastic, made.command) == (2, True, ("train", "--steps=3"))
    path.write_text("run: {processes: 1, devices_per_process: 1, elastic: false}")
    assert read(["train", "--config", str(path)]) == Train()


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("steps = 3")
    with pytest.raises(InputError, match=r"allowed: a \.yaml, \.yml or \.toml file"):
        read(["train", "--config", str(tmp_path / "a.txt")])
    with pytest.raises(InputError, match="--config: no value given"):
        read(["train", "--config"])
    (tmp_path / "a.toml").write_text("steps = ")
    with pytest.raises(InputError, match="not TOML"):
        read(["train", "--config", str(tmp_path / "a.toml")])
