"""Rows of shards: every token in exactly one bin, as `pack` and `windows` would have it, by a plan
that is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jaxmodel.data import PackedShards, Rows, Shards, Stream, pack, packed_shards, tokenize, windows
from jaxmodel.data.pack import PackedRows
from jaxmodel.data.packed_shards import ShardWindows
from jaxmodel.errors import InputError

TEXTS = ["".join(chr(97 + (i * 7 + j * j) % 26) for j in range(1 + i * 31 % 40)) for i in range(50)]

type Make = Callable[..., Shards]


def equal(left: PackedRows, right: PackedRows) -> bool:
    names = ("tokens", "segments", "positions")
    pairs = [(getattr(left, name), getattr(right, name)) for name in names]
    return all(a.dtype == b.dtype == np.int32 and np.array_equal(a, b) for a, b in pairs)


def everything(rows: PackedShards | ShardWindows) -> PackedRows:
    found = rows.take(np.arange(len(rows)))
    assert isinstance(found, PackedRows)
    return found


def by_pack(shards: Shards, length: int, window: int) -> PackedRows:
    """The same bins by `pack`: documents of a window, cut, the longest pieces first."""
    parts = []
    for start in range(0, len(shards), window):
        rows = [shards.doc(i) for i in range(start, min(start + window, len(shards)))]
        pieces = [row[i : i + length] for row in rows for i in range(0, len(row), length)]
        parts.append(pack(sorted(pieces, key=len, reverse=True), length))
    return PackedRows(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("tokens", "segments", "positions")
        )
    )


@settings(max_examples=12)
@given(
    st.lists(st.text("abcd", min_size=1, max_size=30), min_size=1, max_size=25),
    st.integers(2, 20),
    st.integers(1, 30),
)
def test_bins_are_those_of_pack(
    shards_of: Make, texts: list[str], length: int, window: int
) -> None:
    shards = shards_of(texts, shard_tokens=40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_shards, "WINDOW", window)
        rows = PackedShards(shards, length)
        assert equal(everything(rows), by_pack(shards, length, window))
        assert rows.fill == pytest.approx(everything(rows).fill)
        order = np.array([len(rows) - 1, 0, len(rows) - 1])
        assert equal(
            rows.take(order), PackedRows(*(a[order] for a in vars(everything(rows)).values()))
        )


def test_every_token_exactly_once(shards_of: Make) -> None:
    shards = shards_of(TEXTS, shard_tokens=100)
    bins = everything(PackedShards(shards, 17))
    pieces = [
        bins.tokens[row][bins.segments[row] == segment].tolist()
        for row in range(len(bins.tokens))
        for segment in range(1, bins.segments[row].max() + 1)
    ]
    documents = [shards.doc(i).tolist() for i in range(len(shards))]
    assert sorted(pieces) == sorted(d[i : i + 17] for d in documents for i in range(0, len(d), 17))


def test_long_pieces_first_fills_what_first_fit_leaves(shards_of: Make) -> None:
    texts = ["a" * 9] * 40 + [
        "b" * 49
    ] * 40  # short ones first would leave none for the room beside the long ones
    shards = shards_of(texts, eos=False)
    assert PackedShards(shards, 58).fill == 1.0
    assert pack([shards.doc(i) for i in range(len(shards))], 58).fill < 0.87


def test_a_plan_is_made_once(
    shards_of: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shards = shards_of(TEXTS)
    first = PackedShards(shards, 17)
    assert {path.suffix for path in Path(shards.folder).glob("pack-17-*")} == {
        ".json",
        ".starts",
        ".sizes",
        ".firsts",
    }
    make = packed_shards.first_fit
    monkeypatch.setattr(packed_shards, "first_fit", None)
    assert equal(everything(PackedShards(Shards(shards.folder), 17)), everything(first))
    with pytest.raises(TypeError):
        PackedShards(shards, 18)
    monkeypatch.setattr(packed_shards, "first_fit", make)
    PackedShards(shards, 17, folder=str(tmp_path / "plans"))
    assert len(list((tmp_path / "plans").iterdir())) == 4


@pytest.mark.parametrize("ending", ["json", "starts", "sizes", "firsts"])
def test_a_damaged_plan_is_made_anew(shards_of: Make, ending: str) -> None:
    shards = shards_of(TEXTS)
    first = everything(PackedShards(shards, 17))
    (path,) = Path(shards.folder).glob(f"pack-*.{ending}")
    whole = path.read_bytes()
    for raw in (whole[:-1], b"", None):
        path.unlink() if raw is None else path.write_bytes(raw)
        assert equal(everything(PackedShards(shards, 17)), first) and path.read_bytes() == whole


def test_a_flipped_byte_of_a_plan_is_named(shards_of: Make) -> None:
    rows = PackedShards(shards_of(TEXTS), 17)
    rows.verify()
    (path,) = Path(rows.shards.folder).glob("pack-*.starts")
    raw = path.read_bytes()
    path.write_bytes(raw[:8] + bytes([raw[8] ^ 1]) + raw[9:])
    with pytest.raises(InputError, match=f"plan: .*{path.name}' has changed since it was written"):
        rows.verify()


def test_plans_of_other_shards_go_with_them(byte_tokenizer: Any, tmp_path: Path) -> None:
    old = PackedShards(tokenize(TEXTS, byte_tokenizer(), tmp_path), 17)
    new = PackedShards(tokenize(TEXTS[1:], byte_tokenizer(), tmp_path), 17)
    assert len(list(tmp_path.iterdir())) == 3 + 4 and new.fingerprint != old.fingerprint
    assert equal(everything(new), by_pack(new.shards, 17, packed_shards.WINDOW))


def test_behind_a_url(shards_of: Make, byte_tokenizer: Any, memory: str, tmp_path: Path) -> None:
    local = shards_of(TEXTS)
    remote = tokenize(TEXTS, byte_tokenizer(), memory)
    for there, here in [
        (PackedShards(remote, 17), PackedShards(local, 17)),
        (PackedShards(remote, 17, folder=str(tmp_path)), PackedShards(local, 17)),
        (ShardWindows(remote, 9, 8), ShardWindows(local, 9, 8)),
    ]:
        assert there.fingerprint == here.fingerprint and equal(everything(there), everything(here))
        assert len(there.take(np.empty(0, np.int64)).tokens) == 0


@settings(max_examples=12)
@given(
    *(
        st.lists(st.text("abcd", min_size=1, max_size=12), min_size=3, max_size=20),
        st.integers(2, 30),
    ),
    *(st.integers(1, 30), st.integers(5, 60)),
)
def test_windows_are_those_of_the_whole_run(
    shards_of: Make, texts: list[str], length: int, stride: int, limit: int
) -> None:
    shards = shards_of(texts, shard_tokens=limit)
    run = np.concatenate([shards.doc(i) for i in range(len(shards))])
    if len(run) < length:
        with pytest.raises(
            InputError, match=f"shards: {len(run)} tokens are fewer than one window of {length}"
        ):
            ShardWindows(shards, length)
        return
    for step in (stride, None):
        cut = windows(run, length, step)
        found = everything(ShardWindows(shards, length, step))
        assert equal(found, Stream(cut, 1).bins)


def test_a_stream_of_them(shards_of: Make) -> None:
    shards = shards_of(TEXTS, shard_tokens=100)
    for rows in (PackedShards(shards, 17), ShardWindows(shards, 17, 16)):
        assert isinstance(rows, Rows)
        stream = Stream(rows, 5, seed=3)
        held = Stream(everything(rows), 5, seed=3)
        assert stream.count == len(rows)
        for step in (0, 1, 7, 10**9):
            left = stream.batch(step)
            right = held.batch(step)
            assert left.keys() == right.keys()
            assert all(
                np.array_equal(left[name], right[name]) and left[name].dtype == right[name].dtype
                for name in left
            )


def test_fingerprints(shards_of: Make) -> None:
    shards = shards_of(TEXTS)
    other = shards_of(TEXTS[1:])
    rows = [
        *(PackedShards(shards, 17), PackedShards(shards, 18), PackedShards(other, 17)),
        *(
            ShardWindows(shards, 17),
            ShardWindows(shards, 17, 16),
            ShardWindows(shards, 18),
            ShardWindows(other, 17),
        ),
    ]
    assert len({r.fingerprint for r in rows}) == len(rows)
    assert ShardWindows(shards, 17).fingerprint == ShardWindows(shards, 17, 17).fingerprint
    streams = [
        Stream(rows[0], 4, 0),
        Stream(rows[0], 5, 0),
        Stream(rows[0], 4, 1),
        Stream(rows[1], 4, 0),
    ]
    assert len({s.fingerprint for s in streams}) == 4
    assert (
        Stream(PackedShards(Shards(shards.folder), 17), 4, 0).fingerprint == streams[0].fingerprint
    )


def test_bad_input(shards_of: Make, tmp_path: Path) -> None:
    shards = shards_of(TEXTS)
    (tmp_path / "file").write_text("")
    for call, message in [
        (lambda: PackedShards(shards, 1), "length: 1 given; allowed: a whole number of at least 2"),
        (lambda: ShardWindows(shards, 1), "length: 1 given"),
        (lambda: ShardWindows(shards, 5, 0), "stride: 0 given"),
        (
            lambda: PackedShards(shards, 9, folder=str(tmp_path / "file")),
            "file/pack-9-.*cannot be read or written",
        ),
    ]:
        with pytest.raises(InputError, match=message):
            call()
