"""Progress: silent when quick, plain lines in a pipe, a live bar on a terminal; in processes of their own."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import textwrap

import pytest

from jaxmodel.report import bar, progress, set_quiet, step

BEGIN = """
import importlib, sys, time
p = importlib.import_module("jaxmodel.report.progress")  # the package's own name `progress` is the function
p.SHOW_AFTER, p.LINE_EVERY, p._REFRESH = 0.3, 0.4, 0.02
"""


def piped(body: str) -> list[str]:
    program = BEGIN + textwrap.dedent(body)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "", "progress is for standard error only"
    return done.stderr.splitlines()


def on_terminal(body: str) -> str:
    """What the program writes to standard error when that is a terminal."""
    main, side = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN + textwrap.dedent(body)], stderr=side, stdout=subprocess.PIPE, env=env
    )
    os.close(side)
    written = b""
    while True:
        try:
            chunk = os.read(main, 4096)
        except OSError:  # how Linux says that the other side is closed
            break
        if not chunk:
            break
        written += chunk
    os.close(main)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, written.decode()
    assert out == b""
    return written.decode()


def test_quick_work_is_silent_and_a_step_names_itself_in_a_pipe():
    lines = piped("""
        with p.step("loading"):
            for _ in p.progress(range(3), "quick"): pass
        with p.bar(3, "quick bar"): pass
    """)
    assert len(lines) == 2 and lines[0] == "loading ..." and re.fullmatch(r"loading: 0\.\d s", lines[1])


def test_lines_in_a_pipe_nested():
    lines = piped("""
        with p.step("outer"):
            with p.bar(40, "inner [x]") as job:
                for i in range(40):
                    time.sleep(0.05)
                    job.advance(1, loss=0.5)
    """)
    assert lines[0] == "outer ..." and lines[1] == "  inner [x] ..."
    assert re.fullmatch(r"  inner \[x\]: 40/40  [2-9]\.\d s  \S+/s  loss=0\.5", lines[-2])
    assert re.fullmatch(r"outer: [2-9]\.\d s", lines[-1])
    between = lines[2:-2]
    assert 1 <= len(between) <= 6, lines  # 2 s, a line each 0.4 s at most
    assert all(re.search(r"inner \[x\]: \d+/40 .* left  loss=0\.5$", line) for line in between)


def test_failure_is_said_and_passed_on():
    lines = piped("""
        with p.step("loading"):
            raise KeyError("gone")
    """)
    assert any(re.fullmatch(r"loading: failed after 0\.\d s", line) for line in lines)
    assert lines[-1] == "KeyError: 'gone'"


def test_quiet():
    assert (
        piped("""
        p.set_quiet()
        with p.step("loading"):
            time.sleep(0.6)
    """)
        == []
    )


def test_a_closed_pipe_does_not_stop_the_work(tmp_path):
    program = BEGIN + textwrap.dedent("""
        with p.step("loading"):
            time.sleep(0.5)
        open(sys.argv[1], "w").write("done")
    """)
    read, write = os.pipe()
    os.close(read)
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "x")], stderr=write, check=False, timeout=60)
    os.close(write)
    assert (tmp_path / "x").read_text() == "done"


def test_a_live_bar_on_a_terminal_nested():
    written = on_terminal("""
        with p.step("outer"):
            for i in p.progress(range(20), "inner [x]"):
                time.sleep(0.05)
                if i == 15: print("a warning", file=sys.stderr)
    """)
    assert "\x1b[" in written and re.search(r"inner \[x\].*\d+/20", written)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)
    assert "a warning\r\n" in plain
    assert re.search(r"  inner \[x\]: 20/20 .*\r\n", plain) and re.search(r"outer: [1-9]\.\d s\r\n", plain)
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") > 0  # the cursor is back


def test_quick_work_on_a_terminal_is_silent():
    assert (
        on_terminal("""
        with p.step("loading"):
            for _ in p.progress(range(3), "quick"): pass
    """)
        == ""
    )


def test_items_pass_through_and_early_exit_is_no_failure(capsys):
    assert list(progress(iter("abc"), "x")) == ["a", "b", "c"]
    items = progress(range(5), "y")
    assert next(items) == 0
    items.close()
    with bar(None, "z") as job, step("w"):
        job.advance(2, note="text")
    assert job.done == 2 and "note=text" in job.status() and "2  0" in job.status()
    assert "failed" not in capsys.readouterr().err


@pytest.fixture(autouse=True)
def _loud():
    yield
    set_quiet(False)
