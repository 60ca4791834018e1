"""Experiments state their command, cost and goals, and take the options that `make numbers` gives
them.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "experiments"
NAMES = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem != "make_numbers")


@pytest.mark.parametrize("name", NAMES)
def test_docstring_states_command_cost_and_goals(name):
    doc = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())) or ""
    assert f"python experiments/{name}.py [--quick] [--seed N] --json -" in doc
    assert all(f"\n{word}:" in doc for word in ("Command", "Cost", "Goals", "Measured"))
    assert (
        len(re.findall(r"\d+\.\d+", doc.partition("\nMeasured:")[2])) >= 3
    )  # the last values, not only where they stand


HELP = """
import contextlib, io, json, runpy, sys
said = {}
for file in sys.argv[1:]:
    sys.argv = [file, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        runpy.run_path(file, run_name="__main__")
    said[file] = out.getvalue()
print(json.dumps(said))
"""


def test_options():
    """Of all in one process, which imports the framework once."""
    files = [str(FOLDER / f"{name}.py") for name in NAMES]
    environ = {**os.environ, "PYTHONPATH": str(FOLDER)}
    done = subprocess.run(
        [sys.executable, "-c", HELP, *files],
        capture_output=True,
        text=True,
        check=True,
        env=environ,
    )
    for file, said in json.loads(done.stdout).items():
        assert all(option in said for option in ("--quick", "--seed", "--json")), file


def test_numbers_writes_a_section_for_each_and_keeps_the_others(tmp_path):
    """On a copy with an experiment that is quick."""
    fake = """
import json, sys
from jaxmodel.report.json_out import rows
assert "--quick" in sys.argv
rows = [{"name": "a|b", "value": 1.5, "unit": "x", "goal": ">= 2", "met": False}]
print(json.dumps({"rows": rows, "seconds": 1.0, "protocol": {"cpu": "some"}}))
"""
    (tmp_path / "fake.py").write_text(fake)
    (tmp_path / "broken.py").write_text("raise SystemExit(3)")
    (tmp_path / "make_numbers.py").write_text((FOLDER / "make_numbers.py").read_text())
    (tmp_path / "RESULTS.md").write_text("# Results\n\n## older\n\nkept\n")
    subprocess.run([sys.executable, tmp_path / "make_numbers.py"], check=True, capture_output=True)
    text = (tmp_path / "RESULTS.md").read_text()
    assert "## older\n\nkept" in text and "## broken\n\nfailed with exit code 3" in text
    assert "| a\\|b | 1.50000 | x | >= 2 | **no** |" in text, text


def test_results_name_only_experiments_that_are_there():
    sections = [
        line[3:].strip()
        for line in (FOLDER / "RESULTS.md").read_text().splitlines()
        if line.startswith("## ")
    ]
    assert set(sections) == set(NAMES)


def test_rows_are_what_the_design_asks_for():
    from jaxmodel.report.json_out import rows

    row = json.loads(json.dumps(rows([("a", 1, "x", ">= 2")], 1.0, {})))["rows"][0]
    assert set(row) == {"name", "value", "unit", "goal", "met"}
