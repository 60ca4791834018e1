"""Ctrl-C, SIGTERM and pipes that nobody reads to their end: one line or none, the exit code of the shell, no run folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from jaxmodel import generation, hub
from jaxmodel.cli import main


def ended(monkeypatch, tmp_path, capsys, raised):
    """Exit code and standard error of a `generate` in the middle of which something happens."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "from_pretrained", lambda *_, **__: raised())
    monkeypatch.setattr(generation, "running_only", lambda bundle: bundle)
    with pytest.raises(SystemExit) as end:
        main(["generate", "m", "hi"])
    assert not list(tmp_path.iterdir())
    return end.value.code, capsys.readouterr().err


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (interrupt, 130, "jaxmodel: interrupted\n"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), 143, "jaxmodel: terminated\n"),
    ],
    ids=["Ctrl-C", "SIGTERM"],
)
def test_a_verb_that_is_told_to_end_leaves_one_line(raised, code, said, monkeypatch, tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM)
    assert ended(monkeypatch, tmp_path, capsys, raised) == (code, said)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("more", [(), ("--json", "-")], ids=["table", "JSON"])
def test_a_pipe_that_nobody_reads_is_no_error(more, tmp_path):
    ours, theirs = os.pipe()
    os.close(ours)
    command = [sys.executable, "-m", "jaxmodel", "models", *more]
    done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, text=True, cwd=tmp_path, check=False)
    os.close(theirs)
    assert done.returncode == 141 and "Error" not in done.stderr and "jaxmodel: " not in done.stderr, done.stderr
