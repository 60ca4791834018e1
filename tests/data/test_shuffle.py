"""The keyed order: a permutation at every size, drawn evenly, the same for ever."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy import stats

from jaxmodel.data import Stream, shuffle
from jaxmodel.data.shuffle import SORTED_UP_TO, permute


def walked(count: int, seed: int, epoch: int = 0, places: np.ndarray | None = None) -> np.ndarray:
    """As large orders are drawn, whatever the size."""
    places = np.arange(count) if places is None else places
    return shuffle._walk(places, count, shuffle._words(seed, epoch, shuffle._ROUNDS))


def by_hand(place: int, count: int, keys: list[int]) -> int:
    """The same in whole numbers of any size, one place at a time."""
    a = next(i for i in range(1, count + 1) if i * i >= count)
    b = -(-count // a)
    while True:
        high, low = divmod(place, a)
        for i, key in enumerate(keys):
            x = (low if i % 2 else high) ^ key
            for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
                x = (x ^ x >> 33) * factor % 2**64
            x = (x ^ x >> 33) >> 32
            high, low = ((high + x) % b, low) if i % 2 else (high, (low + x) % a)
        place = high * a + low
        if place < count:
            return place


@pytest.mark.parametrize("count", [1, 2, 10, 1000, 123_457, 10**9])
def test_the_formula(count: int) -> None:
    keys = shuffle._words(8, 9, shuffle._ROUNDS).tolist()
    places = np.unique(np.linspace(0, count - 1, 20).astype(np.int64))
    assert walked(count, 8, 9, places).tolist() == [
        by_hand(int(place), count, keys) for place in places
    ]


def test_every_size_is_permuted() -> None:
    for count in [*range(1, 200), 255, 256, 257, 1023, 4096, 9999]:
        assert np.array_equal(np.sort(walked(count, seed=count)), np.arange(count)), count


@given(
    st.integers(1, 3000),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32),
)
def test_any_place_is_found_without_the_others(count: int, seed: int, epoch: int, at: int) -> None:
    whole = walked(count, seed, epoch)
    assert np.array_equal(np.sort(whole), np.arange(count))
    places = (at + np.arange(5)) % count
    assert np.array_equal(walked(count, seed, epoch, places), whole[places])


@pytest.mark.parametrize("count", [SORTED_UP_TO, SORTED_UP_TO + 1, 100_003])
def test_both_ways_of_drawing_are_permutations(count: int) -> None:
    assert np.array_equal(
        np.sort(permute(np.arange(count), count, seed=3, epoch=1)), np.arange(count)
    )


@pytest.mark.parametrize("count", [7, 12, 33])
def test_each_row_is_as_likely_at_each_place(count: int) -> None:
    seen = np.zeros((count, count))
    for seed in range(3000):
        seen[np.arange(count), walked(count, seed)] += 1
    # Rows and columns have fixed sums, hence (N - 1)^2 degrees of freedom.
    statistic = ((seen - 3000 / count) ** 2 / (3000 / count)).sum()
    assert 1e-3 < stats.chi2.sf(statistic, (count - 1) ** 2) < 1 - 1e-3


def test_each_pair_is_as_likely_to_come_first() -> None:
    count = 10
    pairs = np.zeros((count, count))
    for epoch in range(9000):
        first, second = walked(count, seed=5, epoch=epoch, places=np.arange(2))
        pairs[first, second] += 1
    assert not np.diag(pairs).any()
    assert 1e-3 < stats.chisquare(pairs[~np.eye(count, dtype=bool)]).pvalue < 1 - 1e-3


def test_neighbours_of_a_large_order_are_scattered() -> None:
    count = 10**9 + 7
    rows = permute(np.arange(4 * 10**8, 4 * 10**8 + 50_000), count, seed=1, epoch=2)
    assert len(np.unique(rows)) == len(rows) and rows.min() >= 0 and rows.max() < count
    for values in (rows, np.diff(rows) % count, (rows[2:] - 2 * rows[1:-1] + rows[:-2]) % count):
        assert (
            1e-3
            < stats.chisquare(np.bincount(values * 200 // count, minlength=200)).pvalue
            < 1 - 1e-3
        )
    other = permute(np.arange(50_000), count, seed=1, epoch=3)
    assert abs(stats.spearmanr(rows, other).statistic) < 0.02


def test_written_down_once() -> None:
    """Another NumPy, another machine or a refactoring must not reorder anybody's training data."""
    assert permute(np.arange(4), 10**9, seed=0, epoch=0).tolist() == [
        683219822,
        890073180,
        611927800,
        27058700,
    ]
    assert permute(np.arange(2), 2**60, seed=2**64 - 1, epoch=2**40).tolist() == [
        1074632682105476163,
        296936820577049064,
    ]
    assert permute(np.arange(4), 100, seed=0, epoch=0).tolist() == [66, 0, 54, 43]


def test_equal_words_keep_the_order_of_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shuffle, "_words", lambda seed, epoch, count: np.arange(count) // 64 % 3)
    shuffle._sorted.cache_clear()
    order = permute(np.arange(1000), 1000, 0, 0)
    shuffle._sorted.cache_clear()
    assert np.array_equal(order, sorted(range(1000), key=lambda i: i // 64 % 3))


def test_a_large_stream_goes_through_every_row_once() -> None:
    count = SORTED_UP_TO + 5
    stream = Stream({"x": np.arange(count)}, batch_size=1000, seed=4)
    steps = range(3 * count // 1000, 4 * count // 1000 + 1)
    seen = np.concatenate([stream.batch(step)["x"] for step in steps])[3 * count % 1000 :][:count]
    assert np.array_equal(np.sort(seen), np.arange(count))
    assert (
        stream.batch(10**12)["x"].tolist()
        == stream.batch(10**12)["x"].tolist()
        != stream.batch(10**12 + 1)["x"].tolist()
    )
