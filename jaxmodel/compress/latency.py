"""How fast a model runs before and after its compression."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from jaxmodel import generation
from jaxmodel.errors import InputError, at_least
from jaxmodel.hub import Bundle


def latency(
    before: Bundle,
    after: Bundle,
    *,
    streams: Sequence[int] = (1, 8),
    prompt: int = 512,
    new: int = 16,
    cache: int = 256,
    turns: int = 3,
) -> dict[str, Any]:
    """Measure prefill and decoding of two bundles in turn, in tokens per second.

    Both run in the form that is fastest here (`Bundle.for_inference`). Other work on the machine
    slows single runs down, so they alternate, and medians count.

    Args:
      before: the model as it was; a decoder.
      after: the compressed one.
      streams: numbers of rows that are decoded at once; each is measured.
      prompt: length in tokens of the one prompt (at most the model's context).
      new: number of tokens that each row writes in a run.
      cache: number of positions that each token attends to (at most the model's context).
      turns: number of runs of each.

    Returns:
      `before` and `after`, each with `prefill_tps` and `decode_tps_N` (over all N rows); `ratio`,
      the median over the turns of how many times as fast `after` is; and the settings. Put it into
      a report by `dataclasses.replace(report, latency=...)`.

    Raises:
      InputError: no decoder, or a setting below 1.
    """
    for one in (before, after):
        if not one.model.continues:
            raise InputError(
                f"latency: {one.model.family or 'the model'} does not continue texts; allowed: a "
                "decoder"
            )
    at_least("turns", turns)
    run = lambda one: generation.measure_speed(one, streams, prompt, new, cache, repeats=1)
    runs = [(run(before), run(after)) for _ in range(turns)]
    middle = lambda of: {
        name: statistics.median(of(was[name], now[name]) for was, now in runs)
        for name in runs[0][0]
    }
    return {
        "before": middle(lambda was, now: was),
        "after": middle(lambda was, now: now),
        "ratio": middle(lambda was, now: now / was),
        "prompt": min(prompt, before.model.config.context),
        "new": new,
        "cache": min(cache, before.model.config.context),
        "turns": turns,
    }
