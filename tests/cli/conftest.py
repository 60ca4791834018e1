"""How the tests of the command line run it: in this process, with what it printed and its exit code."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jaxmodel.cli import main


def run(capsys, *args) -> tuple[Any, Any, str]:
    """Exit code, what `--json -` printed, and standard error."""
    with pytest.raises(SystemExit) as end:
        main([str(arg) for arg in args] + ["--json", "-"])
    out, err = capsys.readouterr()
    return end.value.code, json.loads(out) if out.strip() else None, err


def call(capsys, *args, code=0):
    """What a command that ends with this code printed."""
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in args])
    out = capsys.readouterr()
    assert end.value.code == code, out.err
    return out


def as_json(capsys, folder, *args):
    """What `--json -` prints: JSON and nothing else."""
    return json.loads(call(capsys, *args, "--json", "-", "--runs", folder / "runs").out)
