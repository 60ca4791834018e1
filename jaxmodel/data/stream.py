"""Streams, whose batch is a pure function of (seed, step): they resume, replay and skip exactly."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import numpy as np

from jaxmodel.brief import briefly
from jaxmodel.data.cached import cached
from jaxmodel.data.pack import PackedRows
from jaxmodel.data.shuffle import SORTED_UP_TO, permute
from jaxmodel.errors import InputError, at_least

type Batch = dict[str, np.ndarray]

TOGETHER = 8
SMALL = 2**20
"""Number of batches that a thread computes at once, if each has at most `SMALL` bytes.

Handing a batch over to the loop costs as much time as computing a small one.
"""


@runtime_checkable
class Batches(Protocol):
    """A source of batches for training.

    Examples are `Stream`, `Mixture` and `synthetic.SyntheticSeq2Seq`.
    """

    @property
    def batch_size(self) -> int:
        """Return the rows in a whole batch, B, whatever the number of hosts."""
        ...

    @cached
    def fingerprint(self) -> str:
        """Return a SHA-256 in hexadecimal; if equal, batches are equal at every step."""
        ...

    def batch(self, step: SupportsIndex, rows: slice = slice(None)) -> Batch:
        """Return named arrays `[B, ...]`, a pure function of the step and the source's settings.

        With `rows`, a slice without stride within 0 and B, return only these rows; each host makes
        its own.
        """
        ...


@runtime_checkable
class Rows(Protocol):
    """The rows that a `Stream` shuffles, read by their indices from wherever they are stored."""

    @property
    def fingerprint(self) -> str:
        """Return a SHA-256 in hexadecimal; if equal, the rows are equal."""
        ...

    def __len__(self) -> int:
        """Return the number of rows N."""
        ...

    def take(self, indices: np.ndarray) -> PackedRows | Batch:
        """Return the rows with these indices, int64 [n]: bins of tokens or named arrays [n, ...].

        The caller may change the arrays.
        """
        ...


@briefly
@dataclass(frozen=True, eq=False)
class Stream:
    """An endless stream of batches of bins, windows, rows of named arrays, or stored rows.

    Place i of batch s has the global index g = s * batch_size + i. Its epoch is g // N, and within
    an epoch the N rows come in an order drawn from (seed, epoch), each exactly once. A batch may
    therefore end one epoch and begin the next (or span several if it is larger than N).

    Rows of token ids of length T + 1 give batches of width T; the last column is only a target. A
    row of windows [N, T + 1] is treated as a bin with one segment. Named arrays [N, ...], such as
    images and labels, give batches of their rows, unchanged and in their own dtypes.

    Attributes:
      data: `PackedRows`; windows, an integer array [N, T + 1]; a dict of arrays [N, ...]; or `Rows`
        such as `PackedShards`.
      batch_size: rows in a batch, B.
      seed: 0 to 2^64 - 1.

    Raises:
      InputError: data without rows or with rows shorter than two tokens, lists for arrays, arrays
        of unequal lengths, a batch size below 1, a seed out of range.
    """

    data: PackedRows | np.ndarray | Mapping[str, np.ndarray] | Rows
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        at_least("batch_size", self.batch_size)
        at_least("seed", self.seed, 0)
        if self.seed >= 2**64:
            raise InputError(f"seed: {self.seed} given; allowed: 0 to 2^64 - 1")
        if isinstance(self.data, Mapping):
            _check_arrays(self.data)
            shapes = {name: a.shape for name, a in self.data.items()}
            if (
                len({shape[:1] for shape in shapes.values()}) != 1
                or () in shapes.values()
                or not self.count
            ):
                raise InputError(
                    f"data: arrays of shapes {shapes} given; allowed: the same number of rows in "
                    "each, at least 1"
                )
        elif isinstance(self.data, PackedRows | np.ndarray):
            _check_arrays(
                {name: getattr(self.bins, name) for name in ("tokens", "segments", "positions")}
            )
            tokens = self.bins.tokens
            segments = self.bins.segments
            positions = self.bins.positions
            if (
                tokens.ndim != 2
                or tokens.dtype.kind not in "iu"
                or tokens.shape[0] < 1
                or tokens.shape[1] < 2
            ):
                given = f"{tokens.dtype} of shape {tokens.shape}"
                raise InputError(
                    f"data: {given} given; allowed: integers [N, T + 1] with N and T at least 1"
                )
            if not tokens.shape == segments.shape == positions.shape:
                shapes = f"{tokens.shape}, {segments.shape}, {positions.shape}"
                raise InputError(
                    f"data: tokens, segments, positions of shapes {shapes} given; allowed: equal "
                    "shapes"
                )
        elif not isinstance(self.data, Rows):
            allowed = (
                "PackedRows, windows, a dict of arrays, PackedShards, ShardWindows, ImageFolder"
            )
            hint = (
                " (windows and pack make rows of token ids)"
                if isinstance(self.data, list | tuple)
                else ""
            )
            raise InputError(f"data: {type(self.data).__name__} given; allowed: {allowed}{hint}")
        elif not self.count:
            raise InputError("data: no rows given; allowed: at least 1")

    @property
    def count(self) -> int:
        """Return the number of rows N."""
        if isinstance(self.data, Mapping):
            return len(next(iter(self.data.values())))
        return len(
            self.bins.tokens if isinstance(self.data, PackedRows | np.ndarray) else self.data
        )

    @cached_property
    def bins(self) -> PackedRows:
        """Return texts as bins; windows become rows with one segment (views, without a copy)."""
        if isinstance(self.data, PackedRows):
            return self.data
        assert isinstance(self.data, np.ndarray)
        shape = self.data.shape
        places = np.arange(shape[-1], dtype=np.int32)
        return PackedRows(
            self.data, np.broadcast_to(np.int32(1), shape), np.broadcast_to(places, shape)
        )

    @property
    def fingerprint(self) -> str:
        """Return the SHA-256 of rows, sizes, batch size and seed.

        Equal fingerprints mean equal batches at every step.
        """
        version = 1 if self.count <= SORTED_UP_TO else 2  # version 1 sorted orders of any size
        if isinstance(self.data, Mapping):
            digest = hashlib.sha256(
                f"stream of arrays {version} {self.batch_size} {self.seed}\n".encode()
            )
            for name, array in sorted(self.data.items()):
                digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
                digest.update(np.ascontiguousarray(array).data)
            return digest.hexdigest()
        if not isinstance(self.data, PackedRows | np.ndarray):
            return hashlib.sha256(
                f"stream of rows 1 {self.data.fingerprint} {self.batch_size} {self.seed}".encode()
            ).hexdigest()
        arrays = (self.bins.tokens, self.bins.segments, self.bins.positions)
        digest = hashlib.sha256(
            f"stream {version} {arrays[0].shape} {self.batch_size} {self.seed}\n".encode()
        )
        for array in arrays:
            digest.update(np.ascontiguousarray(array, "<i4").data)
        return digest.hexdigest()

    def rows(self, step: SupportsIndex, rows: slice = slice(None)) -> np.ndarray:
        """Return the indices int64 [B] of the rows in the batch of `step`, or of its rows `rows`.

        >>> stream = Stream(np.zeros((3, 2), np.int32), batch_size=2)
        >>> sorted(np.concatenate([stream.rows(0), stream.rows(1), stream.rows(2)]).tolist())
        [0, 0, 1, 1, 2, 2]
        """
        first, stop = global_rows(step, rows, self.batch_size)
        parts = [np.empty(0, np.int64)]
        while first < stop:
            epoch, begin = divmod(first, self.count)
            end = min(self.count, begin + stop - first)
            parts.append(permute(np.arange(begin, end), self.count, self.seed, epoch))
            first += end - begin
        return np.concatenate(parts)

    def batch(self, step: SupportsIndex, rows: slice = slice(None)) -> Batch:
        """Return the batch of `step`, a pure function of (data, batch size, seed, step).

        With `rows` only these rows of it are computed.

        Returns:
          For token ids of any integer dtype (bins, windows, shards):
          tokens, targets, segments, positions: int32 [B, T]; a target is the next token of the same
            segment, else 0.
          weights: float32 [B, T], 1 where there is a target, 0 on the last token of a segment and
            on padding.
          For named arrays: their rows [B, ...] by name, in the dtypes of the arrays.

        Raises:
          InputError: a negative step, or rows outside of the batch.
        """
        indices = self.rows(step, rows)
        if isinstance(self.data, Mapping):
            return {name: array[indices] for name, array in self.data.items()}
        if isinstance(self.data, PackedRows | np.ndarray):
            return _predict(
                PackedRows(
                    *(
                        a[indices]
                        for a in (self.bins.tokens, self.bins.segments, self.bins.positions)
                    )
                )
            )
        found = self.data.take(indices)
        return _predict(found) if isinstance(found, PackedRows) else found


def _check_arrays(fields: Mapping[str, Any]) -> None:
    """Refuse fields that are not arrays with rows of numbers, such as lists."""
    for name, a in fields.items():
        if not hasattr(a, "shape") or not hasattr(a, "dtype") or a.dtype == object:
            given = f"an array of {a.dtype}" if hasattr(a, "dtype") else type(a).__name__
            raise InputError(
                f"data: {given} given for {name!r}; allowed: an array, such as np.asarray makes "
                "from rows of equal length"
            )


def _predict(bins: PackedRows) -> Batch:
    """Make the batch of a language model from bins [B, T + 1]; see `Stream.batch`."""
    tokens, segments, positions = (
        a.astype(np.int32, copy=False) for a in (bins.tokens, bins.segments, bins.positions)
    )
    follows = (segments[:, 1:] == segments[:, :-1]) & (segments[:, :-1] > 0)
    return {
        "tokens": tokens[:, :-1].copy(),
        "targets": np.where(follows, tokens[:, 1:], np.int32(0)),
        "weights": follows.astype(np.float32),
        "segments": segments[:, :-1].copy(),
        "positions": positions[:, :-1].copy(),
    }


def global_rows(step: SupportsIndex, rows: slice, batch_size: int) -> tuple[int, int]:
    """Return the first global index g = step * batch_size + place of `rows`, and the end.

    Raises:
      InputError: a negative step, a slice with a stride, or one that reaches beyond the batch.

    >>> global_rows(5, slice(2, 4), batch_size=8)
    (42, 44)
    """
    at_least("step", operator.index(step), 0)
    start = 0 if rows.start is None else rows.start
    stop = batch_size if rows.stop is None else rows.stop
    if rows.step not in (None, 1) or not 0 <= start <= stop <= batch_size:
        raise InputError(
            f"rows: {rows} given; allowed: a slice within 0 and {batch_size}, without stride"
        )
    return operator.index(step) * batch_size + start, operator.index(step) * batch_size + stop


def consecutive(stream: Batches, begin: int, end: int) -> Batch:
    """Return rows begin ... end - 1 of a stream, counted from step 0; if empty, its fields."""
    size = stream.batch_size
    parts = []
    for step in range(begin // size, max(-(-end // size), begin // size + 1)):
        first = step * size
        parts.append(
            stream.batch(step, slice(max(begin, first) - first, min(end, first + size) - first))
        )
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@briefly
@dataclass(frozen=True, eq=False)
class Shifted:
    """The batches of a stream from one of its rows on, which need not begin a batch.

    A run that goes on with another batch size reads them: none of the rows is left out and none
    comes twice.

    Attributes:
      stream: batches by step.
      first_row: where the batch of step 0 begins, counted in rows from the stream's step 0.

    Raises:
      InputError: a row below 0.

    >>> stream = Stream({"x": np.arange(10)}, batch_size=4)
    >>> rows = [stream.rows(step) for step in range(3)]
    >>> np.array_equal(Shifted(stream, 3).rows(1), [rows[1][3], *rows[2][:3]])
    True
    """

    stream: Batches
    first_row: int

    def __post_init__(self) -> None:
        at_least("first_row", self.first_row, 0)

    @property
    def batch_size(self) -> int:
        """Return the rows in a batch, B."""
        return self.stream.batch_size

    @property
    def fingerprint(self) -> str:
        """Return the digest of the stream and of where its batches begin."""
        return f"{self.stream.fingerprint} from row {self.first_row}"

    def batch(self, step: SupportsIndex, rows: slice = slice(None)) -> Batch:
        """Return the batch of `step`, or its rows `rows`.

        Raises:
          InputError: a negative step, or rows outside of the batch.
        """
        first, stop = global_rows(step, rows, self.batch_size)
        return consecutive(self.stream, self.first_row + first, self.first_row + stop)

    def rows(self, step: SupportsIndex) -> np.ndarray:
        """Return the indices int64 [B] of the rows in the batch of `step`, if there are any."""
        known: Any = self.stream
        first = self.first_row + operator.index(step) * self.batch_size
        place = first % self.batch_size
        step = first // self.batch_size
        return np.concatenate([known.rows(step), known.rows(step + 1)])[
            place : place + self.batch_size
        ]


def fingerprints(stream: Batches, batch_size: int) -> set[str]:
    """Return what the digest of a stream would be, were its rows cut into batches of another size.

    Of a mixture the components may have had that size too, or one of their own.

    Returns:
      The digests that are possible; none where the size is part of what the data are.

    >>> rows = {"x": np.arange(10)}
    >>> fingerprints(Stream(rows, 4), 3) == {Stream(rows, 3).fingerprint}
    True
    """
    if isinstance(stream, Stream):
        return {replace(stream, batch_size=batch_size).fingerprint}
    components: Any = getattr(stream, "components", None)
    if components is None:
        return set()
    mixture: Any = stream
    alike = tuple(
        (
            replace(one, batch_size=batch_size)
            if isinstance(one, Stream) and one.batch_size == stream.batch_size
            else one,
            weight,
        )
        for one, weight in components
    )
    return {
        replace(mixture, batch_size=batch_size, components=some).fingerprint
        for some in (components, alike)
    }


def prefetch(
    stream: Batches, start: int, stop: int, workers: int = 2, rows: slice = slice(None)
) -> Iterator[Batch]:
    """Yield the batches of steps start ... stop - 1 (or their rows), computed ahead in threads.

    Grain only prefetches: the batches are those of `stream.batch`, bit for bit and in order. Since
    it uses threads, a script needs no `if __name__ == "__main__"`. About twice as many batches as
    workers wait in memory; small ones more.

    Raises:
      InputError: start below 0 or beyond stop, fewer than one worker, or rows outside of the batch.
    """
    if not 0 <= start <= stop:
        raise InputError(f"start, stop: {start}, {stop} given; allowed: 0 <= start <= stop")
    at_least("workers", workers)
    global_rows(start, rows, stream.batch_size)
    return _ahead(stream, start, stop, workers, rows)


def _ahead(stream: Batches, start: int, stop: int, workers: int, rows: slice) -> Iterator[Batch]:
    if start == stop:
        return
    yield (first := stream.batch(start, rows))
    start += 1
    together = TOGETHER if sum(a.nbytes for a in first.values()) <= SMALL else 1

    def some(group: SupportsIndex) -> list[Batch]:
        begin = start + together * operator.index(group)
        return [stream.batch(step, rows) for step in range(begin, min(begin + together, stop))]

    import grain  # here, since it takes a second, which only training should cost

    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * workers)
    for group in (
        grain.MapDataset.range(-(-(stop - start) // together)).map(some).to_iter_dataset(options)
    ):
        yield from group
