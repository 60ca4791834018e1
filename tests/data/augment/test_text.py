"""Texts: rates and lengths as they are said to be, nothing lost, nothing across segments, padding
as it was.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter

import jax
import numpy as np
import pytest

from jaxmodel.data import augment
from jaxmodel.data.augment.text import LocalShuffle, SentenceShuffle, TokenDropout

SEGMENTS = [7, 1, 12, 0, 4]  # lengths; 0 tokens of padding between the last two, then padding


def packed(rows: int, width: int = 30) -> dict[str, np.ndarray]:
    """Tokens that carry their own place, in segments of 7, 1, 12 and 4, then padding with ids of
    its own.
    """
    segments = np.zeros((rows, width), np.int32)
    at = 0
    for i, n in enumerate(SEGMENTS):
        segments[:, at : at + n] = i + 1
        at += n
    tokens = np.tile(np.arange(100, 100 + width, dtype=np.int32), (rows, 1))
    return {"tokens": tokens, "segments": segments}


def run(made: augment.Augmentation, batch: dict, seed: int = 0) -> dict[str, np.ndarray]:
    return jax.tree.map(np.asarray, jax.jit(made)(jax.random.key(seed), batch))


def near(found: float, wanted: float, deviation: float) -> bool:
    return abs(found - wanted) < 4 * deviation


def test_token_dropout() -> None:
    batch = packed(400)
    out = run(TokenDropout(7, 0.3), batch)
    dropped = out["tokens"] == 7
    real = batch["segments"] > 0
    assert (
        np.array_equal(out["tokens"][~dropped], batch["tokens"][~dropped])
        and not (dropped & ~real).any()
    )
    assert near(dropped[real].mean(), 0.3, (0.21 / real.sum()) ** 0.5)


@pytest.mark.parametrize(("rate", "span"), [(0.15, 0.0), (0.15, 3.0), (0.4, 5.0)])
def test_span_masking(rate: float, span: float) -> None:
    rows = 300
    width = 200
    vocab = 50
    rng = np.random.default_rng(0)
    segments = np.tile(np.repeat(np.array([1, 2, 0], np.int32), [100, 80, 20]), (rows, 1))
    tokens = rng.integers(10, vocab, (rows, width), np.int32)
    out = run(
        augment.SpanMasking(3, vocab, rate, span, lowest=10),
        {"tokens": tokens, "segments": segments, "other": tokens},
    )
    masked = out["weights"] > 0
    assert set(np.unique(out["weights"])) == {0, 1} and out["weights"].dtype == np.float32
    assert not masked[segments == 0].any()
    assert np.array_equal(out["targets"], np.where(masked, tokens, 0))
    assert np.array_equal(out["tokens"][~masked], tokens[~masked]) and np.array_equal(
        out["other"], tokens
    )
    # every place alike, the first of a segment too
    length = span or 1 / (1 - rate)
    for places in (slice(0, 1), slice(100, 101), slice(50, 60), slice(0, 180)):
        part = masked[:, places]
        assert near(
            part.mean(),
            rate,
            (rate * (1 - rate) * min(2 * length, part.shape[1]) / part.size) ** 0.5,
        )
    # lengths of the runs that neither edge of a segment cuts are geometric
    runs = [
        sum(map(int, run))
        for row in masked
        for part in (row[:100], row[100:180])
        for run in "".join(map(str, part.astype(int))).strip("1").split("0")
        if run
    ]
    assert near(np.mean(runs), length, length / len(runs) ** 0.5 + 0.02 * length)
    assert near(
        np.mean(np.array(runs) == 1),
        1 / length,
        (1 / length * (1 - 1 / length) / len(runs)) ** 0.5 + 0.01,
    )
    shown = out["tokens"][masked]
    kept = shown == tokens[masked]
    hidden = shown == 3
    assert near(hidden.mean(), 0.8, (0.16 / masked.sum()) ** 0.5)
    assert near(kept.mean(), 0.1 + 0.1 / 40, (0.09 / masked.sum()) ** 0.5)
    drawn = shown[~kept & ~hidden]
    assert drawn.min() == 10 and drawn.max() == vocab - 1


def test_masks_of_segments_are_independent() -> None:
    segments = np.tile(np.array([1, 1, 1, 2, 2, 2], np.int32), (2000, 1))
    out = run(
        augment.SpanMasking(3, 50, 0.5, 20.0), {"tokens": segments + 10, "segments": segments}
    )["weights"]
    assert abs(np.corrcoef(out[:, 1], out[:, 2])[0, 1]) > 0.8
    assert abs(np.corrcoef(out[:, 2], out[:, 3])[0, 1]) < 0.1


@functools.cache
def corrupted() -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Texts of 0 to 40 tokens in rows of 40, five of each."""
    made = augment.SpanCorruption(999, rate=0.3, span=2.5)
    width = 40
    lengths = np.repeat(np.arange(width + 1), 5)
    tokens = np.where(np.arange(width) < lengths[:, None], np.arange(100, 100 + width), 0).astype(
        np.int32
    )
    return lengths, tokens, run(made, {"tokens": tokens, "mask": tokens > 0, "labels": lengths})


