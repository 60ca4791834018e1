"""What checkpoints cost: throughput with one every 60 s beside none, and the memory of the process
over 300 saves.

The same training in turns, four times each way, without and with an asynchronous checkpoint: in
each turn with checkpoints one save begins at its start, and a turn is as long as the interval, so
that its cost is what a minute's training loses. Then 300 saves of that state, one after the other:
the slope of the resident memory from the 50th to the last.

Command:  python experiments/checkpoint_cost.py [--quick] [--seed N] --json -
Cost:     about 10 minutes on two cores; --quick (turns of 10 s, 60 saves) about 2.
Goals:    <= 3 % of throughput at one checkpoint every 60 s; memory flat within 1 % over 300 saves.
Measured: both goals met: 0.74 % of throughput lost to a save every 60 s (the turns without one
          differ by 15.5 % on this machine; the loop itself was held up for 0.208 s of the 60, 0.35
          %); memory +0.19 % over 300 saves (792 MB).
"""

from __future__ import annotations

import dataclasses
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodel import checkpoint, data, losses, ops, report, train
from jaxmodel.models import gpt2
from jaxmodel.progress import progress

CONFIG = gpt2.Config(8192, 512, 6, 8, 256)


def memory() -> float:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def turns(seconds: float, seed: int) -> tuple[list[float], list[float], float]:
    """Steps a second without and with a checkpoint in each turn, and the seconds for which saves
    held up the loop.
    """
    model = gpt2.model(CONFIG, ops.Policy(compute_dtype="bfloat16"))
    rows = (
        np.random.default_rng(seed)
        .integers(0, CONFIG.vocab, (256, CONFIG.context + 1))
        .astype(np.int32)
    )
    stream = data.Stream(rows, 2, seed)
    config = train.TrainConfig(steps=10_000)
    program = train.Program(model, config, loss=losses.next_token)
    step = program.step
    state = program.init(jax.random.key(seed))
    speeds: dict[bool, list[float]] = {False: [], True: []}
    held = 0.0
    with tempfile.TemporaryDirectory() as folder, checkpoint.Checkpoints(folder) as checkpoints:
        for turn in progress(range(-1, 8), "turns"):
            saves = turn % 2 == 1
            steps = 0
            began = time.perf_counter()
            if saves:
                checkpoints.save(state)
                held += time.perf_counter() - began
            while time.perf_counter() - began < seconds:
                state, metrics = step(state, jax.device_put(stream.batch(steps)))
                metrics["loss"].block_until_ready()
                steps += 1
            if turn >= 0:
                speeds[saves].append(steps / (time.perf_counter() - began))
            checkpoints.wait()
    return speeds[False], speeds[True], held / 4


def saves(count: int, seed: int) -> list[float]:
    """Resident bytes after each save of a smaller state."""
    program = train.Program(gpt2.model(gpt2.Config(8192, 256, 4, 4, 128)), loss=losses.next_token)
    state = program.init(jax.random.key(seed))
    found = []
    with tempfile.TemporaryDirectory() as folder, checkpoint.Checkpoints(folder) as checkpoints:
        for i in progress(range(count), "saves"):
            state = dataclasses.replace(state, step=jnp.int32(i + 1))
            checkpoints.save(state)
            checkpoints.wait()
            found.append(memory())
    return found


def run(quick: bool, seed: int) -> tuple[list[tuple], dict[str, Any]]:
    """Turns, then saves."""
    without, with_save, held = turns(10.0 if quick else 60.0, seed)
    cost = 100 * (1 - float(np.median(with_save)) / float(np.median(without)))
    found = saves(60 if quick else 300, seed)
    steady = np.array(found[min(50, len(found) // 3) :])
    slope = np.polyfit(np.arange(len(steady)), steady, 1)[0] * len(steady)
    return [
        ("throughput lost to a checkpoint in each turn", cost, "%", None if quick else "<= 3"),
        ("the loop was held up by a save for", held, "s"),
        ("spread of the turns without", 100 * float(np.ptp(without) / np.median(without)), "%"),
        ("change of memory over the saves", 100 * float(slope / steady.mean()), "%", "<= 1"),
        ("memory", float(steady.mean()) / 1e6, "MB"),
        ("saves", len(found), ""),
    ], {"seconds of a turn": 10.0 if quick else 60.0, "processors": len(os.sched_getaffinity(0))}


if __name__ == "__main__":
    report.experiment(__doc__, "turns of 10 s, 60 saves", run)
