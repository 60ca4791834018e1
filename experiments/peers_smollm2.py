"""SmolLM2-135M-Instruct beside its peers in one run: transformers on torch (float32, bfloat16),
llama.cpp (Q4_1, its own file).

Ours and torch's f32 is that file decoded, whose matrices were rounded to 4 bits; int4 rounds a
second time. It changes no speed.

Command:  python experiments/peers_smollm2.py [--quick] [--seed N] --json -   (after `make peers`)
Cost:     about 3 minutes on two cores; --quick about 2 (our f32 and int8 only).
Goals:    our int8 at least as fast as the faster of torch's float32 and bfloat16, in prefill and in
  decoding of 1 and 8 streams.
Measured: all goals met (full form, 165 s; llama.cpp was not built there): int8 against the faster
          of torch's float32 and bfloat16 1.52x in prefill, 3.19x and 3.01x in decoding of 1 and 8
          streams (1,358, 53.0 and 249 tokens/s). Our float32 is behind torch's at 8 streams (41 to
          84 tokens/s in two runs against 66).
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from jaxmodel import compress, generation, hub, report
from jaxmodel.errors import InputError
from jaxmodel.hub.gguf import find_smollm2
from jaxmodel.progress import progress

HERE = Path(__file__).parent
PYTHON = HERE.parent / ".peers" / "bin" / "python"
LLAMA = "llama.cpp Q4_1"
KINDS = ("prefill_tps", "decode_tps_1", "decode_tps_8")


def peer(script: str, *args: object) -> dict[str, float]:
    """One peer's numbers, in a process of its own."""
    command = [str(PYTHON), str(HERE / "peers" / script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(
            f"peer: {script} ended with code {done.returncode}: "
            f"{done.stderr.strip().splitlines()[-1:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def run(quick: bool, seed: int) -> tuple[list[tuple], dict[str, Any]]:
    """Time ours and theirs in turn."""
    if not PYTHON.exists():
        raise InputError("peers: .peers is not built; run `make peers` first")
    bundle = hub.from_pretrained("smollm2-135m", dtype="float32")
    names = ("f32", "int8") if quick else ("f32", "bf16", "int8", "int8-weight", "int4")
    speeds: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as room:
        folder = bundle.save_pretrained(Path(room) / "f32")
        theirs: dict[str, tuple[object, ...]] = {
            "torch f32": ("speed_transformers.py", folder, "float32"),
            "torch bf16": ("speed_transformers.py", folder, "bfloat16"),
        }
        if not subprocess.run(
            [str(PYTHON), "-c", "import llama_cpp"], capture_output=True, check=False
        ).returncode:
            theirs[LLAMA] = (
                "speed_llama_cpp.py",
                find_smollm2(),
            )  # else `make peers` has said that it was not built
        for name in progress([*names, *theirs], "speeds"):
            if name in theirs:
                speeds[name] = peer(*map(str, theirs[name]))
            else:
                version = generation.for_inference(compress.variants(bundle, [name])[name]())
                speeds[name] = generation.measure_speed(version)
    entries: list[tuple] = []
    for kind in KINDS:
        best = max(speeds["torch f32"][kind], speeds["torch bf16"][kind])
        entries.append(
            (f"int8 {kind} over the best of torch", speeds["int8"][kind] / best, "x", ">= 1")
        )
    if LLAMA in speeds:
        entries.append(
            (
                "int8 decode_tps_1 over llama.cpp",
                speeds["int8"]["decode_tps_1"] / speeds[LLAMA]["decode_tps_1"],
                "x",
            )
        )
    entries += [
        (f"{name} {kind}", value, "tokens/s")
        for name, found in speeds.items()
        for kind, value in found.items()
    ]
    return entries, {"prompt": 512, "cache": 256, "new": 16}


if __name__ == "__main__":
    report.experiment(__doc__, "our f32 and int8 only", run)
