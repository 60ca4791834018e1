"""Ctrl-C, SIGTERM and pipes that nobody reads to their end: one line or none, the exit code of the
shell, no run folder.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time

import pytest

from jaxmodel import generation, hub
from jaxmodel.cli import main
from jaxmodel.distributed import stop_signals


@pytest.fixture(autouse=True)
def heard():
    """Ctrl-C as in a terminal: a shell starts what runs in its background with the signal
    ignored.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def ended(monkeypatch, tmp_path, capsys, raised):
    """Exit code and standard error of a `generate` in the middle of which something happens."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "from_pretrained", lambda *_, **__: raised())
    monkeypatch.setattr(generation, "for_inference", lambda bundle: bundle)
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
def test_a_verb_that_is_told_to_end_leaves_one_line(
    raised, code, said, monkeypatch, tmp_path, capsys
):
    before = signal.getsignal(signal.SIGTERM)
    assert ended(monkeypatch, tmp_path, capsys, raised) == (code, said)
    assert signal.getsignal(signal.SIGTERM) == before


def dropped(number):
    """The signal falls into a callback of the garbage collector, from which Python raises
    nothing.
    """

    def callback(phase, _):
        if phase == "start":
            gc.callbacks.remove(callback)
            os.kill(os.getpid(), number)

    gc.callbacks.append(callback)
    gc.collect()


def wait_for(what=lambda: False):
    until = time.monotonic() + 10
    while not what():
        assert time.monotonic() < until, "the signal was forgotten"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGINT, 130, "jaxmodel: interrupted\n"),
        (signal.SIGTERM, 143, "jaxmodel: terminated\n"),
    ],
)
def test_a_signal_in_a_callback_of_the_collector_is_not_forgotten(
    number, code, said, monkeypatch, tmp_path, capsys
):
    def work():
        dropped(number)
        wait_for()

    before = sys.unraisablehook
    assert ended(monkeypatch, tmp_path, capsys, work) == (code, said)
    assert sys.unraisablehook == before


def test_training_that_begins_meanwhile_hears_it(monkeypatch, tmp_path, capsys):
    """The handler of `train` takes over between the signal and its repetition, and then saves and
    stops.
    """
    stopped = []

    def work():
        dropped(signal.SIGINT)
        with stop_signals() as stop:
            wait_for(lambda: stop(1))
            stopped.append(True)
        raise KeyboardInterrupt

    assert ended(monkeypatch, tmp_path, capsys, work)[0] == 130
    assert stopped


@pytest.mark.parametrize("more", [(), ("--json", "-")], ids=["table", "JSON"])
def test_a_pipe_that_nobody_reads_is_no_error(more, tmp_path):
    ours, theirs = os.pipe()
    os.close(ours)
    command = [sys.executable, "-m", "jaxmodel", "models", *more]
    done = subprocess.run(
        command, stdout=theirs, stderr=subprocess.PIPE, text=True, cwd=tmp_path, check=False
    )
    os.close(theirs)
    assert (
        done.returncode == 141 and "Error" not in done.stderr and "jaxmodel: " not in done.stderr
    ), done.stderr
