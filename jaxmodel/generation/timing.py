"""Measurement of the speed of a bundle."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxmodel import tree
from jaxmodel.errors import at_least
from jaxmodel.generation import decode
from jaxmodel.generation.sampling import GREEDY
from jaxmodel.hub.bundle import Bundle
from jaxmodel.models import Model


def measure_speed(
    bundle: Bundle,
    streams: Sequence[int] = (1, 8),
    prompt: int = 512,
    new: int = 16,
    cache: int = 256,
    repeats: int = 3,
) -> dict[str, float]:
    """Measure prefill and greedy decoding in tokens per second.

    Each is the best of several runs, without compilation.

    Args:
      bundle: model and weights; no tokenizer is needed.
      streams: numbers of rows that are decoded at once; each is measured.
      prompt: length in tokens of the one prompt (at most the model's context); only its last
        position goes through the head.
      new: number of tokens that each row writes in a run.
      cache: number of positions that each token attends to (at most the model's context).
      repeats: number of timed runs. The best one counts, as other load can only slow a run down.

    Returns:
      `prefill_tps`, and `decode_tps_N` (over all rows) for each N of `streams`.

    Raises:
      InputError: `prompt` or `cache` below 1.
    """
    model = bundle.model
    params = bundle.for_inference()
    for name, tokens in (("prompt", prompt), ("cache", cache)):
        at_least(name, tokens)
    prompt = min(prompt, model.config.context)
    cache = min(cache, model.config.context)
    row = [i % model.config.vocab for i in range(prompt)]

    def read() -> jax.Array:
        return decode.prefill(model, params, [row], 1)[0]

    read().block_until_ready()
    speeds = {"prefill_tps": prompt / _best(read, repeats)}
    for rows in streams:
        write = _writer(model, params, rows, cache)
        write(0).block_until_ready()  # compiles
        speeds[f"decode_tps_{rows}"] = rows * new / _best(functools.partial(write, new), repeats)
    return speeds


def _writer(
    model: Model, params: tree.Params, rows: int, capacity: int
) -> Callable[[int], jax.Array]:
    """Return a function that decodes a number of further tokens in each row."""
    advance = decode.decoder(model, GREEDY)
    eos = jnp.array([-1], jnp.int32)
    keys = jax.random.split(jax.random.key(0), rows)
    token, position, done = (jnp.zeros(rows, dtype) for dtype in (jnp.int32, jnp.int32, jnp.bool_))
    state = decode.State(decode.new_cache(model, rows, capacity), token, position, keys, None)

    def write(new: int) -> jax.Array:
        # Continue with the old state: a new cache takes time to make, and attention reads all of a
        # cache in any case.
        nonlocal state
        tokens = done
        for start in range(0, max(new, 1), decode.STEPS):
            state, tokens = advance(params, state, done, min(decode.STEPS, new - start), eos)
        return tokens

    return write


def _best(work: Callable[[], jax.Array], repeats: int) -> float:
    """Return the seconds of the fastest of several runs."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work().block_until_ready()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
