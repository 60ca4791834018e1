"""A linear map of which nine blocks in ten are zero, against the dense map in XLA on this device,
forward and backward.

A `BlockSparse` leaf in `ops.einsum`; `ops.block_sparse_matmul`, whose places are known apart (the
fixed masks of `connect.BlockLinear`); the masked dense weight, which is what a mask costs without
kernels; the plain dense one; and an unstructured `Sparse` leaf with as many weights, which is
expanded in every call. All in float32, taking turns in one run; the shortest of the repeats counts.
CPU seconds, of all threads, stand beside those of the clock, because on a busy machine the longer
function is interrupted more often and the clock flatters the shorter: with 9.4 % of the products,
more than 10.7x is not from fewer products alone.

Command:  python experiments/block_sparse.py [--quick] [--seed N] --json -
Cost:     about 1 minute on two cores; --quick about half of that.
Goals:    at 90 % zeros, 2,048 x 2,048 with blocks of 64 x 64 and 512 rows: at least 3 times faster
          than dense and than masked dense, by the clock and in CPU seconds, forward, and with
          gradients of the input and the weights; results equal to 1e-4 of the largest.
Measured: all goals met, on a busy machine: forward the leaf is 5.75x faster than dense by the clock
          and 5.73x in CPU seconds (8.08 ms against 46.5 ms; 6.07x faster than masked dense), with
          gradients 5.66x and 5.42x; blocks at known places 5.54x and 6.49x. Of 8 rows 6.11x and
          12.3x, of 1 row 1.69x and 4.02x. An unstructured `Sparse` leaf is slower than dense:
          0.557x, and 0.095x of 8 rows.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodel import ops, report
from jaxmodel.leaves import BlockSparse, Sparse, largest_blocks
from jaxmodel.progress import progress

SIZE = 2048
DENSITY = 0.1


type Times = dict[str, tuple[float, float]]  # name -> milliseconds by the clock, of all threads


def fastest(functions: dict[str, Callable[[], Any]], repeats: int) -> Times:
    """The shortest times of each function. They take turns, so that what else runs slows all."""
    best = dict.fromkeys(functions, (float("inf"), float("inf")))
    for i in range(repeats + 1):
        for name, function in functions.items():
            began = time.perf_counter()
            cpu = time.process_time()
            jax.block_until_ready(function())
            took = 1000 * (time.perf_counter() - began), 1000 * (time.process_time() - cpu)
            if i:  # the first compiles
                best[name] = min(best[name][0], took[0]), min(best[name][1], took[1])
    return best


def case(rows: int, block: int, seed: int, repeats: int) -> tuple[Times, Times, float, float]:
    """Times forward, times forward and backward, the largest relative difference of results, the
    share of zeros.
    """
    random = np.random.default_rng(seed)
    weight, x = (
        jnp.asarray(random.normal(size=(n, SIZE)) / SIZE**0.5, jnp.float32) for n in (SIZE, rows)
    )
    leaf = BlockSparse.from_dense(
        weight,
        largest_blocks(weight, (block, block), max(1, round(DENSITY * SIZE / block))),
        block=(block, block),
    )
    mask = jnp.repeat(jnp.repeat(leaf.keep(), block, 0), block, 1).astype(jnp.float32)
    columns = leaf.columns()
    kept = jnp.swapaxes(leaf.values, 1, 2).reshape(SIZE // block, block, -1)
    sparse = Sparse.from_dense(leaf.decode())

    # each function of the activation and of the one array that trains, the other arrays closed over
    # as arguments
    run: dict[str, tuple[Callable[..., jax.Array], jax.Array, Any]] = {
        "dense": (lambda x, w, _: ops.einsum("BD,FD->BF", x, w), weight, None),
        "masked dense": (lambda x, w, mask: ops.einsum("BD,FD->BF", x, w * mask), weight, mask),
        "BlockSparse leaf": (
            lambda x, v, leaf: ops.einsum("BD,FD->BF", x, dataclasses.replace(leaf, values=v)),
            leaf.values,
            leaf,
        ),
        "blocks at known places": (ops.block_sparse_matmul, kept, columns),
        "Sparse leaf": (
            lambda x, v, leaf: ops.einsum("BD,FD->BF", x, dataclasses.replace(leaf, values=v)),
            sparse.values,
            sparse,
        ),
    }
    forward = {}
    backward = {}
    results = {}
    for name, (function, w, other) in run.items():
        one = jax.jit(function)
        both = jax.jit(
            jax.grad(lambda x, w, other, f=function: jnp.sum(f(x, w, other) ** 2), argnums=(0, 1))
        )
        results[name] = np.asarray(one(x, w, other))
        forward[name] = lambda one=one, w=w, other=other: one(x, w, other)
        backward[name] = lambda both=both, w=w, other=other: both(x, w, other)
    want = results["masked dense"]
    error = max(
        float(np.abs(got - want).max() / np.abs(want).max())
        for name, got in results.items()
        if name != "dense"
    )
    return (
        fastest(forward, repeats),
        fastest(backward, max(repeats // 2, 3)),
        error,
        float(1 - jnp.mean(mask)),
    )


def run(quick: bool, seed: int) -> tuple[list[tuple], dict[str, Any]]:
    """Every case, and its ratios."""
    entries: list[tuple] = []
    cases = (
        [(512, 64), (8, 64)]
        if quick
        else [(512, 64), (512, 32), (512, 128), (64, 64), (8, 64), (1, 64)]
    )
    for rows, block in progress(cases, "cases"):
        forward, backward, error, zeros = case(rows, block, seed, 10 if quick else 20)
        main = (rows, block) == (512, 64)
        head = f"{rows} rows, blocks of {block}"
        entries += [
            (f"{head}: zeros", 100 * zeros, "%", ">= 90" if main else None),
            (f"{head}: largest difference", error, "", "<= 1e-4"),
        ]
        for what, times in (("forward", forward), ("with gradients", backward)):
            for name in ("BlockSparse leaf", "blocks at known places"):
                for other in ("dense", "masked dense"):
                    for i, unit in enumerate(("", ", CPU seconds")) if main else [(0, "")]:
                        ratio = times[other][i] / times[name][i]
                        entries.append(
                            (
                                f"{head}: {name}, {what}, over {other}{unit}",
                                ratio,
                                "x",
                                ">= 3" if main else None,
                            )
                        )
            entries.append(
                (
                    f"{head}: Sparse leaf, {what}, over dense",
                    times["dense"][0] / times["Sparse leaf"][0],
                    "x",
                )
            )
            entries += [
                (f"{head}: {name}, {what}", ms, "ms") for name, (ms, _) in times.items() if main
            ]
    return entries, {"size": SIZE, "density": DENSITY, "dtype": "float32"}


if __name__ == "__main__":
    report.experiment(__doc__, "two cases and fewer repeats", run)
