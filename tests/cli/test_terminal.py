"""What a person at a terminal sees: text as it comes, errors in one line without colours."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import jax
import pytest

import jaxmodel
from jaxmodel import hub
from jaxmodel.models import gpt2


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    tokenizer = hub.train_bpe(["aab abb aab ba ba"], 270)
    model = gpt2.model(gpt2.Config(tokenizer.vocab_size, 16, 1, 2, 32))
    made = hub.Bundle(model, jax.jit(model.init)(jax.random.key(0)), tokenizer, {"name": "small"})
    return made.save_pretrained(tmp_path_factory.mktemp("small") / "bundle")


def at_a_terminal(folder, *words):
    """The exit code, and what a command writes where standard output and standard error are a
    terminal.
    """
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "jaxmodel", *map(str, words)]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder)
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # its end
            break
        if not part:
            break
        written += part
    os.close(ours)
    return process.wait(), written.decode().replace("\r\n", "\n")


def test_a_text_is_written_once_as_it_comes(bundle, tmp_path):
    code, written = at_a_terminal(
        tmp_path, "generate", bundle, "--prompt", "aab", "--max-new-tokens", 12
    )
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)
    text = jaxmodel.generate(hub.from_pretrained(bundle), "aab", max_new_tokens=12)
    assert code == 0 and shown.count(jaxmodel.errors.printable(f"aab{text}\n12 tokens, ")) == 1, (
        written
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--promt", "aab"), "--promt is unknown; nearest --prompt"),
        ((), "Missing from jaxmodel generate: --prompt TEXT"),
    ],
)
def test_an_error_is_one_plain_line(words, said, bundle, tmp_path):
    code, written = at_a_terminal(tmp_path, "generate", bundle, *words)
    assert code == 2 and written.count("\n") == 1 and "\x1b" not in written and said in written, (
        written
    )
