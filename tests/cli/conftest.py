"""How the tests of the command line run it: in this process, with what it printed and its exit
code.
"""

from __future__ import annotations

import json
from typing import Any

import jax
import pytest

from jaxmodel import hub
from jaxmodel.cli import main
from jaxmodel.models import llama


def run(capsys, *args) -> tuple[Any, Any, str]:
    """Exit code, what `--json -` printed, and standard error."""
    with pytest.raises(SystemExit) as end:
        main([str(arg) for arg in args] + ["--json", "-"])
    out, err = capsys.readouterr()
    return end.value.code, json.loads(out) if out.strip() else None, err


def call(capsys, *args, code=0):
    """What a command that ends with this code printed."""
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in args])
    out = capsys.readouterr()
    assert end.value.code == code, out.err
    return out


def as_json(capsys, folder, *args):
    """What `--json -` prints: JSON and nothing else."""
    return json.loads(call(capsys, *args, "--json", "-", "--runs", folder / "runs").out)


TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny bundle and a text."""
    room = tmp_path_factory.mktemp("cli")
    tokenizer = hub.train_bpe([TEXT], 300)
    config = llama.Config(tokenizer.vocab_size, 64, 2, 4, 2, 16, 128, 128, tied=True)
    model = llama.model(config)
    bundle = hub.Bundle(model, jax.jit(model.init)(jax.random.key(0)), tokenizer, {"name": "tiny"})
    bundle.save_pretrained(room / "tiny")
    (room / "text.txt").write_text(TEXT)
    return room
