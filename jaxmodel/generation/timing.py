"""Measurement of the speed of a bundle."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodel import tree
from jaxmodel.errors import InputError, at_least
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
      InputError: `prompt` or `cache` below 1, or a model that does not continue texts.
    """
    speeds = {}
    for name, (tokens, work) in tasks(bundle, streams, prompt, new, cache).items():
        work().block_until_ready()  # compiles
        speeds[name] = tokens / min(_seconds(work) for _ in range(repeats))
    return speeds


def compare_speed(
    before: Bundle,
    after: Bundle,
    streams: Sequence[int] = (1, 8),
    prompt: int = 512,
    new: int = 16,
    cache: int = 256,
    turns: int = 5,
) -> dict[str, Any]:
    """Measure prefill and greedy decoding of two bundles in turns.

    Other work on the machine slows single runs, so each turn runs one after the other, and medians
    over the turns count.

    Args:
      before: what a ratio of 1 stands for.
      after: the bundle of interest, such as the compressed one.
      streams: as in `measure_speed`.
      prompt: as in `measure_speed`.
      new: as in `measure_speed`.
      cache: as in `measure_speed`.
      turns: number of runs of each.

    Returns:
      `before` and `after`, each with the keys of `measure_speed`, in tokens per second; `ratio`,
      how many times as fast `after` is; and the settings.

    Raises:
      InputError: as in `measure_speed`, or `turns` below 1.
    """
    at_least("turns", turns)
    first, second = (tasks(one, streams, prompt, new, cache) for one in (before, after))
    found: dict[str, dict[str, float]] = {"before": {}, "after": {}, "ratio": {}}
    for name, (tokens, slow) in first.items():
        fast = second[name][1]
        for work in (slow, fast):
            work().block_until_ready()  # compiles
        seconds = [(_seconds(slow), _seconds(fast)) for _ in range(turns)]
        found["before"][name] = statistics.median(tokens / was for was, _ in seconds)
        found["after"][name] = statistics.median(tokens / now for _, now in seconds)
        found["ratio"][name] = statistics.median(was / now for was, now in seconds)
    context = before.model.config.context
    settings = {"prompt": min(prompt, context), "new": new, "cache": min(cache, context)}
    return {**found, **settings, "turns": turns}


def tasks(
    bundle: Bundle, streams: Sequence[int], prompt: int, new: int, cache: int
) -> dict[str, tuple[int, Callable[[], jax.Array]]]:
    """Return what is measured, by name: a number of tokens, and a function that runs them.

    Args:
      bundle: as in `measure_speed`.
      streams: as in `measure_speed`.
      prompt: as in `measure_speed`.
      new: as in `measure_speed`.
      cache: as in `measure_speed`.

    Raises:
      InputError: as in `measure_speed`.
    """
    for name, tokens in (("prompt", prompt), ("cache", cache)):
        at_least(name, tokens)
    model = bundle.model
    if not model.continues:
        raise InputError(
            f"bundle: {model.family or 'the model'} does not continue texts; allowed: a decoder"
        )
    params = bundle.for_inference()
    prompt = min(prompt, model.config.context)
    cache = min(cache, model.config.context)
    row = [i % model.config.vocab for i in range(prompt)]
    read = lambda: decode.prefill(model, params, [row], 1)[0]
    found: dict[str, tuple[int, Callable[[], jax.Array]]] = {"prefill_tps": (prompt, read)}
    for rows in streams:
        write = functools.partial(_writer(model, params, rows, cache), new)
        found[f"decode_tps_{rows}"] = rows * new, write
    return found


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


def _seconds(work: Callable[[], jax.Array]) -> float:
    start = time.perf_counter()
    work().block_until_ready()
    return time.perf_counter() - start
