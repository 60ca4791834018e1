"""How fast a bundle reads and writes."""

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
    """Tokens per second of prefill and of greedy decoding, each the best of several runs, none of
    which compiles.

    Args:
      bundle: model and weights; no tokenizer is needed.
      streams: for each, rows that are decoded at once.
      prompt: tokens of the one prompt that is read (at most the model's context); only its last
        position goes through the head.
      new: tokens that each row writes in a run.
      cache: positions that each of them attends to (at most the model's context).
      repeats: timed runs; the best one counts, for a shared machine only ever makes a run slower.

    Returns:
      `prefill_tps`, and `decode_tps_N` (over all rows) for each N of `streams`.

    Raises:
      InputError: `prompt` or `cache` below 1.
    """
    model = bundle.model
    params = bundle.running()
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
    """A function that decodes so many tokens more of each row."""
    advance = decode.decoder(model, GREEDY)
    eos = jnp.array([-1], jnp.int32)
    keys = jax.random.split(jax.random.key(0), rows)
    token, position, done = (jnp.zeros(rows, dtype) for dtype in (jnp.int32, jnp.int32, jnp.bool_))
    state = decode.State(decode.new_cache(model, rows, capacity), token, position, keys, None)

    def write(new: int) -> jax.Array:
        # goes on where it was: an empty cache takes time to make, and attention always reads all of
        # it
        nonlocal state
        tokens = done
        for start in range(0, max(new, 1), decode.STEPS):
            state, tokens = advance(params, state, done, min(decode.STEPS, new - start), eos)
        return tokens

    return write


def _best(work: Callable[[], jax.Array], repeats: int) -> float:
    """Seconds of the fastest of several runs."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work().block_until_ready()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
