"""The quick form of `experiments/hostile_input.py`: damaged files and command lines, all refused in
one line or read.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import fuzz


def test_damaged_files_and_command_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # in the processes that it starts
    found = fuzz.run(tmp_path, files=100, commands=30, seed=1)
    assert not found["faults"], "\n\n".join(
        f"{said}\n{end}\n{text}" for said, end, text in found["faults"]
    )
    assert found["peak"] < fuzz.BYTES and found["slowest"] < fuzz.SECONDS + 60
    assert (
        found["right"] > 10 and found["refused"] > 50
    )  # else the damage is none, or nothing gets as far as to be read
