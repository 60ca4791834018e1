"""Progress: silent when quick, plain lines in a pipe, a live bar on a terminal; in processes of
their own.
"""

from __future__ import annotations

import importlib
import os
import pty
import re
import subprocess
import sys
import textwrap

import nbformat
import pytest
from nbclient import NotebookClient

from jaxmodel.progress import bar, progress, set_quiet, step

BEGIN = """
import importlib, sys, time

# the package's own name `progress` is the function
p = importlib.import_module("jaxmodel.progress")
p.SHOW_AFTER, p.LINE_EVERY, p._REFRESH = 0.3, 0.4, 0.02
"""


def piped(body: str) -> list[str]:
    program = BEGIN + textwrap.dedent(body)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout == "", "progress is for standard error only"
    return done.stderr.splitlines()


def on_terminal(body: str, columns: int = 100) -> str:
    """What the program writes to standard error when that is a terminal."""
    main, side = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns)}
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN + textwrap.dedent(body)],
        stderr=side,
        stdout=subprocess.PIPE,
        env=env,
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
    assert (
        len(lines) == 2
        and lines[0] == "loading ..."
        and re.fullmatch(r"loading: 0\.\d s", lines[1])
    )


def test_lines_in_a_pipe_nested():
    lines = piped("""
        with p.step("outer"):
            with p.bar(40, "inner [x]") as job:
                for i in range(40):
                    time.sleep(0.05)
                    job.advance(1, loss=0.5)
    """)
    assert lines[0] == "outer ..." and lines[1] == "  inner [x] ..."
    assert re.fullmatch(r"  inner \[x\]: 40/40  [2-9]\.\d s  \d+\.\d/s  loss=0\.5", lines[-2])
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
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "x")], stderr=write, check=False, timeout=60
    )
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
    assert re.search(r"  inner \[x\]: 20/20 .*\r\n", plain) and re.search(
        r"outer: [1-9]\.\d s\r\n", plain
    )
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


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    now = [100.0]
    module = importlib.import_module("jaxmodel.progress")
    monkeypatch.setattr(
        module, "time", type("Clock", (), {"monotonic": staticmethod(lambda: now[0])})
    )
    return now, lambda *args, **more: module.Job(*args, **more)


def test_the_time_left_does_not_know_the_first_step(clock):
    """Ten minutes of compilation, then a step each two seconds: 198 of them are left, not 198 times
    ten minutes.
    """
    now, job = clock
    run = job("train", 200, 0, unit="step", first="compiling")
    now[0] += 300
    assert run.status() == "0/200  compiling  5:00 min"
    now[0] += 300
    run.advance()
    assert run.status() == "1/200  10:00 min"  # how fast it is nobody knows yet
    now[0] += 2
    run.advance()
    assert run.status() == "2/200  10:02 min  2 s/step  6:36 min left"
    now[0] += 1  # and the clock goes on between the steps
    assert run.status().endswith("6:35 min left")


def test_the_speed_is_that_of_the_last_minute(clock):
    now, job = clock
    run = job("train", 10_000, 0, unit="step")
    for _ in range(1000):
        now[0] += 0.01
        run.advance()
    assert "100 steps/s" in run.status()
    for _ in range(100):  # another program wants the processor
        now[0] += 1
        run.advance()
    assert "1 steps/s  2:28 h left" in run.status()
    run.advance(-500)  # the work goes back
    assert "/s" not in run.status() and "600/10,000" in run.status()


def test_few_slow_steps_have_a_speed_and_what_has_no_room_is_left_out(clock):
    now, job = clock
    run = job("train", 20, 0, unit="step")
    for _ in range(6):
        now[0] += 54
        run.advance(1, loss=2.25, **{"tokens/s": 20_270.4}, mfu="29.7%")
    whole = "6/20  5:24 min  54 s/step  12:36 min left  loss=2.25  tokens/s=20,270  mfu=29.7%"
    assert run.status() == whole and run.status(75) == whole.removesuffix("  mfu=29.7%")
    assert run.status(10) == "6/20  5:24 min  54 s/step  12:36 min left"


@pytest.mark.parametrize("columns", [80, 120])
def test_a_bar_is_one_line_of_the_terminal(columns):
    written = on_terminal(
        """
        with p.bar(200, "train", unit="step") as job:
            for i in range(20):
                time.sleep(0.04)
                job.advance(
                    1,
                    loss=2.3456,
                    **{"tokens/s": 20270, "mfu": "29.7%", "heldout": 2.4567, "data": "0.0%"},
                )
    """,
        columns,
    )
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)
    drawn = [line for line in re.split(r"[\r\n]+", plain) if "━" in line]
    assert drawn and all(len(line) <= columns for line in drawn)
    assert any("left  loss=2.346" in line for line in drawn) and not any(
        "tokens/s=20," in line[columns - 6 :] for line in drawn
    )


def test_a_bar_in_a_notebook_is_no_error(tmp_path):
    """In a kernel: one display that is replaced, and nothing in the red stream of errors."""
    body = """
        with p.step("outer"):
            for i in p.progress(range(20), "inner <x>"):
                time.sleep(0.04)
    """
    cells = [
        nbformat.v4.new_code_cell(BEGIN),
        nbformat.v4.new_code_cell(textwrap.dedent(body).strip()),
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = notebook.cells[1].outputs
    assert {out.output_type for out in outputs} == {"display_data"} and len(outputs) == 2
    pages = [out.data["text/html"] for out in outputs]
    assert any("outer" in page for page in pages) and any(
        "inner &lt;x&gt;" in page and "20/20" in page for page in pages
    )


@pytest.fixture(autouse=True)
def _loud():
    yield
    set_quiet(False)
