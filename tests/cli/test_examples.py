"""`jaxmodel train --data FILE` on chats, prompts with completions, texts with labels."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import jax
import pytest

from jaxmodel import hub
from jaxmodel.models import bert, llama
from tests.cli.conftest import run

TURNS = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}{% if "
    "add_generation_prompt %}[assistant]{% endif %}"
)
PAIRS = [("is a good film", "pos"), ("is a bad film", "neg")] * 8


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """A decoder with a chat template, an encoder, and rows for both."""
    room = tmp_path_factory.mktemp("examples")
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"say {x}"},
                {"role": "assistant", "content": x * 3},
            ]
        }
        for x in "abcdefgh" * 2
    ]
    tokenizer = dataclasses.replace(hub.train_bpe([], 257), chat_template=TURNS)
    for name, family in (("decoder", llama), ("encoder", bert)):
        model = family.model(dataclasses.replace(family.SIZES["tiny"], vocab=257, context=64))
        hub.Bundle(
            model, jax.jit(model.init)(jax.random.key(0)), tokenizer, {"name": name}
        ).save_pretrained(room / name)
    for name, rows in (
        ("chats", chats),
        ("pairs", [{"prompt": f"{x}?", "completion": x} for x in "abcd"]),
        ("labels", [{"text": text, "label": label} for text, label in PAIRS]),
        ("wrong", [chats[0], {"messages": "hi"}]),
        ("tools", [{"name": "a"}]),
    ):
        (room / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return room


def train(room: Path, model: str, rows: str, *more) -> list:
    common = ["--context", 40, "--batch", 8, "--log-every", 5, "--runs", room / "runs"]
    return ["train", "--model", room / model, "--data", room / f"{rows}.jsonl", *common, *more]


@pytest.mark.parametrize("how", [(), ("--pack", "--lora", "r=4,alpha=16")])
def test_chats(room, capsys, how):
    code, result, err = run(
        capsys, *train(room, "decoder", "chats", "--steps", 25, "--learning-rate", 2e-2, *how)
    )
    assert code == 0, err
    assert (
        result["history"][-1]["loss"] < (0.95 if how else 0.6) * result["history"][0]["loss"]
    )  # adapters of random weights
    assert re.match(r"\[user\]say [a-d];\[assistant\]", result["sample"]), (
        "an answer to a held-out question"
    )
    (described,) = result["data"]
    assert described["heldout_rows"] >= 1 and "heldout_loss" in result["history"][-1]
    assert how or described["rows"] + described["heldout_rows"] == 16


def test_completions_without_ten_rows_have_none_held_out(room, capsys):
    code, result, err = run(capsys, *train(room, "decoder", "pairs", "--steps", 2))
    assert code == 0, err
    assert result["heldout_loss"] is None and result["data"][0]["rows"] == 4
    code, result, _ = run(
        capsys, *train(room, "decoder", "pairs", "--steps", 2, "--heldout", room / "pairs.jsonl")
    )
    assert code == 0 and result["heldout_loss"] > 0


def test_labels_make_a_classifier(room, capsys):
    out = room / "classifier"
    more = "--steps", 30, "--learning-rate", 5e-3, "--out", out
    code, result, err = run(capsys, *train(room, "encoder", "labels", *more))
    assert code == 0, err
    assert result["history"][-1]["accuracy"] == 1 and result["history"][-1]["heldout_accuracy"] == 1
    assert hub.from_pretrained(out).labels == ("neg", "pos")
    (room / "one.txt").write_text("is a bad film")
    code, said, _ = run(
        capsys, "predict", out, "--input", room / "one.txt", "--runs", room / "runs"
    )
    assert code == 0 and said["rows"][0]["label"] == "neg"


def test_wrong_rows_are_named(room, capsys):
    for args, says in (
        (train(room, "decoder", "wrong", "--steps", 1), "wrong.jsonl' line 2: 'messages' is str"),
        (
            train(room, "encoder", "chats", "--steps", 1),
            "does not fit data that are chats or prompts with completions; allowed: a decoder",
        ),
        (train(room, "decoder", "tools", "--steps", 1), "'text' is not known; allowed: name"),
        (
            ["train", "--data", room / "chats.jsonl", "--runs", room / "runs"],
            "given for a new model; allowed: with --init",
        ),
        (
            [
                "train",
                "--model",
                room / "decoder",
                "--data",
                room / "chats.jsonl",
                room / "labels.jsonl",
            ],
            "are of several kinds",
        ),
    ):
        code, _, err = run(capsys, *args)
        said = err.strip().splitlines()[-1]
        assert code == 2 and says in said, err
