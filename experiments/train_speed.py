"""Training speed of two GPTs beside PyTorch in one run, what the loop costs, and how often it
compiles.

Ours runs through `fit` with its prefetching, metrics and guard, in float32 and in bfloat16 with
float32 weights, its layers out of the loop (`unroll`); theirs is a plain loop in its own process:
eager, bfloat16 by autocast, compiled, compiled bfloat16. They take turns, and of each the faster of
two turns counts. The work of the host is the time of a step of `fit` on a model that computes next
to nothing, less that of its jitted step called in a bare loop on one batch.

Command:  python experiments/train_speed.py [--quick] [--seed N] --json -   (beside PyTorch after
  `make peers`)
Cost:     about 9 minutes on two cores; --quick (the small model) about 3.
Goals:    at 512 wide x 6 layers and at 128 x 4 at least 0.8x (aim: 1.0x) of PyTorch's best; host
          work <= 200 us a step; one compilation of the step, also after a restore.
Measured: all goals met: 128 wide x 4 1.522x of PyTorch's best (bfloat16, eager; 29,568.4 tokens/s,
          theirs 19,421.3), 512 wide x 6 0.801x (compiled bfloat16; 1,487.4, theirs 1,857.9; 0.841x
          in a run before); in float32 0.736x and 0.861x; host work 128.0 us; 1 compilation, also
          after a restore.
"""

from __future__ import annotations

import itertools
import json
import logging
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmodel import checkpoint, data, distributed, losses, ops, report, train
from jaxmodel.models import gpt2

HERE = Path(__file__).parent
PYTHON = HERE.parent / ".peers" / "bin" / "python"
# name -> width, depth, heads, vocab, batch, context, steps
SIZES = {"128 wide x 4": (128, 4, 4, 65, 12, 64, 60), "512 wide x 6": (512, 6, 8, 8192, 8, 256, 12)}
MODES = ("eager", "bf16", "compiled", "compiled-bf16")
OURS = {
    "float32": ("float32", "float32"),
    "bfloat16": ("bfloat16", "bfloat16"),
}  # of operands, of activations


def ours(sizes: tuple[int, ...], dtypes: tuple[str, str], seed: int) -> float:
    """Tokens a second of `fit`, behind its first steps."""
    width, depth, heads, vocab, batch, context, steps = sizes
    rows = (
        np.random.default_rng(seed).integers(0, vocab, (batch * 16, context + 1)).astype(np.int32)
    )
    model = gpt2.model(
        gpt2.Config(vocab, width, depth, heads, context), ops.Policy(*dtypes, unroll=depth)
    )
    config = train.TrainConfig(steps=steps + 5, log_every=5, seed=seed)
    _, history = train.fit(model, data.Stream(rows, batch, seed), config)
    return float(np.median([row["tokens_per_second"] for row in history[2:]]))


def theirs(sizes: tuple[int, ...], modes: tuple[str, ...]) -> dict[str, float]:
    """Tokens a second of PyTorch by mode."""
    command = [str(PYTHON), str(HERE / "peers" / "speed_train_torch.py"), *map(str, sizes), *modes]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {
        mode: found["tokens_per_second"]
        for mode, found in json.loads(done.stdout.splitlines()[-1]).items()
    }


def host_work(seed: int, steps: int = 1000, turns: int = 5) -> dict[str, float]:
    """Microseconds of a step of `fit` and of a bare loop, on a model that is nearly nothing: of
    each the least of the turns.
    """
    model = gpt2.model(gpt2.Config(16, 8, 1, 1, 8))
    rows = np.random.default_rng(seed).integers(0, 16, (64, 9)).astype(np.int32)
    stream = data.Stream(rows, 4, seed)
    config = train.TrainConfig(steps=steps, log_every=steps // 4, seed=seed)
    program = train.Program(model, config, loss=losses.next_token)
    step = program.step
    state = program.init(jax.random.key(seed))
    batch = jax.device_put(stream.batch(0))
    found: dict[str, list[float]] = {"fit": [], "bare": []}
    for _ in range(turns):
        _, history = train.fit(model, stream, config)
        found["fit"] += [
            (b["seconds"] - a["seconds"]) / (b["step"] - a["step"])
            for a, b in itertools.pairwise(history[1:])
        ]
        for _ in range(3):
            began = time.perf_counter()
            for i in range(steps // 4):
                state, metrics = step(state, batch)
                if i % 2:
                    metrics["loss"].block_until_ready()
            found["bare"].append((time.perf_counter() - began) / (steps // 4))
    return {name: 1e6 * min(seconds) for name, seconds in found.items()}


def compilations(seed: int) -> list[int]:
    """How often `fit` compiles its step: from the beginning, and after a restore."""
    model = gpt2.model(gpt2.SIZES["tiny"])
    rows = np.random.default_rng(seed).integers(0, 256, (64, 33)).astype(np.int32)
    stream = data.Stream(rows, 4, seed)
    found = []
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("jax")
    logger.addHandler(handler)
    before = logger.propagate
    logger.propagate = False
    try:
        with tempfile.TemporaryDirectory() as folder:
            for steps in (6, 12):
                lines.clear()
                with jax.log_compiles(), checkpoint.Checkpoints(folder) as checkpoints:
                    config = train.TrainConfig(steps=12, save_every=3, log_every=1, eval_every=3)
                    supervisor = distributed.RunMonitor(stop=lambda i, steps=steps: i >= steps)
                    train.fit(
                        model,
                        stream,
                        config,
                        heldout=stream,
                        checkpoints=checkpoints,
                        supervisor=supervisor,
                    )
                found.append(sum("Finished XLA compilation of jit(step)" in line for line in lines))
    finally:
        logger.removeHandler(handler)
        logger.propagate = before
    return found


def run(quick: bool, seed: int) -> tuple[list[tuple], dict[str, Any]]:
    """Both sizes beside PyTorch, then the loop."""
    entries: list[tuple] = []
    peers = PYTHON.exists()
    for name, sizes in list(SIZES.items())[: 1 if quick else None]:
        speeds: dict[str, float] = {}
        for _ in range(2):
            for dtype, dtypes in OURS.items():
                speeds[dtype] = max(speeds.get(dtype, 0.0), ours(sizes, dtypes, seed))
            for mode, speed in theirs(sizes, MODES).items() if peers else ():
                speeds[f"torch {mode}"] = max(speeds.get(f"torch {mode}", 0.0), speed)
        best = max(
            (speed for key, speed in speeds.items() if key.startswith("torch")), default=None
        )
        if best is not None:
            entries.append(
                (
                    f"{name}: our best over the best of torch",
                    max(speeds[key] for key in OURS) / best,
                    "x",
                    ">= 0.8",
                )
            )
            entries.append(
                (
                    f"{name}: our float32 over torch's best float32",
                    speeds["float32"]
                    / max(speeds.get(f"torch {mode}", 0.0) for mode in ("eager", "compiled")),
                    "x",
                )
            )
        entries += [(f"{name}: {key}", speed, "tokens/s") for key, speed in speeds.items()]
    work = host_work(seed)
    entries.append(
        ("host work of a step beyond a bare loop", work["fit"] - work["bare"], "us", "<= 200")
    )
    entries += [
        (f"a step of {key} on a model of nothing", value, "us") for key, value in work.items()
    ]
    first, restored = compilations(seed)
    entries += [
        ("compilations of the step", first, "", "<= 1"),
        ("after a restore", restored, "", "<= 1"),
    ]
    return entries, {"sizes": {name: list(sizes) for name, sizes in SIZES.items()}, "peers": peers}


if __name__ == "__main__":
    report.experiment(__doc__, "the small model only", run)
