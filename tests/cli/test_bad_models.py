"""Folders that cannot be loaded: one line that says why, exit code 2, and no weight read before all
is checked.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmodel import hub
from jaxmodel.cli import main
from jaxmodel.hub.weights import Folder
from jaxmodel.models import gpt2

GOLDENS = Path(__file__).parents[1] / "hub" / "goldens"
UP = "model.layers.1.mlp.up_proj.weight"


def _config(**change: Any) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))

    return edit


def _short(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {UP: np.ascontiguousarray(tensors[UP][1:])}, folder / "model.safetensors")


def _tokens(folder: Path) -> None:
    hub.train_bpe([], 257).save(folder)


def _refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one line that a command ends with, at exit code 2."""
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in args])
    err = capsys.readouterr().err.splitlines()
    lines = [line for line in err if line.startswith("jaxmodel: ")]
    assert end.value.code == 2 and len(lines) == 1 and "Traceback" not in str(err), err
    return lines[0]


@pytest.mark.parametrize("verb", ["summary", "eval"])
@pytest.mark.parametrize(
    ("source", "damage", "says"),
    [
        (
            "llama-untied",
            _config(model_type="lama"),
            "config.json: model_type: 'lama' is not known; allowed: bert, clip",
        ),
        (
            "llama-untied",
            _short,
            f"the tensor {UP!r} has shape [23, 16]; the config needs [24, 16]",
        ),
        (
            "llama-tied",
            lambda folder: (folder / "model-00003-of-00004.safetensors").unlink(),
            "the file 'model-00003-of-00004.safetensors' is missing",
        ),
        (
            "llama-untied",
            _config(rope_parameters={"rope_type": "axial", "rope_theta": 1e4, "factor": 2.0}),
            "config.json: the rope type: 'axial' is not known; allowed: default, dynamic, linear, "
            "llama3, longrope, yarn",
        ),
        ("llama-untied", _tokens, "has id 97, but the embedding has the ids 0 to 96"),
    ],
    ids=["family", "shape", "shard", "rope", "vocabulary"],
)
def test_a_folder_that_does_not_fit(
    verb: str,
    source: str,
    damage: Callable[[Path], object],
    says: str,
    capsys,
    monkeypatch,
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(GOLDENS / source, tmp_path / "model")
    damage(folder)
    monkeypatch.setattr(Folder, "read", lambda *args: pytest.fail("a tensor was read"))
    line = _refused(capsys, verb, folder, "--runs", tmp_path / "runs")
    assert says in line and str(folder) in line


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (
            "{{ raise_exception('only\ntools') }}",
            "chat_template: it failed on these messages: only tools",
        ),
        (
            "{% for m in messages %}{{ m.content }}",
            "chat_template: it failed on these messages: Unexpected end of template.",
        ),
        (
            "{{ messages[7].content }}",
            "chat_template: it failed on these messages: list object has no element 7",
        ),
    ],
)
def test_a_chat_template_that_fails(template: str, says: str, capsys, tmp_path: Path) -> None:
    tokenizer = hub.train_bpe([], 257)
    model = gpt2.model(dataclasses.replace(gpt2.SIZES["tiny"], vocab=257))
    talks = dataclasses.replace(tokenizer, chat_template=template)
    folder = hub.Bundle(model, jax.jit(model.init)(jax.random.key(0)), talks).save_pretrained(
        tmp_path / "model"
    )
    assert says in _refused(
        capsys, "generate", folder, "--chat", "--prompt", "hi", "--runs", tmp_path / "runs"
    )
