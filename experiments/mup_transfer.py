"""The best learning rate over widths 32 to 128 of a GPT, a Llama and a ResNet, with `adapt.mup` and
without.

Command:  python experiments/mup_transfer.py [--quick] [--seed N] --json -
Cost:     about 5 minutes on two cores; --quick about 1 (widths 32 and 128 of the GPT).
Goals:    with muP (Yang et al., 2022) the learning rate that is best at width 128 is that of width
          32 within one octave, and the rate that is best at width 32 loses at most 0.05 nats there;
          under the standard parametrisation the best rate of the GPT and of the Llama falls by more
          than one octave. Best is the lowest mean loss of the last ten of 50 steps of Adam on fresh
          batches; between the rates of the grid, which are an octave apart, a parabola is laid. The
          full form writes the picture mup_transfer.svg beside this file.
Measured: all goals met (229 s). With muP the best rate of GPT, Llama, ResNet moves by -0.10, 0.31
          and 0.40 octaves from width 32 to 128, and the base's best rate loses 0.00, 0.01 and 0.01
          nats; under the standard parametrisation that of GPT and Llama moves by -2.52 and -1.98
          octaves and loses 1.03 and 0.38 nats. At its own best rate the standard one is ahead after
          50 steps (GPT 1.734, muP 1.913; Llama 1.558, muP 1.588).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmodel import adapt, models, report
from jaxmodel.models import gpt2, llama, resnet
from jaxmodel.progress import progress

BASE = 32
STEPS = 50
LAST = 10
VOCAB, BATCH, LENGTH, SIDE, CLASSES = 64, 16, 32, 8, 10
RATES = 2.0 ** np.arange(-11, -2)


def make(family: str, width: int) -> models.Model:
    """The model of a width: heads of 16, feed-forward parts four times as wide."""
    if family == "gpt2":
        return gpt2.model(gpt2.Config(VOCAB, width, 2, width // 16, LENGTH))
    if family == "llama":
        sizes = (width // 16, width // 16, 16, 4 * width)
        return llama.model(llama.Config(VOCAB, width, 2, *sizes, LENGTH))
    config = resnet.Config((1, 1), width // 4, classes=CLASSES, size=SIDE, small=True)
    return resnet.model(config)


def batches(family: str, seed: int) -> dict[str, jax.Array]:
    """A batch for each step: tokens and their successors, seven of eight by a fixed permutation of
    pairs; or images of a class's pattern under noise.
    """
    rng = np.random.default_rng(seed)
    if family == "resnet":
        patterns = rng.normal(size=(CLASSES, SIDE, SIDE, 3))
        classes = rng.integers(0, CLASSES, (STEPS, BATCH))
        images = patterns[classes] + 3 * rng.normal(size=(STEPS, BATCH, SIDE, SIDE, 3))
        return {"x": jnp.asarray(images, jnp.float32), "y": jnp.asarray(classes, jnp.int32)}
    table = np.stack([rng.permutation(VOCAB) for _ in range(4)])
    rows = rng.integers(0, VOCAB, (STEPS, BATCH, LENGTH + 1))
    for i in range(2, LENGTH + 1):
        known = table[rows[..., i - 2] % 4, rows[..., i - 1]]
        rows[..., i] = np.where(rng.random((STEPS, BATCH)) < 0.875, known, rows[..., i])
    return {
        "x": jnp.asarray(rows[..., :-1], jnp.int32),
        "y": jnp.asarray(rows[..., 1:], jnp.int32),
    }


def losses(family: str, width: int, standard: bool, seed: int) -> np.ndarray:
    """The loss at the end for each learning rate."""
    model = make(family, width)
    init: Any = [(".*", None)]
    factors = optax.identity()
    if not standard:
        base = make(family, BASE).config
        wide = adapt.mup(model, base)
        model, init, factors = wide.model, wide.init, adapt.scale_by_path(wide.rates)
    params = jax.jit(lambda key: adapt.initialize(model, key, init))(jax.random.key(seed))

    def loss(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        logits = model.apply(params, batch["x"], train=family == "resnet").logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    @jax.jit
    def run(rate: jax.Array, params: Any, data: dict[str, jax.Array]) -> jax.Array:
        optimizer = optax.chain(optax.scale_by_adam(), factors)

        def step(carry: Any, batch: Any) -> Any:
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, batch)
            updates, state = optimizer.update(grads, state, params)
            params = jax.tree.map(lambda p, u: p - (rate * u).astype(p.dtype), params, updates)
            return (params, state), value

        return jnp.mean(jax.lax.scan(step, (params, optimizer.init(params)), data)[1][-LAST:])

    data = batches(family, seed)
    found = np.asarray([float(run(jnp.float32(rate), params, data)) for rate in RATES])
    return np.where(np.isfinite(found), found, 99.0)


def best(values: np.ndarray) -> float:
    """The logarithm (to base 2) of the best rate, by a parabola through the lowest and its
    neighbours.
    """
    i = int(np.clip(np.argmin(values), 1, len(values) - 2))
    a, b, c = values[i - 1 : i + 2]
    bend = a - 2 * b + c
    return float(np.log2(RATES[i]) + (np.clip(0.5 * (a - c) / bend, -1, 1) if bend > 0 else 0))


def run(quick: bool, seed: int) -> tuple[list[tuple], dict[str, Any]]:
    """Train every width at every rate both ways."""
    widths = [32, 128] if quick else [32, 64, 128]
    families = ["gpt2"] if quick else ["gpt2", "llama", "resnet"]
    jobs = [(f, s, w) for f in families for s in (False, True) for w in widths]
    found = {job: losses(job[0], job[2], job[1], seed) for job in progress(jobs, "widths")}
    entries: list[tuple] = []
    curves: dict[str, tuple[Any, Any]] = {}
    for family in families:
        for standard in (False, True):
            kind = "standard" if standard else "muP"
            at = {width: found[family, standard, width] for width in widths}
            shift = best(at[widths[-1]]) - best(at[widths[0]])
            goal = ("<= -1",) if standard and family != "resnet" else ()
            entries.append((f"{family}, {kind}: shift of the best rate", shift, "octaves", *goal))
            if not standard:
                entries.append((f"{family}, muP: size of it", abs(shift), "octaves", "<= 1"))
            lost = at[widths[-1]][np.argmin(at[widths[0]])] - at[widths[-1]].min()
            goal = ("<= 0.05",) if not standard else ()
            name = f"{family}, {kind}: lost at width {widths[-1]} by the best rate of {BASE}"
            entries.append((name, float(lost), "nats", *goal))
            for width, values in at.items():
                name = f"{family}, {kind}, width {width}"
                entries.append((f"{name}: best rate", 2.0 ** best(values), ""))
                entries.append((f"{name}: loss there", float(values.min()), "nats"))
                if family != "resnet":
                    curves[name] = (RATES, np.minimum(values, np.log(VOCAB) + 0.5))
    if not quick:
        shown = {name: xy for name, xy in curves.items() if name.startswith("gpt2")}
        picture = report.plot.curves(
            shown, "learning rate", "loss", "The best rate over widths", logx=True
        )
        Path(__file__).with_suffix(".svg").write_bytes(picture)
    protocol = {"widths": widths, "steps": STEPS, "rates": RATES.tolist(), "optimizer": "adam"}
    return entries, {**protocol, "batch": [BATCH, LENGTH], "vocab": VOCAB, "side": SIDE}


if __name__ == "__main__":
    report.experiment(__doc__, "widths 32 and 128 of the GPT", run)
