"""Damaged files and command lines: each is refused in one line with exit code 2, or gives a result.

Small real files of every kind that the project reads (bundles of nine families, GGUF, texts,
tables, Parquet, ArrayRecord, images, shards, checkpoints, run folders, adapters, tokenizers,
recipes) and command lines of every verb are damaged in seeded ways: bytes, what JSON says, another
kind of file in the place, words of the command. `tests/fuzz` has the ways; a process reads them,
watched from another.

Command:  python experiments/hostile_input.py [--quick] [--seed N] --json -
Cost:     about 3 minutes on two cores (500 files, 300 command lines); --quick (100 and 50) about
  one.
Goals:    no traceback, crash, refusal of several lines or file written outside; none takes 20 s or
  2 GiB.
Measured: all goals met with seed 4801, never tried before: 0 faults in 846 cases, 638 refused in
          exactly one line, 208 read (31 whole samples and 15 whole command lines among them, which
          train, resume, replay, predict and merge); slowest case 7.2 s, largest 0.623 GiB; 209.0 s
          in all beside other work (AMD EPYC, two cores).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from jaxmodel import report

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import fuzz  # pyright: ignore[reportMissingImports]


def run(quick: bool, seed: int) -> tuple[list[tuple], dict[str, Any]]:
    """Faults by kind, the slowest case, the largest."""
    files, commands = (100, 50) if quick else (500, 300)
    with tempfile.TemporaryDirectory() as room:
        found = fuzz.run(
            Path(room),
            files,
            commands,
            seed,
            lambda fault: print(*fault, sep="\n", file=sys.stderr),
        )
    rows: list[tuple] = [
        ("faults", len(found["faults"]), "cases", "== 0"),
        ("refused in one line", found["refused"], "cases"),
        ("read", found["right"], "cases"),
        ("slowest case", found["slowest"], "s", "< 20"),
        ("largest case", found["peak"] / 2**30, "GiB", "< 2"),
    ]
    return rows, {
        "files": files,
        "command_lines": commands,
        "faults": [fault[:2] for fault in found["faults"]],
    }


if __name__ == "__main__":
    report.experiment(__doc__, "100 files and 50 command lines", run)
