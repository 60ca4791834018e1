"""`jaxmodel train --model`: weights that are there already are trained, all or adapters, and the
other verbs take these.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxmodel import hub, tree
from jaxmodel.cli import main
from jaxmodel.models import bert, llama
from tests.cli.conftest import run

TEXT = "\n\n".join(f"{i} is less than {i + 1}." for i in range(200))


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """A folder with a text, a small model and runs."""
    room = tmp_path_factory.mktemp("tuning")
    (room / "a.txt").write_text(TEXT)
    tokenizer = hub.train_bpe([TEXT], 270)
    model = llama.model(
        dataclasses.replace(llama.SIZES["tiny"], vocab=tokenizer.vocab_size, context=64)
    )
    hub.Bundle(
        model, jax.jit(model.init)(jax.random.key(0)), tokenizer, {"name": "little"}
    ).save_pretrained(room / "base")
    return room


def train(room: Path, *more) -> list:
    short = [
        "--steps",
        6,
        "--batch",
        4,
        "--context",
        16,
        "--eval-batches",
        2,
        "--sample",
        "1 is",
        "--log-every",
        1,
    ]
    texts = ["--data", room / "a.txt", "--heldout", room / "a.txt", "--runs", room / "runs"]
    return ["train", "--model", room / "base", *texts, *short, *more]


@pytest.fixture(scope="module")
def adapters(room) -> Path:
    """What `train --lora` leaves."""
    with pytest.raises(SystemExit) as end:
        lora = "r=2,alpha=6,targets=q|v|down"
        main(
            [
                str(arg)
                for arg in train(
                    room, "--lora", lora, "--learning-rate", 0.05, "--out", room / "mine"
                )
            ]
        )
    assert end.value.code == 0
    return room / "mine"


def test_adapters_alone_are_trained_and_saved(room, adapters):
    assert {path.name for path in adapters.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    config = json.loads((adapters / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (2, 6, "CAUSAL_LM")
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert config["base_model_name_or_path"] == str(room / "base")
    up = tree.flatten(hub.from_pretrained(room / "base", adapters=adapters).params)[
        "blocks/0-2/attn/q_lora/up"
    ]
    assert np.abs(up).max() > 0


def test_the_other_verbs_take_them(room, adapters, capsys):
    score = ["--data", room / "a.txt", "--window", 16, "--max-windows", 8, "--runs", room / "runs"]
    _, before, _ = run(capsys, "eval", room / "base", *score)
    _, after, _ = run(capsys, "eval", room / "base", "--adapter", adapters, *score)
    assert after["nll"] < before["nll"] - 0.1
    code, merged, _ = run(
        capsys,
        "merge",
        room / "base",
        "--adapter",
        adapters,
        "--out",
        room / "merged",
        "--runs",
        room / "runs",
    )
    assert code == 0 and set(merged["merged"].values()) == {"exact"}
    _, whole, _ = run(capsys, "eval", room / "merged", *score)
    assert whole["nll"] == pytest.approx(after["nll"], abs=1e-4)
    small = [
        "--recipe",
        "rtn(bits=8)",
        "--out",
        room / "small",
        "--adapter",
        adapters,
        "--runs",
        room / "runs",
    ]
    code, _, _ = run(capsys, "compress", room / "base", *small)
    _, smaller, _ = run(capsys, "eval", room / "small", *score)
    assert code == 0 and smaller["nll"] == pytest.approx(after["nll"], abs=0.05)
    words = ["--prompt", "1 is", "--max-new-tokens", 4, "--runs", room / "runs"]
    _, one, _ = run(capsys, "generate", room / "base", "--adapter", adapters, *words)
    _, other, _ = run(capsys, "generate", room / "merged", *words)
    assert one["text"] == other["text"]


def test_all_weights_are_trained_from_where_they_are(room, capsys):
    code, result, _ = run(capsys, *train(room, "--learning-rate", 0.01, "--out", room / "whole"))
    assert code == 0
    base = hub.from_pretrained(room / "base")
    tuned = hub.from_pretrained(room / "whole")
    assert tuned.model is base.model and hub.need_processor(tuned).encode(
        TEXT
    ) == hub.need_processor(base).encode(TEXT)
    assert result["history"][0]["loss"] > result["history"][-1]["loss"]
    assert all(
        np.any(a != tree.flatten(tuned.params)[path])
        for path, a in tree.flatten(base.params).items()
    )
    assert (tuned.card["name"], tuned.card["steps"]) == ("little", 6)


def test_the_usual_rate_fits_what_is_trained(room):
    from jaxmodel.cli.options import Train

    rates = [one.learning_rate for one in (Train(), Train(model="x", lora="r=8"), Train(model="x"))]
    assert (
        rates == [3e-3, 2e-4, 2e-5] and Train(model="x", learning_rate=1e-4).learning_rate == 1e-4
    )


def test_wrong_settings_are_refused(room, capsys):
    model = bert.model(bert.SIZES["tiny"])
    hub.Bundle(model, jax.jit(model.init)(jax.random.key(0))).save_pretrained(room / "encoder")
    (room / "full").mkdir(exist_ok=True)
    (room / "full" / "notes.txt").write_text("mine")
    for args, message in (
        (
            train(room, "--lora", "rank=8"),
            "--lora: 'rank' is not known; allowed: alpha, dropout, r, rslora, targets",
        ),
        (train(room, "--lora", "r=two"), "--lora: 'r=two' given; allowed: such as r=8,alpha=16"),
        (train(room, "--lora", "r=0"), "rank: 0 given"),
        (
            train(room, "--lora", "targets=.*"),
            "--lora: targets='.*' given; allowed: names of matrices",
        ),
        (
            train(room, "--lora", "r=2,targets=qq"),
            "--lora: targets: 'qq' is not known; allowed: down, gate, ",
        ),
        (
            train(room, "--lora", "r=2", "--out", room / "base"),
            "holds 'config.json', which is not a file of adapters alone",
        ),
        (train(room, "--context", 65), "--context: 65 given; allowed: at most the 64 of "),
        (["train", "--lora", "r=2", "--runs", room / "runs"], "--lora: given without --init"),
        (
            ["train", "--init", room / "encoder", "--task", "language", "--runs", room / "runs"],
            "encoder'; allowed: a decoder",
        ),
        (
            ["merge", room / "base", "--adapter", room / "full", "--out", room / "x"],
            "'adapter_config.json' is missing",
        ),
    ):
        code, _, said = run(capsys, *args)
        assert code == 2 and message in said.strip().splitlines()[-1], said
