"""How long compression takes, and how much memory: single matrices, all of SmolLM2-135M-Instruct,
and the calibration block after block.

Cold is a new process without a compilation cache: the first call, which compiles. Gigabytes a
second count the float32 weights that are read. Peak memory is the process's own (ru_maxrss), of a
new process that loads the model, calibrates and compresses it, over what it had after loading plus
the statistics of one block.

Command:  python experiments/compress_speed.py [--quick] [--seed N] --json -
Cost:     about 8 minutes on two quiet cores; --quick under 3.
Goals:    GPTQ of 768 x 768 <= 1 s cold, <= 0.1 s warm; all of SmolLM2 by GPTQ, statistics given,
          <= 60 s; in sequence with 16k tokens <= 300 s; magnitude, rtn and wanda >= 0.5 GB/s; peak
          memory <= 1.25x.
Measured: the quick form, 110 s beside other work on both cores (AMD EPYC): GPTQ of 768 x 768 1.55 s
          cold and 0.114 s warm (missed; 1.15 and 0.09 on quiet cores); all matrices 34.6 s; rtn in
          groups 1.04 GB/s, but in whole rows 0.26, and magnitude and wanda 0.075 (missed); peak
          memory 0.995x without GPTQ.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodel import compress, data, hub, report
from jaxmodel.progress import step

WINDOW = 512
BATCH = 4
MATRICES = "blocks/.*/(attn|mlp)/.*"
COLD = """
import json, sys, time
import jax, jax.numpy as jnp, numpy as np
from jaxmodel import compress
random = np.random.default_rng(int(sys.argv[1]))
weight = jnp.asarray(random.normal(size=(768, 768)), jnp.float32)
x = random.normal(size=(2048, 768)).astype(np.float32)
stats = {"gram": jnp.asarray(x.T @ x), "square": jnp.asarray((x * x).sum(0)),
         "count": jnp.float32(2048)}
method = compress.Gptq(4)
seconds = []
for _ in range(6):
    began = time.perf_counter()
    jax.block_until_ready(method(weight, stats))
    seconds.append(time.perf_counter() - began)
print(json.dumps(seconds))
"""
MEMORY = """
import json, resource, sys, time
import jax.numpy as jnp
from jaxmodel import compress, data, hub, tree
chain, order, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
bundle = hub.from_pretrained("smollm2-135m", dtype="float32")
tokenizer = hub.need_processor(bundle)
ids = tokenizer.encode(data.load_text("wikitext2-valid").text)
windows = data.windows(ids, 512, limit=count, begin=tokenizer.begins)
batches = [jnp.asarray(windows[i : i + 4, :512]) for i in range(0, count, 4)]
loaded = peak()
began = time.perf_counter()
recipe = [("blocks/.*/(attn|mlp)/.*", chain), (".*", ())]
compress.compress_bundle(bundle, recipe, batches=batches, order=order)
print(json.dumps({"loaded": loaded, "peak": peak(), "seconds": time.perf_counter() - began}))
"""


def _fresh(program: str, *given: object) -> Any:
    """Run a program in a new process without a compilation cache, and read what it prints."""
    env = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, "-c", program, *map(str, given)]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _seconds(work: Callable[[], Any], times: int = 5) -> float:
    """Return the median time of a call, the first left out."""
    took = []
    for _ in range(times + 1):
        began = time.perf_counter()
        jax.block_until_ready(work())
        took.append(time.perf_counter() - began)
    return statistics.median(took[1:])


def run(quick: bool, seed: int) -> tuple[list[tuple], dict[str, Any]]:
    """Measure single matrices, the whole model, and the calibration."""
    entries: list[tuple] = []
    with step("one matrix"):
        cold, *warm = _fresh(COLD, seed)
        entries.append(("GPTQ of 768 x 768, cold", cold, "s", "<= 1"))
        entries.append(("GPTQ of 768 x 768, warm", statistics.median(warm), "s", "<= 0.1"))
        random = np.random.default_rng(seed)
        weight = jnp.asarray(random.normal(size=(4096, 4096)), jnp.float32)
        stats: Any = {
            "square": jnp.asarray(random.uniform(1, 2, 4096), jnp.float32),
            "count": jnp.float32(64),
        }
        for text in ("magnitude(0.5)", "wanda(0.5)", "rtn(8)", "rtn(4, group=64)"):
            [method] = compress.parse(text)
            took = _seconds(lambda method=method: method(weight, stats))
            entries.append((text, weight.nbytes / took / 1e9, "GB/s", ">= 0.5"))
    bundle = hub.from_pretrained("smollm2-135m", dtype="float32")
    tokenizer = hub.need_processor(bundle)
    text = data.load_text("wikitext2-valid")
    windows = data.windows(tokenizer.encode(text.text), WINDOW, limit=BATCH, begin=tokenizer.begins)
    batches = [jnp.asarray(windows[:, :WINDOW])]
    with step("all of SmolLM2"):
        measured = compress.observe(
            bundle.model, bundle.params, batches, MATRICES, ("gram", "square")
        )
        began = time.perf_counter()
        made, _ = compress.apply([(MATRICES, "gptq(4)"), (".*", ())], bundle.params, measured)
        jax.block_until_ready(made)
        took = time.perf_counter() - began
    entries.append(("GPTQ of all matrices of SmolLM2", took, "s", "<= 60"))
    matrices = [measured[path]["gram"] for path in measured if path.startswith("blocks/")]
    block = sum(gram.nbytes // gram.shape[0] for gram in matrices)
    del measured, made, bundle
    chain, order, count = ("wanda(0.5)", "once", 4) if quick else ("gptq(4)", "sequential", 32)
    with step("calibration"):
        found = _fresh(MEMORY, chain, order, count)
    over = found["peak"] / (found["loaded"] + block)
    tokens = f"{count * WINDOW:,} tokens"
    goal = None if quick else "<= 300"
    entries.append((f"{chain} of SmolLM2, {order}, {tokens}", found["seconds"], "s", goal))
    entries.append((f"peak memory of {chain}, {order}, {tokens}", over, "x", "<= 1.25"))
    return entries, {"text": {"name": text.name, "origin": text.origin, "sha256": text.sha256}}


if __name__ == "__main__":
    report.experiment(__doc__, "no calibration in sequence", run)
