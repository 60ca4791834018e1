"""A small GPT trained from scratch on eight simulated devices equals one device, learns, and is made smaller.

Command:  python experiments/train_gpt.py [--quick] [--seed N] --json -
Cost:     about 4 minutes on two cores; --quick about 1 (40 steps instead of 200).
Goals:    the loss of every step on mesh fsdp 4 x tensor 2 equals that of one device to 1e-4 relative; the held-out loss falls at
          least 2 nats below that of guessing evenly (1 in the quick form); int8 changes the held-out loss by at most 0.01.
Measured: see RESULTS.md (`make numbers`).
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from jaxmodel import compress, data, evaluate, hub, report
from jaxmodel.report.run import versions

VOCAB = 1024


def train(room: Path, name: str, steps: int, seed: int, *options: str) -> dict[str, Any]:
    """One run of `jaxmodel train` in a process of its own."""
    out = room / f"{name}.json"
    command = [sys.executable, "-m", "jaxmodel", "train", "--steps", str(steps), "--seed", str(seed), "--vocab", str(VOCAB)]
    command += [*options, "--out", str(room / name), "--json", str(out), "--runs", str(room / "runs")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(out.read_text())


def main() -> None:
    """Train twice, compare, compress."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="40 steps instead of 200")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", default=None, metavar="FILE")
    args = parser.parse_args()
    began = time.perf_counter()
    steps = 40 if args.quick else 200
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        one = train(room, "one", steps, args.seed)
        eight = train(room, "eight", steps, args.seed, "--devices", "8", "--mesh", "fsdp=4,tensor=2")
        bundle = hub.from_pretrained(room / "eight")
    pairs = [(a["loss"], b["loss"]) for a, b in zip(one["history"], eight["history"], strict=True)]
    windows = data.windows(hub.need_processor(bundle).encode(data.load_text("english").text), 128, limit=32)
    nll = {}
    for name in ("f32", "int8", "int4"):
        version = bundle if name == "f32" else compress.compress_bundle(bundle, compress.NAMED[name], name)[0]
        nll[name] = evaluate.perplexity(version.model, version.running(), windows).nll
    goal = math.log(VOCAB) - (1 if args.quick else 2)
    entries: list[tuple] = [
        ("largest relative difference of losses, 8 devices and 1", max(abs(a / b - 1) for a, b in pairs), "", "<= 1e-4"),
        ("held-out loss", eight["heldout_loss"], "nats", f"<= {goal:.3f}"),
        ("training loss, last step", eight["loss"], "nats"),
        ("int8 change of held-out loss", nll["int8"] - nll["f32"], "nats", "<= 0.01"),
        ("int4 change of held-out loss", nll["int4"] - nll["f32"], "nats"),
        ("throughput, 1 device", one["tokens_per_second"], "tokens/s"),
        ("throughput, 8 simulated devices", eight["tokens_per_second"], "tokens/s"),
    ]
    protocol = {"steps": steps, "seed": args.seed, "data": eight["data"], **versions()}
    report.emit(report.rows(entries, time.perf_counter() - began, protocol), args.json or "-")


if __name__ == "__main__":
    main()
