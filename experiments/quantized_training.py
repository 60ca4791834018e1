"""Training in few bytes: weights that are int8 codes, and moments of 8 bits, against AdamW in
float32: memory and loss.

A GPT on the bytes of `wikitext2-valid` (block 64, batch 12, AdamW at a peak rate of 1e-3, clipped
at 1), trained three ways: float32 AdamW; the same weights with moments of 8 bits; and weights that
are `QTensor` leaves, rounded at random, without a float copy, with moments of 8 bits. The held-out
loss is over the same batches of `wikitext2-test`. Memory is what XLA plans for the whole jitted
step with its state donated: arguments and temporaries and results less those that share a buffer.
Activations are in it, so the three are compared as a user would run them (float32 Adam in float32
without remat, the least memory in bfloat16 with remat), and once more with Adam in bfloat16 with
remat too, where weights and states alone make the difference.

Command:  python experiments/quantized_training.py [--quick] [--seed N] --json -
Cost:     about 5 minutes on two cores; --quick (60 steps instead of 600, one size) about 1.
Goals:    memory of QTensor training at most 0.45 of float32 Adam's, at 128 wide x 4; its loss
  within 3 %; that of 8-bit moments within 1 %.
Measured: all goals met: memory 0.229 of float32 Adam's (22.2 to 97.1 bytes a weight), 0.688 of
          Adam's in bfloat16 with remat; at 512 wide x 6 0.276 (9.8 to 35.4) and 0.488. Loss 2.1195
          to 2.1203 nats, -0.036 %, with 8-bit moments -0.021 %.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmodel import data, losses, ops, optim, report, train, tree
from jaxmodel.models import gpt2
from jaxmodel.progress import progress

BLOCK = 64
BATCH = 12
RATE = 1e-3
CODES: tree.Rules = ((".*(norm/.*|_bias)", None), (".*", 8))
ALL: tree.Rules = ((".*", True),)
PLAIN = ops.Policy()
LEAST = ops.Policy(compute_dtype="bfloat16", activation_dtype="bfloat16", remat="full")


class Case:
    """A model, how its weights are stored, and its optimiser."""

    def __init__(
        self, width: int, depth: int, codes: bool, name: str, policy: ops.Policy, steps: int = 100
    ):
        self.model = gpt2.model(gpt2.Config(256, width, depth, max(4, width // 64), BLOCK), policy)
        rate = optim.schedule("cosine", RATE, steps, warmup_steps=min(50, steps // 4))
        decays = lambda params: tree.map_leaves(
            lambda path, _: not path.endswith(("bias", "norm/weight")), params
        )
        self.optimizer = optax.chain(
            optax.clip_by_global_norm(1.0),
            optim.optimizer(name, rate, weight_decay=0.1, mask=decays),
        )
        self.codes = codes
        self.trainable = ALL if codes else None
        config = train.TrainConfig(trainable=self.trainable)
        self.program = train.Program(
            self.model, config, loss=losses.next_token, optimizer=self.optimizer
        )
        self.step = self.program.update

    def start(self, key: jax.Array) -> train.TrainState:
        """The first state."""
        params = self.model.init(key)
        return self.program.start(
            key, optim.quantize_weights(params, CODES) if self.codes else params
        )

    def memory(self) -> float:
        """Bytes of a step, for each weight."""
        state = jax.eval_shape(self.start, jax.random.key(0))
        batch = {
            name: jax.ShapeDtypeStruct((BATCH, BLOCK), jnp.int32) for name in ("tokens", "targets")
        }
        found: Any = (
            jax.jit(self.step, donate_argnums=0).lower(state, batch).compile().memory_analysis()
        )
        all_of_it = (
            found.argument_size_in_bytes + found.temp_size_in_bytes + found.output_size_in_bytes
        )
        return (all_of_it - found.alias_size_in_bytes) / tree.count(state.params)

    def loss(self, steps: int, seed: int, texts: tuple[np.ndarray, ...]) -> float:
        """Train, and the held-out loss."""
        batches, heldout = (
            data.Stream(data.windows(text, BLOCK + 1, stride=BLOCK), BATCH * (1 + 3 * i), seed)
            for i, text in enumerate(texts)
        )
        state = jax.jit(self.start)(jax.random.key(seed))
        step = jax.jit(self.step, donate_argnums=0)
        for i in range(steps):
            state, _ = step(state, batches.batch(i))
        judge = jax.jit(
            lambda params, batch: losses.next_token(self.model, params, batch, train=False)[0]
        )
        return float(np.mean([judge(state.params, heldout.batch(i)) for i in range(20)]))


def run(quick: bool, seed: int) -> tuple[list[tuple], dict[str, Any]]:
    """Memory by size, losses of the small one."""
    entries: list[tuple] = []
    for width, depth in ((128, 4),) if quick else ((128, 4), (512, 6)):
        size = f"GPT {width} wide x {depth}"
        adam, adam_least, moments, codes = (
            Case(width, depth, *kind).memory()
            for kind in (
                (False, "adamw", PLAIN),
                (False, "adamw", LEAST),
                (False, "adamw8", LEAST),
                (True, "adamw8", LEAST),
            )
        )
        entries += [
            (
                f"{size}: QTensor weights and 8-bit moments, of float32 Adam",
                codes / adam,
                "x",
                "<= 0.45",
            ),
            (f"{size}: the same, of Adam in bfloat16 with remat", codes / adam_least, "x"),
            (f"{size}: 8-bit moments, of Adam in bfloat16 with remat", moments / adam_least, "x"),
            (f"{size}: float32 Adam", adam, "bytes a weight"),
            (f"{size}: QTensor weights and 8-bit moments", codes, "bytes a weight"),
        ]
    steps = 60 if quick else 600
    names = "wikitext2-valid", "wikitext2-test"
    texts = tuple(
        np.frombuffer(data.load_text(name).text.encode(), np.uint8).astype(np.int32)
        for name in names
    )
    kinds = {
        "float32 Adam": (False, "adamw"),
        "8-bit moments": (False, "adamw8"),
        "QTensor weights": (True, "adamw8"),
    }
    losses = {
        name: Case(128, 4, codes, optimizer, PLAIN, steps).loss(steps, seed, texts)
        for name, (codes, optimizer) in progress(kinds.items(), "runs")
    }
    entries += [(f"held-out loss, {name}", loss, "nats") for name, loss in losses.items()]
    base = losses.pop("float32 Adam")
    limits = dict(zip(losses, ("<= 1", "<= 3"), strict=True))
    over = {name: 100 * (loss / base - 1) for name, loss in losses.items()}
    entries += [
        (f"loss over float32 Adam's, {name}", value, "%", limits[name])
        for name, value in over.items()
    ]
    return entries, {"steps": steps, "batch": BATCH, "block": BLOCK, "rate": RATE}


if __name__ == "__main__":
    report.experiment(__doc__, "60 steps, and memory at one size", run)
