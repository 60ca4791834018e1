"""A small GPT trained from scratch on eight simulated devices equals one device, learns, and is
made smaller.

Command:  python experiments/train_gpt.py [--quick] [--seed N] --json -
Cost:     about 4 minutes on two cores; --quick about 1 (40 steps instead of 200).
Goals:    the loss of every step on mesh fsdp 4 x tensor 2 equals that of one device to 1e-4
          relative; the held-out loss falls at least 2 nats below that of guessing evenly (1 in the
          quick form); int8 changes the held-out loss by at most 0.01.
Measured: all goals met (quick form): losses equal to 4.4e-7; held-out loss 5.088 (goal 5.931); int8
          changes it by -0.0002, int4 by +0.0005; 7,642 tokens/s on one device, 6,669 on eight
          simulated ones.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from jaxmodel import compress, data, evaluate, hub, report

VOCAB = 1024
TEXTS = "wikitext2-valid", "wikitext2-test"  # to train on, held out


def train(room: Path, name: str, steps: int, seed: int, *options: str) -> dict[str, Any]:
    """One run of `jaxmodel train` in a process of its own."""
    out = room / f"{name}.json"
    command = [
        sys.executable,
        "-m",
        "jaxmodel",
        "train",
        "--steps",
        str(steps),
        "--seed",
        str(seed),
        "--vocab",
        str(VOCAB),
    ]
    command += ["--data", TEXTS[0], "--heldout", TEXTS[1], *options]
    command += ["--out", str(room / name), "--json", str(out), "--runs", str(room / "runs")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(out.read_text())


def run(quick: bool, seed: int) -> tuple[list[tuple], dict[str, Any]]:
    """Train twice, compare, compress."""
    steps = 40 if quick else 200
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        one = train(room, "one", steps, seed)
        eight = train(room, "eight", steps, seed, "--devices", "8", "--mesh", "fsdp=4,tensor=2")
        bundle = hub.from_pretrained(room / "eight")
    pairs = [(a["loss"], b["loss"]) for a, b in zip(one["history"], eight["history"], strict=True)]
    ids = hub.need_processor(bundle).encode(data.load_text(TEXTS[1]).text)
    windows = data.windows(ids, bundle.model.config.context, limit=32)
    _, int8, int4 = evaluate.compare(
        compress.variants(bundle, ("f32", "int8", "int4")), windows, seed=seed
    )
    goal = math.log(VOCAB) - (1 if quick else 2)
    entries: list[tuple] = [
        (
            "largest relative difference of losses, 8 devices and 1",
            max(abs(a / b - 1) for a, b in pairs),
            "",
            "<= 1e-4",
        ),
        ("held-out loss", eight["heldout_loss"], "nats", f"<= {goal:.3f}"),
        ("training loss, last step", eight["loss"], "nats"),
        ("int8 change of held-out loss", int8["nll_change"], "nats", "<= 0.01"),
        ("int4 change of held-out loss", int4["nll_change"], "nats"),
        ("throughput, 1 device", one["tokens_per_second"], "tokens/s"),
        ("throughput, 8 simulated devices", eight["tokens_per_second"], "tokens/s"),
    ]
    return entries, {"steps": steps, "data": eight["data"]}


if __name__ == "__main__":
    report.experiment(__doc__, "40 steps instead of 200", run)