def test_span_corruption_loses_nothing() -> None:
    lengths, tokens, out = corrupted()
    assert out.keys() == {"source", "source_mask", "tokens", "targets", "weights", "labels"}
    for row, n in enumerate(lengths):
        source = out["source"][row][out["source_mask"][row]].tolist()
        targets = out["targets"][row][out["weights"][row] > 0].tolist()
        if n == 0:
            assert source == targets == []
            continue
        assert source.pop() == targets.pop() == 1
        taken = max(1, round(n * 0.3)) if n > 1 else 0
        spans = min(max(1, round(taken / 2.5)), taken, n - taken) if n > 1 else 0
        assert sum(t < 900 for t in targets) == taken
        assert (
            [t for t in source if t > 900]
            == [t for t in targets if t > 900]
            == list(range(999, 999 - spans, -1))
        )
        pieces: dict[int, list[int]] = {}
        for t in targets:
            if t > 900:
                last = pieces[t] = []
            else:
                last.append(t)
        whole = [t for s in source for t in (pieces[s] if s > 900 else [s])]
        assert whole == tokens[row, :n].tolist()
        assert all(pieces.values())
        # two spans never touch: they would be one
        assert not any(a > 900 and b > 900 for a, b in itertools.pairwise(source))


def test_span_corruption_feeds_the_decoder() -> None:
    lengths, _, out = corrupted()
    assert (
        out["tokens"].dtype == out["source"].dtype == np.int32
        and out["source_mask"].dtype == np.bool_
    )
    for tokens, targets, weights, source, mask in zip(
        *(out[k] for k in ("tokens", "targets", "weights", "source", "source_mask")), strict=True
    ):
        n = int(weights.sum())
        assert tokens[0] == 0 and np.array_equal(tokens[1:n], targets[: max(n - 1, 0)])
        assert not tokens[n:].any() and not targets[n:].any() and not source[~mask].any()
    # static shapes: exactly what a row without padding needs
    assert out["weights"][lengths == 40].all() and out["source_mask"][lengths == 40].all()


def test_spans_of_short_texts_lie_anywhere() -> None:
    tokens = np.tile(np.arange(100, 110, dtype=np.int32), (600, 1))
    out = run(augment.SpanCorruption(999, rate=0.2, span=2.0), {"tokens": tokens})
    place = np.argmax(out["source"] == 999, axis=1)
    counts = np.bincount(place, minlength=9)
    assert len(counts) == 9 and counts.min() > 600 / 9 - 4 * (600 / 9) ** 0.5


def test_local_shuffle() -> None:
    batch = packed(200)
    out = run(LocalShuffle(3), batch)
    assert np.array_equal(out["segments"], batch["segments"])
    moved = out["tokens"] - batch["tokens"]
    assert np.abs(moved).max() == 3 and (moved != 0)[batch["segments"] == 3].mean() > 0.4
    check_segments(out, batch)


def test_sentence_shuffle() -> None:
    batch = packed(300)
    stop = 55
    batch["tokens"][:, [2, 4, 9, 13, 14]] = (
        stop  # three sentences in the first text, four in the third: one is a stop alone
    )
    batch["tokens"][:, 25] = stop  # padding has no sentences
    out = run(SentenceShuffle(stop), batch)
    check_segments(out, batch)
    orders = Counter()
    for row, before in zip(out["tokens"].tolist(), batch["tokens"].tolist(), strict=True):
        first = [before[0:3], before[3:5], before[5:7]]
        found = [[s for s in first if row[i : i + len(s)] == s] for i in range(7)]
        orders[tuple(first.index(s[0]) for s in found if s)] += 1
        third = [before[8:10], before[10:14], before[14:15], before[15:20]]
        assert all(any(row[i : i + len(s)] == s for i in range(8, 21 - len(s))) for s in third)
    assert len(orders) == 6 and min(orders.values()) > 50 - 4 * 50**0.5


def check_segments(out: dict, batch: dict) -> None:
    for number in range(5):
        inside = batch["segments"][0] == number
        if number == 0:
            assert np.array_equal(out["tokens"][:, inside], batch["tokens"][:, inside])
        else:
            assert np.array_equal(*(np.sort(a["tokens"][:, inside]) for a in (out, batch)))
