"""2,000 digits of MNIST: RandAugment and smoothed labels against neither, the same updates, three
seeds.

Each seed draws other digits, 200 of each class, and other weights. Settings were chosen on 5,000
further training images (seed 10); the test part is looked at once.

Command:  python experiments/augmentation.py [--quick] [--seed N] --json -
Cost:     about 6 minutes on two quiet cores (2,000 updates, six runs); --quick about 1 (500
  updates, one seed).
Goals:    better with than without for every one of the three seeds.
Measured: goal met: 96.54, 96.58 and 96.50 % without, 98.32, 98.41 and 98.50 % with, for seeds 0, 1
          and 2: +1.87 points in the mean, at least +1.78.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxmodel import data, evaluate, losses, report, train
from jaxmodel.data import augment
from jaxmodel.models import lenet, predict_fn

LABELS = 200
KEPT_APART = 5000
BATCH = 64
SMOOTHING = 0.1
MODEL = lenet.model(lenet.Config((8, 16), (64,)))
PREDICT = jax.jit(predict_fn(MODEL, "logits"))
MOVES = (
    "identity",
    "rotate",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)  # what a digit stays the same under
AUGMENT = augment.RandAugment(2, 5, MOVES, translate=0.1)


def parts(
    images: Mapping[str, np.ndarray], seed: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """`LABELS` rows of each class, and rows kept apart."""
    order = np.argsort(np.random.Philox(key=seed).random_raw(len(images["labels"])), kind="stable")
    apart = order[:KEPT_APART]
    order = order[KEPT_APART:]
    few = np.concatenate([order[images["labels"][order] == c][:LABELS] for c in range(10)])
    return data.subset(images, few), data.subset(images, apart)


def learn(rows: Any, steps: int, seed: int, changed: Any, smoothing: float) -> Any:
    """Train, with or without augmentation and smoothing; the last parameters."""
    config = train.TrainConfig(
        steps=steps,
        learning_rate=2e-3,
        warmup_steps=50,
        weight_decay=0.01,
        b2=0.99,
        seed=seed,
        log_every=100,
    )
    loss = losses.supervised(smoothing=smoothing)
    state, _ = train.fit(MODEL, data.Stream(rows, BATCH, seed), config, loss=loss, augment=changed)
    return state.params


def accuracy(params: Any, rows: Mapping[str, np.ndarray]) -> float:
    """In percent."""
    return 100 * evaluate.accuracy(PREDICT, params, rows["pixels"], rows["labels"]).value


def run(quick: bool, seed: int) -> tuple[list[tuple], dict[str, Any]]:
    """Both on the same rows, from the same weights, for each seed."""
    images = data.load_images("mnist")
    steps, seeds = (500, [seed]) if quick else (2000, [seed, seed + 1, seed + 2])
    entries: list[tuple] = []
    gains = []
    for number in seeds:
        rows, _ = parts(images.train, number)
        without = accuracy(learn(rows, steps, number, None, 0.0), images.test)
        both = accuracy(learn(rows, steps, number, AUGMENT, SMOOTHING), images.test)
        gains.append(both - without)
        entries += [
            (f"seed {number}: without", without, "%"),
            (f"seed {number}: RandAugment and smoothing", both, "%"),
        ]
    entries += [
        ("mean gain", float(np.mean(gains)), "points"),
        ("least gain of the seeds", min(gains), "points", "> 0"),
    ]
    where = {
        "rows": 10 * LABELS,
        "steps": steps,
        "batch": BATCH,
        "augment": str(AUGMENT),
        "smoothing": SMOOTHING,
    }
    return entries, {**where, "data": images.origin, "sha256": images.sha256}


if __name__ == "__main__":
    report.experiment(__doc__, "500 updates, one seed", run)
