"""Moves: a run goes from mesh to mesh and from process count to process count, with the same state
and the same token stream.

A small GPT on packed, mixed text, a checkpoint at the end of each leg: 1, 8, 2 x 4, 2 and 1
simulated devices, then 1, 2 and 4 processes. Each leg writes down the SHA-256 of the state that it
restored and of the one that it saved, and each process the SHA-256 of the rows that it was given,
by step and row; joined, these are the token stream. Then the same run on one device without a move.

Command:  python experiments/move.py [--quick] [--seed N] --json -
Cost:     about 6 minutes on two cores; --quick (fewer legs) about 2.
Goals:    every restored state bit-equal to the one that was saved; one hash of the token stream on
          every topology; losses equal to the single device's to 1e-5 relative in float32 on the
          data, fsdp and tensor legs.
Measured: all goals met: 7 legs, 6 of 6 restored states bit-equal, one hash; losses at most 3.0e-7
          apart (1.0e-5 allowed), in 4.6 minutes on a busy machine.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from jaxmodel import checkpoint, report
from jaxmodel.progress import progress

STEPS = 4  # of a leg
# mesh, devices of a process, processes
LEGS = (
    ("data=1", 1, 1),
    ("data=8", 8, 1),
    ("data=2,tensor=4", 8, 1),
    ("fsdp=2", 2, 1),
    ("data=1", 1, 1),
    ("data=2", 1, 2),
    ("fsdp=4", 1, 4),
)
QUICK = (LEGS[0], ("data=2,tensor=2", 4, 1), ("data=2", 1, 2), LEGS[0])


def leg(folder: Path, mesh: str, until: int, seed: int) -> dict[str, Any]:
    """One leg, in this process, which is one of those that the environment names."""
    import jax

    from jaxmodel import data, ops, sharding, train
    from jaxmodel.distributed import RunMonitor, startup
    from jaxmodel.models import gpt2
    from jaxmodel.train import placing

    startup.initialize()
    parts = []
    for name, weight in (("english_train", 3), ("english", 1)):
        documents = [
            list(text.encode()[:300])
            for text in data.split_documents(data.load_text(name).text)[:200]
        ]
        parts.append((data.Stream(data.pack(documents, 33), 16, seed), weight))
    stream = _Noting(data.Mixture(parts, batch_size=16))
    config = train.TrainConfig(
        steps=STEPS * len(LEGS), warmup_steps=0, log_every=1, seed=seed, ema_decay=0.9
    )
    model = gpt2.model(
        gpt2.Config(vocab=256, width=32, depth=2, heads=4, context=32),
        ops.Policy(axes=ops.MESH_AXES),
    )
    restored: list[str | None] = []

    class Watched(checkpoint.Checkpoints):
        def restore(self, like: Any, **options: Any) -> Any:
            found = super().restore(like, **options)
            restored.append(None if found is None else checkpoint.fingerprint(placing.whole(found)))
            return found

    with Watched(folder / "checkpoints") as checkpoints:
        supervisor = RunMonitor(stop=lambda step: step >= until)
        state, history = train.fit(
            model,
            stream,
            config,
            mesh=sharding.make_mesh(mesh),
            checkpoints=checkpoints,
            supervisor=supervisor,
        )
    result = {
        "restored": restored[0],
        "saved": checkpoint.fingerprint(placing.whole(state)),
        "losses": {str(row["step"]): row["loss"] for row in history},
        "rows": stream.rows,
    }
    (folder / f"leg-{until}-{jax.process_index()}.json").write_text(json.dumps(result))
    return result


class _Noting:
    """A stream that writes down the digest of every row that it gives."""

    def __init__(self, stream: Any):
        self._stream = stream
        self.rows = dict[str, str]()
        self.batch_size = stream.batch_size
        self.fingerprint = stream.fingerprint

    def batch(self, step: Any, rows: slice = slice(None)) -> Any:
        found = self._stream.batch(step, rows)
        names = sorted(found)
        first = rows.indices(self.batch_size)[0]
        for i in range(len(found["tokens"])):
            digest = hashlib.sha256(
                b"".join(found[name][i].tobytes() for name in names)
            ).hexdigest()
            self.rows[f"{int(step)}/{first + i}"] = digest
        return found


def legs(chosen: tuple[tuple[str, int, int], ...], folder: Path, seed: int) -> list[dict[str, Any]]:
    """What each leg wrote, its processes joined."""
    from jaxmodel import sharding
    from jaxmodel.distributed import launch

    found = []
    for number, (mesh, devices, processes) in enumerate(progress(chosen, "legs"), start=1):
        until = STEPS * number
        command = [
            str(Path(__file__).absolute()),
            "--leg",
            str(folder),
            mesh,
            str(until),
            str(seed),
        ]
        if processes > 1:
            launch.launch(command, processes=processes, devices=devices, logs=folder)
        else:
            environ = os.environ | sharding.simulation(devices)
            subprocess.run(
                [sys.executable, *command], env=environ, check=True, stdout=subprocess.DEVNULL
            )
        parts = [
            json.loads((folder / f"leg-{until}-{i}.json").read_text()) for i in range(processes)
        ]
        assert all(part["saved"] == parts[0]["saved"] for part in parts)
        found.append(
            {
                **parts[0],
                "rows": {place: row for part in parts for place, row in part["rows"].items()},
            }
        )
    return found


def stream_digest(found: list[dict[str, Any]], steps: int) -> str:
    """Of all rows of the steps that the legs made, in order."""
    rows = {place: row for part in found for place, row in part["rows"].items()}
    wanted = [rows[f"{step}/{i}"] for step in range(steps) for i in range(16)]
    return hashlib.sha256("".join(wanted).encode()).hexdigest()


def numbers(
    chosen: tuple[tuple[str, int, int], ...], seed: int
) -> tuple[list[tuple], dict[str, Any]]:
    """The legs, and one run without a move."""
    with tempfile.TemporaryDirectory() as name:
        moved = Path(name, "moved")
        still = Path(name, "still")
        for folder in (moved, still):
            folder.mkdir()
        found = legs(chosen, moved, seed)
        steps = STEPS * len(chosen)
        command = [
            sys.executable,
            str(Path(__file__).absolute()),
            "--leg",
            str(still),
            "data=1",
            str(steps),
            str(seed),
        ]
        subprocess.run(
            command,
            env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        alone = json.loads((still / f"leg-{steps}-0.json").read_text())
    equal = sum(after["restored"] == before["saved"] for before, after in itertools.pairwise(found))
    losses = {step: loss for part in found for step, loss in part["losses"].items()}
    apart = max(abs(losses[step] - loss) / loss for step, loss in alone["losses"].items())
    same = stream_digest(found, steps) == stream_digest([alone], steps)
    return [
        ("legs", len(chosen), "", None),
        (
            "restored states that are bit-equal to the saved ones",
            equal,
            "",
            f">= {len(chosen) - 1}",
        ),
        ("the token stream has one hash on every topology", float(same), "", ">= 1"),
        ("largest relative difference of a loss to the single device's", apart, "", "<= 1e-5"),
    ], {"legs": [list(one) for one in chosen], "steps of a leg": STEPS, "dtype": "float32"}


def run(quick: bool, seed: int) -> tuple[list[tuple], dict[str, Any]]:
    """In full or in its quick form."""
    return numbers(QUICK if quick else LEGS, seed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--leg"]:
        leg(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        report.experiment(__doc__, "four legs", run)
