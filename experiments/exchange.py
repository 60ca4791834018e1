"""Gradients exchanged in fewer bytes: what a step sends over the data axis, and what the run loses
by it.

A GPT (4 layers, 128 wide, the bytes of `wikitext2-valid`, batches of 16 rows of 64) on eight
simulated devices, the axis data=8: gradients summed as they are, in 8 bits, and the largest
hundredth of them with error feedback. The bytes are read from the compiled step; the held-out loss
is over all of `wikitext2-test`. Between machines fewer bytes save time; eight devices that share
two cores cannot show that, so no speed is given.

Command:  python experiments/exchange.py [--quick] [--seed N] --json -
Cost:     about 4 minutes on two cores (400 steps each); --quick (60 steps) about 1.
Goals:    int8: bytes at most 0.27 of the exact exchange's, held-out loss within 1 % of its.
Measured: both goals met: int8 0.2528 of the bytes (1.754 of 6.937 MB), loss -0.0082 % (2.2037 to
          2.2035 nats); the largest hundredth 0.0562 of the bytes, loss 23.3 % above after these few
          steps.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import numpy as np

from jaxmodel import data, losses, ops, plan, report, sharding, train
from jaxmodel.models import gpt2

BLOCK = 64
BATCH = 16
DEVICES = 8
CONFIG = gpt2.Config(vocab=256, width=128, depth=4, heads=4, context=BLOCK)
type Kind = Literal["exact", "int8", "top_k"]
KINDS: dict[str, Kind] = {"exact": "exact", "int8": "int8", "top 1 %": "top_k"}


def texts(seed: int) -> tuple[data.Stream, data.Stream]:
    """Batches to train on and batches to judge by."""
    names = "wikitext2-valid", "wikitext2-test"
    rows = [
        np.frombuffer(data.load_text(name).text.encode(), np.uint8).astype(np.int32)
        for name in names
    ]
    trained, judged = (data.windows(row, BLOCK + 1, stride=BLOCK) for row in rows)
    return data.Stream(trained, BATCH, seed), data.Stream(judged, 64, 0)


def sent(kind: Kind, stream: data.Stream, mesh: jax.sharding.Mesh) -> float:
    """Bytes of the collectives of a step."""
    model = gpt2.model(CONFIG, ops.Policy(axes=ops.MESH_AXES))
    config = train.TrainConfig(gradient_compression=kind)
    batch = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in stream.batch(0).items()}
    step = train.Program(model, config, loss=losses.next_token, mesh=mesh).compile(batch)
    return float(sum(plan.moved(plan.collectives(step)).values()))


def learn(
    kind: Kind,
    steps: int,
    seed: int,
    streams: tuple[data.Stream, data.Stream],
    mesh: jax.sharding.Mesh,
) -> float:
    """Train; the held-out loss."""
    model = gpt2.model(CONFIG, ops.Policy(axes=ops.MESH_AXES))
    config = train.TrainConfig(
        steps=steps, gradient_compression=kind, seed=seed, log_every=max(1, steps // 10)
    )
    _, history = train.fit(model, streams[0], config, heldout=streams[1], mesh=mesh)
    return history[-1]["heldout_loss"]


def run(quick: bool, seed: int) -> tuple[list[tuple], dict[str, Any]]:
    """Bytes and losses of each."""
    sharding.simulate_devices(DEVICES)
    mesh = sharding.make_mesh({"data": DEVICES})
    streams = texts(seed)
    steps = 60 if quick else 400
    sizes = {name: sent(kind, streams[0], mesh) for name, kind in KINDS.items()}
    losses = {name: learn(kind, steps, seed, streams, mesh) for name, kind in KINDS.items()}
    entries: list[tuple] = [
        (f"{name}: sent in a step", size / 1e6, "MB") for name, size in sizes.items()
    ]
    entries += [(f"{name}: held-out loss", loss, "nats") for name, loss in losses.items()]
    for name in list(KINDS)[1:]:
        limits = ("<= 0.27", "<= 1") if name == "int8" else (None, None)
        entries.append(
            (f"{name}: bytes of the exact exchange's", sizes[name] / sizes["exact"], "x", limits[0])
        )
        entries.append(
            (
                f"{name}: loss over the exact exchange's",
                100 * (losses[name] / losses["exact"] - 1),
                "%",
                limits[1],
            )
        )
    return entries, {
        "steps": steps,
        "batch": BATCH,
        "block": BLOCK,
        "devices": DEVICES,
        "config": str(CONFIG),
    }


if __name__ == "__main__":
    report.experiment(__doc__, "60 steps", run)
