"""Windows and packing: every token of every document in exactly one place."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from jaxmodel.data import pack, windows
from jaxmodel.data.pack import PackedRows
from jaxmodel.errors import InputError

DOCUMENTS = st.lists(st.lists(st.integers(1, 99), max_size=25), min_size=1, max_size=30).filter(any)


def unpack(bins: PackedRows) -> list[tuple[int, int, list[int]]]:
    """(row, segment, tokens) of every segment; checks the invariants of the record on the way."""
    found = []
    for row, (tokens, segments, positions) in enumerate(
        zip(bins.tokens, bins.segments, bins.positions, strict=True)
    ):
        used = np.count_nonzero(segments)
        assert (
            used > 0
            and not segments[used:].any()
            and not tokens[used:].any()
            and not positions[used:].any()
        )
        assert sorted(set(segments[:used].tolist())) == list(range(1, segments.max() + 1))
        for segment in range(1, segments.max() + 1):
            (where,) = np.nonzero(segments == segment)
            assert where.tolist() == list(range(where[0], where[-1] + 1))
            assert positions[where].tolist() == list(range(len(where)))
            found.append((row, segment, tokens[where].tolist()))
    return found


def first_fit(documents: list[list[int]], length: int) -> list[tuple[int, int, list[int]]]:
    """The textbook's quadratic loop, as an oracle."""
    bins: list[list[list[int]]] = []
    for document in documents:
        for start in range(0, len(document), length):
            piece = document[start : start + length]
            fits = (b for b in bins if sum(map(len, b)) + len(piece) <= length)
            if (chosen := next(fits, None)) is None:
                bins.append(chosen := [])
            chosen.append(piece)
    return [
        (row, segment, piece)
        for row, b in enumerate(bins)
        for segment, piece in enumerate(b, start=1)
    ]


@given(DOCUMENTS, st.integers(1, 20))
def test_packing_is_first_fit(documents: list[list[int]], length: int) -> None:
    assert unpack(pack(documents, length)) == first_fit(documents, length)


@given(DOCUMENTS, st.integers(1, 20), st.sampled_from([None, 0, 100]))
def test_every_token_exactly_once(
    documents: list[list[int]], length: int, eos_id: int | None
) -> None:
    bins = pack([np.array(d, np.int64) for d in documents], length, eos_id)
    assert bins.tokens.dtype == bins.segments.dtype == bins.positions.dtype == np.int32
    assert (
        bins.tokens.shape
        == bins.segments.shape
        == bins.positions.shape
        == (len(bins.tokens), length)
    )
    ended = [d + ([] if eos_id is None else [eos_id]) for d in documents if d]
    pieces = [d[i : i + length] for d in ended for i in range(0, len(d), length)]
    assert sorted(tokens for _, _, tokens in unpack(bins)) == sorted(pieces)
    assert bins.fill == pytest.approx(sum(map(len, ended)) / bins.tokens.size)


def test_there_is_room_when_no_two_documents_share_a_bin() -> None:
    for count in range(1, 70):
        assert pack([[1] * 11] * count, length=20).tokens.shape == (count, 20)


def test_many_documents_pack_tightly() -> None:
    sizes = np.minimum(np.random.default_rng(0).geometric(1 / 60, size=20_000), 2_000)
    bins = pack([np.full(size, i + 1) for i, size in enumerate(sizes)], length=513)
    assert bins.fill > 0.99
    assert (
        np.bincount(bins.tokens[bins.segments > 0], minlength=20_001)[1:].tolist() == sizes.tolist()
    )


@given(
    st.lists(st.integers(0, 99), min_size=1, max_size=60),
    st.integers(1, 20),
    st.integers(1, 25),
    st.integers(1, 9),
)
def test_windows_are_slices(ids: list[int], length: int, stride: int, limit: int) -> None:
    if len(ids) < length:
        with pytest.raises(
            InputError, match=f"ids: {len(ids)} tokens are fewer than one window of {length}"
        ):
            windows(ids, length)
        return
    starts = range(0, len(ids) - length + 1, stride)
    cut = windows(ids, length, stride)
    assert cut.dtype == np.int32 and cut.flags.writeable
    assert cut.tolist() == [ids[s : s + length] for s in starts]
    assert windows(ids, length, stride, limit).tolist() == cut[:limit].tolist()
    assert windows(ids, length).tolist() == windows(ids, length, stride=length).tolist()
    begun = windows(
        ids, length + 2, begin=[7, 8]
    )  # as many ids of the text, behind what each window begins with
    assert begun.tolist() == [[7, 8, *row] for row in windows(ids, length).tolist()]


@given(st.integers(2, 80), st.integers(1, 9))
def test_overlapping_by_one_predicts_each_token_once(count: int, width: int) -> None:
    if count < width + 1:
        return
    targets = windows(range(count), width + 1, stride=width)[:, 1:].ravel().tolist()
    assert targets == list(range(1, (count - 1) // width * width + 1))


def test_bad_input_is_one_clear_line() -> None:
    for call, message in [
        (lambda: windows([1, 2], 0), "length: 0 given; allowed: a whole number of at least 1"),
        (lambda: windows([1, 2], 1, stride=0), "stride: 0 given"),
        (lambda: windows([1, 2], 1, limit=0), "limit: 0 given"),
        (lambda: windows([], 2), "ids: 0 tokens are fewer than one window of 2"),
        (
            lambda: windows(np.array([0.5]), 1),
            r"ids: float64 of shape \(1,\) given; allowed: a flat list of integers",
        ),
        (lambda: windows(np.array([[1, 2]]), 1), r"ids: int64 of shape \(1, 2\)"),
        (lambda: windows([-1, 5], 1), "ids: ids from -1 to 5 given; allowed: 0 to 2147483647"),
        (lambda: pack([[1], [2**31]], 4), r"documents\[1\]: ids from 2147483648"),
        (lambda: pack([[], []], 4), "documents: none of the 2 has a token"),
        (lambda: pack([[1]], 0), "length: 0 given"),
        (lambda: pack([[1]], 4, eos_id=-1), "eos_id: ids from -1"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
