"""A network of two convolutions learns MNIST from the start to 99.1 % of the test images, in
minutes on two cores.

Command:  python experiments/mnist_cnn.py [--quick] [--seed N] --json -
Cost:     about 2.3 minutes on two quiet cores; --quick about half a minute (1 epoch instead of 8).
Goals:    at least 99.1 % of the 10,000 test images right (98 % in the quick form); training takes
  at most 3 minutes.
Measured: all goals met: 99.22 % of the test images (95 % interval 99.03 to 99.37), 134 s of
          training on two quiet cores; with the seeds 1 and 2 99.20 and 99.27 % (on a busy machine).
"""

from __future__ import annotations

import time
from typing import Any

import jax

from jaxmodel import data, evaluate, losses, report, train, tree
from jaxmodel.models import cnn
from jaxmodel.progress import progress

BATCH = 128
RATE = 2e-3


def run(quick: bool, seed: int) -> tuple[list[tuple], dict[str, Any]]:
    """Train on the whole training part, judge by the test part, once at the end: nothing is chosen
    by it.
    """
    images = data.load_images("mnist")
    stream = data.Stream(images.train, BATCH, seed)
    epochs = 1 if quick else 8
    steps = epochs * stream.count // BATCH
    model = cnn.model(cnn.SIZES["mnist"])
    config = train.TrainConfig(
        steps=steps, learning_rate=RATE, warmup_steps=200, weight_decay=0.01, b2=0.99, seed=seed
    )

    began = time.perf_counter()
    used = time.process_time()
    program = train.Program(model, config, loss=losses.classification)
    step = program.step
    state = program.init(jax.random.key(seed))
    for i, batch in enumerate(progress(data.prefetch(stream, 0, steps), "train", total=steps)):
        state, metrics = step(state, batch)
        if i % 100 == 99:
            jax.block_until_ready(metrics)  # not thousands of steps ahead of the machine
    jax.block_until_ready(state)
    seconds = time.perf_counter() - began
    processor = time.process_time() - used

    predict = jax.jit(lambda params, pixels: model.apply(params, pixels).logits)
    found = evaluate.accuracy(predict, state.params, images.test["pixels"], images.test["labels"])
    entries: list[tuple] = [
        ("parameters", tree.count(state.params), "", "== 34826"),
        ("test accuracy", 100 * found.value, "%", ">= 98" if quick else ">= 99.1"),
        ("test accuracy, 95 % interval from", 100 * found.interval[0], "%"),
        ("test accuracy, 95 % interval to", 100 * found.interval[1], "%"),
        ("training", seconds, "s", "<= 180"),
        ("training, processor time", processor, "s"),
        ("throughput", steps * BATCH / seconds, "images/s"),
    ]
    return entries, {
        "epochs": epochs,
        "batch": BATCH,
        "data": images.origin,
        "sha256": images.sha256,
    }


if __name__ == "__main__":
    report.experiment(__doc__, "1 epoch instead of 8", run)
