"""Notebooks: each is a pair `NAME.py` (edited, reviewed) and `NAME.ipynb` (with its outputs, for
readers on the web).

`python tests/test_notebooks.py` runs every `.py` and writes its `.ipynb` anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
SCRIPTS = sorted(FOLDER.glob("*.py"))
METADATA = {
    "jupytext": {"formats": "ipynb,py:percent"},
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def executed(script: Path, folder: Path) -> Any:
    """The notebook of a script, run from top to bottom in a kernel (a process of its own) whose
    place is `folder`.
    """
    notebook = jupytext.read(script)
    notebook.metadata = nbformat.from_dict(METADATA)
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"  # those that jupytext draws would change with every run
    place = {"metadata": {"path": str(folder)}}
    NotebookClient(
        notebook, timeout=300, record_timing=False, coalesce_streams=True, resources=place
    ).execute()
    return notebook


def kinds(notebook: Any) -> list[list[tuple[str, ...]]]:
    """What each code cell shows, without the content."""

    def kind(out: Any) -> tuple[str, ...]:
        return (out.output_type, out.get("name", ""), *sorted(out.get("data", ())))

    return [
        [kind(out) for out in cell.outputs] for cell in notebook.cells if cell.cell_type == "code"
    ]


def test_each_notebook_is_a_pair():
    assert SCRIPTS
    assert sorted(path.with_suffix(".py") for path in FOLDER.glob("*.ipynb")) == SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_pair_is_in_sync(script):
    pair = jupytext.read(script), nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(pair[1])
    source, shown = (
        [(cell.cell_type, cell.source) for cell in notebook.cells] for notebook in pair
    )
    assert source == shown, "python tests/test_notebooks.py writes the .ipynb anew"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_runs(script, tmp_path, monkeypatch):
    monkeypatch.delenv("JAXMODEL_DATA", raising=False)  # so that it is the same notebook everywhere
    if script != SCRIPTS[0]:  # the first is compiled as users have it, the others as tests are
        monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    notebook = executed(script, tmp_path)
    shown = kinds(notebook)
    assert shown == kinds(nbformat.read(script.with_suffix(".ipynb"), as_version=4)), (
        "the .ipynb has other outputs"
    )
    assert not [out for cell in shown for out in cell if out[:2] == ("stream", "stderr")]


if __name__ == "__main__":
    for path in SCRIPTS:
        nbformat.write(executed(path, FOLDER), path.with_suffix(".ipynb"))
