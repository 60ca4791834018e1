"""The stream: a batch is a function of (seed, step), an epoch is a permutation, prefetching changes
nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import jaxmodel
from jaxmodel.data import Stream, pack, prefetch, shuffle, windows
from jaxmodel.data.pack import PackedRows
from jaxmodel.errors import InputError

SIZES = st.tuples(st.integers(1, 12), st.integers(1, 15), st.integers(0, 2**64 - 1))


def numbered(rows: int, batch_size: int, seed: int) -> Stream:
    """Rows that carry their own index as every token."""
    return Stream(np.repeat(np.arange(rows), 3).reshape(rows, 3), batch_size, seed)


def packed(batch_size: int = 2, seed: int = 5) -> Stream:
    return Stream(
        pack([[1, 2, 3], [4, 5, 6, 7, 8, 9], [10], [11, 12], [13, 14, 15]], length=5),
        batch_size,
        seed,
    )


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and left[k].tobytes() == right[k].tobytes() for k in left
    )


@given(SIZES, st.integers(0, 10**12))
def test_every_row_exactly_once_in_each_epoch(
    sizes: tuple[int, int, int], first_epoch: int
) -> None:
    rows, batch_size, seed = sizes
    stream = numbered(rows, batch_size, seed)
    begin = first_epoch * rows
    end = (first_epoch + 3) * rows
    steps = range(begin // batch_size, -(-end // batch_size))
    seen = np.concatenate([stream.batch(step)["tokens"][:, 0] for step in steps])[
        begin % batch_size :
    ]
    for epoch in range(3):
        assert sorted(seen[epoch * rows : (epoch + 1) * rows].tolist()) == list(range(rows))


def test_orders_differ_between_epochs_and_seeds_and_never_change() -> None:
    orders = [numbered(50, 50, seed).rows(epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(map(tuple, orders))) == 4
    # Written down once: another NumPy, another machine or a refactoring must not reorder anybody's
    # training data.
    assert numbered(8, 8, seed=0).rows(0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=5), st.integers(0, 9))
def test_batch_depends_on_seed_and_step_only(steps: list[int], seed: int) -> None:
    warm = packed(seed=seed)
    batches = {step: warm.batch(step) for step in steps}
    shuffle._sorted.cache_clear()
    for step in reversed(steps):
        assert same(packed(seed=seed).batch(step), batches[step])
        assert same(warm.batch(np.int64(step)), batches[step])


def test_a_batch_belongs_to_its_receiver() -> None:
    stream = packed(batch_size=4)
    before = stream.batch(3)
    changed = stream.batch(3)
    for array in changed.values():
        array += 1
    assert same(stream.batch(3), before)


@given(
    st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=12), min_size=1, max_size=9),
    st.integers(2, 8),
)
def test_targets_stay_inside_their_segment(documents: list[list[int]], length: int) -> None:
    bins = pack(documents, length)
    stream = Stream(bins, batch_size=len(bins.tokens), seed=0)
    batch = stream.batch(0)
    rows = stream.rows(0)
    assert {k: (v.dtype, v.shape) for k, v in batch.items()} == {
        k: (np.float32 if k == "weights" else np.int32, (len(rows), length - 1))
        for k in ("tokens", "targets", "weights", "segments", "positions")
    }
    for b, row in enumerate(rows):
        for t in range(length - 1):
            segment = bins.segments[row, t]
            follows = segment > 0 and bins.segments[row, t + 1] == segment
            assert batch["weights"][b, t] == float(follows)
            assert batch["targets"][b, t] == (bins.tokens[row, t + 1] if follows else 0)
            assert batch["tokens"][b, t] == bins.tokens[row, t]
            assert (
                batch["segments"][b, t] == segment
                and batch["positions"][b, t] == bins.positions[row, t]
            )
    # Nothing is lost at the edge of a row: each piece of n tokens gives n - 1 predictions.
    pieces = sum(-(-len(d) // length) for d in documents)
    assert batch["weights"].sum() == sum(map(len, documents)) - pieces


def test_windows_are_rows_with_one_segment() -> None:
    cut = windows(range(41), length=9, stride=8)
    stream = Stream(cut, batch_size=5)
    batch = stream.batch(0)
    assert np.array_equal(batch["tokens"], cut[stream.rows(0), :-1])
    assert np.array_equal(batch["targets"], cut[stream.rows(0), 1:])
    assert (batch["weights"] == 1).all() and (batch["segments"] == 1).all()
    assert (batch["positions"] == np.arange(8)).all()
    assert Stream(pack(list(cut), length=9), batch_size=5).fingerprint == stream.fingerprint


def test_fingerprint() -> None:
    stream = numbered(10, 4, seed=0)
    tokens = stream.bins.tokens.copy()
    assert Stream(tokens.astype(np.int32), 4, 0).fingerprint == stream.fingerprint
    tokens[9, 2] += 1
    others = [Stream(tokens, 4, 0), numbered(10, 4, 1), numbered(10, 5, 0), numbered(9, 4, 0)]
    shifted = PackedRows(stream.bins.tokens, stream.bins.segments, stream.bins.positions + 1)
    assert len({s.fingerprint for s in [stream, Stream(shifted, 4, 0), *others]}) == 6


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10**9), st.integers(0, 12), st.integers(1, 4))
def test_prefetch_gives_the_same_batches_in_order(start: int, count: int, workers: int) -> None:
    stream = packed()
    ahead = list(prefetch(stream, start, start + count, workers))
    assert len(ahead) == count
    assert all(same(batch, stream.batch(start + i)) for i, batch in enumerate(ahead))


def test_prefetch_in_a_plain_script(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, numpy as np\n"
        "from jaxmodel.data import Stream, prefetch\n"
        "assert not {'grain', 'huggingface_hub', 'pyarrow'} & set(sys.modules), 'the import must "
        "stay cheap'\n"
        "stream = Stream(np.arange(12).reshape(4, 3), batch_size=2)\n"
        "print(sum(int(batch['tokens'].sum()) for batch in prefetch(stream, 0, 2)))\n"
        "left_early = prefetch(stream, 0, 10**9)\n"
        "next(left_early)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(jaxmodel.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        f"{sum(range(12)) - 2 - 5 - 8 - 11}\n",
        "",
    )


class NoRows:
    fingerprint = ""

    def __len__(self) -> int:
        return 0

    def take(self, indices: np.ndarray) -> PackedRows:
        raise AssertionError


def test_bad_input_is_one_clear_line() -> None:
    good = np.zeros((2, 3), np.int32)
    for call, message in [
        (lambda: Stream(good, 0), "batch_size: 0 given; allowed: a whole number of at least 1"),
        (lambda: Stream(good, 1, -1), "seed: -1 given"),
        (
            lambda: Stream(good, 1, 2**64),
            r"seed: 18446744073709551616 given; allowed: 0 to 2\^64 - 1",
        ),
        (lambda: Stream(good[:0], 1), r"data: int32 of shape \(0, 3\) given"),
        (lambda: Stream(good[:, :1], 1), r"data: int32 of shape \(2, 1\) given"),
        (lambda: Stream(good[0], 1), r"data: int32 of shape \(3,\) given"),
        (lambda: Stream(good * 0.5, 1), "data: float64 of shape"),
        (
            lambda: Stream(PackedRows(good, good, good[:1]), 1),
            r"\(1, 3\) given; allowed: equal shapes",
        ),
        (
            lambda: Stream(good, 1).batch(-1),
            "step: -1 given; allowed: a whole number of at least 0",
        ),
        (
            lambda: Stream(good, 4).batch(0, slice(2, 5)),
            r"rows: slice\(2, 5, None\) given; allowed: a slice within 0 and 4",
        ),
        (lambda: Stream(good, 4).batch(0, slice(-1, 3)), r"rows: slice\(-1, 3, None\) given"),
        (
            lambda: Stream(good, 4).batch(0, slice(0, 4, 2)),
            r"rows: slice\(0, 4, 2\) given; .* without stride",
        ),
        (
            lambda: prefetch(Stream(good, 1), 0, 2, rows=slice(0, 2)),
            r"rows: slice\(0, 2, None\) given",
        ),
        (lambda: Stream(NoRows(), 1), "data: no rows given; allowed: at least 1"),
        (lambda: prefetch(Stream(good, 1), 3, 2), "start, stop: 3, 2 given"),
        (lambda: prefetch(Stream(good, 1), 0, 2, workers=0), "workers: 0 given"),
    ]:
        with pytest.raises(InputError, match=message):
            call()


WRONG = [
    (
        "Stream([[1, 2], [3, 4]], 1)",
        "data: list given; allowed: PackedRows, windows, a dict of arrays, PackedShards, "
        "ShardWindows, ",
    ),
    (
        'Stream({"x": [1, 2]}, 1)',
        "data: list given for 'x'; allowed: an array, such as np.asarray makes from rows of equal "
        "length",
    ),
    ('Stream({"x": good, "y": (1, 2)}, 1)', "data: tuple given for 'y'; allowed: an array"),
    (
        'Stream({"x": np.array([good, None], object)}, 1)',
        "data: an array of object given for 'x'; allowed: an array",
    ),
    (
        "Stream(PackedRows([[1, 2]], [[1, 1]], [[0, 1]]), 1)",
        "data: list given for 'tokens'; allowed: an array",
    ),
    ("Stream(good, 1, 0.5)", "seed: 0.5 given; allowed: a whole number of at least 0"),
    (
        "pack([1, 2, 3], 4)",
        "documents[0]: int64 of shape () given; allowed: a flat list of integers",
    ),
    (
        "pack([[1, [2, 3]]], 4)",
        "documents[0]: nested lists given; allowed: a flat list of integers",
    ),
]


def test_what_is_no_array_is_one_clear_line() -> None:
    """In a process of its own: here, the types of all arguments are checked."""
    program = (
        "import numpy as np\nfrom jaxmodel.data import Stream, pack\nfrom "
        "jaxmodel.data.pack import PackedRows\n"
    )
    program += "from jaxmodel.errors import InputError\n"
    program += "good = np.zeros((2, 3), np.int32)\n"
    for call, _ in WRONG:
        program += f"try:\n    {call}\nexcept InputError as error:\n    print(error)\n"
    env = {**os.environ, "PYTHONPATH": str(Path(jaxmodel.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for line, (_, message) in zip(done.stdout.splitlines(), WRONG, strict=True):
        assert line.startswith(message)
