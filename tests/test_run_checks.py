"""The runner of checks in another process tells a check that fails from one that does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

RUNNER = Path(__file__).parent / "run_checks.py"


def test_a_failing_check_is_told_with_its_traceback(tmp_path):
    file = tmp_path / "test_some.py"
    file.write_text("def check_equal(a, b):\n    assert a == b, f'{a} is not {b}'\n")
    command = [
        sys.executable,
        RUNNER,
        file,
        "check_equal:data=2:data=2",
        "check_equal:data=2:fsdp=4",
    ]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["check_equal:data=2:data=2"] == ""
    assert "AssertionError: data=2 is not fsdp=4" in found["check_equal:data=2:fsdp=4"]


def test_one_process_answers_many_requests_and_goes_on_after_a_failure(eight):
    def ask(source, *arguments):
        return eight.ask({"source": source, "arguments": list(arguments)}, 60)

    assert (
        ask("import jax, sys; print(jax.device_count(), sys.argv[1:])", "a")["out"] == "8 ['a']\n"
    )
    assert "ZeroDivisionError" in ask("x = 1\nx / 0")["error"]
    assert "NameError" in ask("print(x)")["error"]  # names are those of one program
    assert "SystemExit: 3" in ask("import sys; sys.exit(3)")["error"]
    died = ask("import os; print('last words', file=__import__('sys').stderr); os._exit(7)")
    assert "died" in died["error"]
    assert ask("print(1)") == {"out": "1\n", "error": ""}
