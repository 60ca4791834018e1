"""The device memory of a step, and which settings would need less when it runs out."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxmodel.errors import InputError

type Compile = Callable[[int, str], Any]
"""`compile(accumulate, remat)` -> a compiled step."""


def needed(compiled: Any) -> int:
    """Return the bytes on one device of a compiled program: arguments, results and work space.

    Results that reuse the memory of an argument are not counted twice.
    """
    found = compiled.memory_analysis()
    kept = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return int(kept + found.temp_size_in_bytes)


def limit() -> int:
    """Return the bytes of memory of a device of this process; for a CPU, of the machine."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def candidates(accumulate: int, rows: int, remat: str) -> Iterator[tuple[int, str]]:
    """Yield settings that need less memory, the cheapest in time first.

    First come more micro-batches, then recomputing the blocks.

    >>> list(candidates(1, 4, "none"))
    [(2, 'none'), (4, 'none'), (1, 'full'), (2, 'full'), (4, 'full')]
    """
    parts = [n for n in range(accumulate, rows + 1) if rows % n == 0 and n % accumulate == 0]
    for policy, n in itertools.product(dict.fromkeys((remat, "full")), parts):
        if (n, policy) != (accumulate, remat):
            yield n, policy


@dataclasses.dataclass(frozen=True)
class Fit:
    """Settings that fit: `accumulate` micro-batches and the policy `remat` need these `bytes`."""

    accumulate: int
    remat: str
    bytes: int


def what_fits(
    compile_with: Compile, accumulate: int, rows: int, remat: str, most: int
) -> Fit | None:
    """Return the first candidate that fits.

    XLA's analysis of the compiled step decides; nothing is run.

    Args:
      compile_with: a function that compiles the step.
      accumulate: the number of micro-batches that was tried.
      rows: the number of rows of a batch on one device.
      remat: the policy that was tried.
      most: the bytes of a device.
    """
    for parts, policy in candidates(accumulate, rows, remat):
        if (bytes_ := needed(compile_with(parts, policy))) <= most:
            return Fit(parts, policy, bytes_)
    return None


@contextlib.contextmanager
def explained(compile_with: Compile, accumulate: int, rows: int, remat: str) -> Iterator[None]:
    """Turn running out of memory in the block into an error that names settings that fit.

    Args:
      compile_with: a function that compiles the step.
      accumulate: the number of micro-batches of the step that runs.
      rows: the number of rows of a batch on one device.
      remat: the policy of the step that runs.

    Raises:
      InputError: the memory ran out.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        most = limit()
        gib = 2.0**30
        found = what_fits(compile_with, accumulate, rows, remat, most)
        advice = (
            "no number of micro-batches is enough: shard the model over more devices (a longer "
            "fsdp or tensor axis)"
        )
        if found is not None:
            advice = (
                f"gradient_accumulation_steps={found.accumulate} with remat={found.remat!r} needs "
                f"{found.bytes / gib:.3g} GiB and would fit"
            )
        wants = needed(compile_with(accumulate, remat)) / gib
        raise InputError(
            f"memory: a step needs {wants:.3g} GiB, a device has {most / gib:.3g} GiB; {advice}"
        ) from None
