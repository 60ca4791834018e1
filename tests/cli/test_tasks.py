"""`jaxmodel train` learns what the data and the model suggest, from new or given weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jaxmodel import hub, tree
from jaxmodel.cli.options import Train
from tests.cli.conftest import run

SHORT = ["--steps", 3, "--batch", 4, "--context", 16, "--eval-batches", 1, "--log-every", 1]


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """A folder with data of every kind."""
    room = tmp_path_factory.mktemp("tasks")
    (room / "a.txt").write_text("\n\n".join(f"{i} is less than {i + 1}." for i in range(200)))
    for name, make in {
        "pairs": lambda i: {"source": f"{i} plus 1", "target": f"{i + 1}"},
        "alike": lambda i: {"anchor": f"number {i}", "positive": f"{i}, a number"},
        "labels": lambda i: {"text": f"{i} is here", "label": "odd" if i % 2 else "even"},
    }.items():
        (room / f"{name}.jsonl").write_text("\n".join(json.dumps(make(i)) for i in range(30)))
    for name, axis in (("lying", 0), ("standing", 1)):
        (room / "photos" / name).mkdir(parents=True)
        for i in range(8):
            stripes = (np.indices((16, 16))[axis] // 2 % 2 * 200).astype(np.uint8)
            Image.fromarray(stripes).save(room / "photos" / name / f"{i}.png")
    return room


def train(room: Path, capsys, *more, code=0) -> Any:
    found, result, said = run(capsys, "train", *SHORT, "--runs", room / "runs", *more)
    assert found == code, said
    return result if code == 0 else said.strip().splitlines()[-1]


def test_an_encoder_learns_hidden_tokens_and_then_classes_and_vectors(room, capsys):
    texts = ["--data", room / "a.txt", "--heldout", room / "a.txt", "--vocab", 260]
    result = train(room, capsys, "--model", "bert/tiny", *texts, "--out", room / "masked")
    start = hub.from_pretrained(room / "masked")
    assert result["heldout_loss"] == pytest.approx(np.log(260), rel=0.2)
    assert start.model.config.head == "mlm" and hub.need_processor(start).named_tokens["mask_token"]
    train(
        room, capsys, "--init", room / "masked", "--data", room / "labels.jsonl",
        "--out", room / "classes", "--trainable", "head.*",
    )  # fmt: skip
    made = hub.from_pretrained(room / "classes")
    assert made.model.config.labels == ("even", "odd")
    old = tree.flatten(start.params)
    for path, leaf in tree.flatten(made.params).items():  # the body did not train
        assert path.startswith("head") or np.array_equal(leaf, old[path]), path
    alike = ["--data", room / "alike.jsonl", "--out", room / "vectors"]
    result = train(room, capsys, "--init", room / "masked", *alike)
    assert hub.from_pretrained(room / "vectors").model.config.head == "embed"
    assert 0 < result["loss"] < 4


def test_adapters_of_a_classifier_go_with_its_head(room, capsys):
    """In PEFT's layout; and the base, which has a head of another kind, takes both."""
    texts = ["--data", room / "a.txt", "--heldout", room / "a.txt", "--vocab", 260]
    train(room, capsys, "--model", "bert/tiny", *texts, "--out", room / "start")
    more = ["--lora", "4", "--learning-rate", 0.02, "--steps", 40, "--out", room / "small"]
    train(room, capsys, "--init", room / "start", "--data", room / "labels.jsonl", *more)
    assert {path.name for path in (room / "small").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    config = json.loads((room / "small" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and "classifier" in config["modules_to_save"]
    base = tree.flatten(hub.from_pretrained(room / "start").params)
    made = hub.from_pretrained(room / "start", adapters=room / "small")
    assert made.labels == ("even", "odd")
    leaves = tree.flatten(made.params)
    assert all(np.array_equal(leaves[path], leaf) for path, leaf in base.items() if path in leaves)
    assert any(np.any(leaves[path]) for path in leaves if path.endswith("_lora/up"))
    for i in (3, 8):
        (room / f"{i}.txt").write_text(f"{i} is here")
    files = ["--input", room / "3.txt", room / "8.txt", "--runs", room / "runs"]
    code, said, err = run(capsys, "predict", room / "start", "--adapter", room / "small", *files)
    assert code == 0 and [row["label"] in ("even", "odd") for row in said["rows"]] == [True] * 2
    assert said["classes"] == 2, err


def test_adapters_beside_a_new_head_are_refused(room, capsys):
    """The head would be random and neither train nor be saved."""
    vectors = ["--data", room / "alike.jsonl", "--out", room / "no-head", "--vocab", 260]
    train(room, capsys, "--model", "bert/tiny", "--task", "embed", *vectors)
    more = ["--task", "masked", "--data", room / "a.txt", "--lora", 2, "--out", room / "none"]
    said = train(room, capsys, "--init", room / "no-head", *more, code=2)
    assert "head/" in said and "would be new and not train" in said
    assert not (room / "none").exists()


def test_an_encoder_with_a_decoder_learns_pairs(room, capsys):
    data = ["--data", room / "pairs.jsonl", "--out", room / "writes"]
    result = train(room, capsys, "--model", "t5/tiny", "--vocab", 260, *data)
    made = hub.from_pretrained(room / "writes")
    assert made.model.config.start == hub.need_processor(made).eos_ids[0]
    assert result["loss"] == pytest.approx(np.log(made.model.config.vocab), rel=0.3)


@pytest.mark.parametrize("size", ["lenet/tiny", "vit/tiny"])
def test_a_model_of_images_learns_the_classes_of_a_folder(size, room, capsys):
    out = room / size.partition("/")[0]
    result = train(room, capsys, "--model", size, "--data", room / "photos", "--out", out)
    assert "heldout_accuracy" in result["history"][-1] and result["rows_per_second"] > 0
    made = hub.from_pretrained(out)
    assert tuple(made.card.get("labels", getattr(made.model.config, "labels", ()))) == (
        "lying",
        "standing",
    )


def test_what_model_means():
    for name in ("bert/tiny", "llama/tiny", "gpt2/gpt2-xl"):
        assert (Train(model=name).model, Train(model=name).init) == (name, None)
    for name in ("smollm2-135m", "org/name", "some/folder/below"):
        assert (Train(model=name).model, Train(model=name).init) == (None, name)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ["--model", "bert/tiny", "--init", "x"],
            "--init: '.*x' given with --model 'bert/tiny'; al",
        ),
        (["--model", "bert/tinny"], "--model: 'bert/tinny' is not known; .*nearest"),
        (
            ["--model", "bert/tiny", "--width", 8],
            "--width: 8 given with --model, which has its own",
        ),
        (["--model", "bert/tiny", "--lora", 4], "--lora: given without --init"),
        (["--model", "bert/tiny", "--task", "seq2seq"], "--task: seq2seq given for data .* texts"),
        (["--model", "bert/tiny", "--task", "language"], "--task: language given for 'bert/tiny'"),
        (["--model", "lenet/tiny"], "--model: 'lenet/tiny' does not fit data that are texts"),
        (["--model", "gpt2/tiny", "--trainable", "hedd"], "--trainable: 'hedd' matches no leaf"),
        (["--model", "gpt2/tiny", "--trainable", "("], "--trainable: '\\(' .* no regular expres"),
        (["--init", "x", "--trainable", "a", "--lora", 4], "--trainable: given with --lora"),
    ],
)
def test_what_contradicts_is_refused(more, said, room, capsys):
    texts = ["--data", room / "a.txt", "--heldout", room / "a.txt"]
    line = train(room, capsys, *texts, *more, code=2)
    assert re.search(said, line), line
