"""The batch of a step as a pure function of (seed, step), so that resuming, replaying and skipping are exact."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol, SupportsIndex, runtime_checkable

import numpy as np

from jaxmodel.data.pack import Bins
from jaxmodel.errors import InputError, at_least

type Batch = dict[str, np.ndarray]


@runtime_checkable
class Batches(Protocol):
    """What training reads: the batch of a step, and how many rows each has. `Stream` is one, `synthetic.Pairs` another."""

    @property
    def batch_size(self) -> int:
        """Rows in a batch, B."""
        ...

    def batch(self, step: SupportsIndex) -> Batch:
        """Named arrays `[B, ...]`, a pure function of the step and of what the source was made from."""
        ...


@dataclass(frozen=True, eq=False)
class Stream:
    """An endless stream of batches over packed bins, plain windows, or rows of named arrays.

    Place i of batch s has the global index g = s * batch_size + i. Its epoch is g // N, and within an epoch the N rows
    come in an order drawn from (seed, epoch): each row exactly once, none dropped. A batch may therefore end one epoch
    and begin the next (or span several when it is larger than N).

    Rows of length T + 1 give batches of width T, the last column being a target only. This serves both kinds of data:
    a row of windows [N, T + 1] is a bin with one segment. Of named arrays [N, ...], such as images and their labels, a batch
    has the rows as they are.

    Attributes:
      data: `Bins`, or windows, an integer array [N, T + 1], or a dict of arrays [N, ...].
      batch_size: rows in a batch, B.
      seed: 0 to 2^64 - 1.

    Raises:
      InputError: data without rows or with rows shorter than two tokens, arrays of unequal lengths, a batch size below 1, a seed
        out of range.
    """

    data: Bins | np.ndarray | Mapping[str, np.ndarray]
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        at_least("batch_size", self.batch_size)
        if not 0 <= self.seed < 2**64:
            raise InputError(f"seed: {self.seed} given; 0 to 2^64 - 1 is allowed")
        if isinstance(self.data, Mapping):
            shapes = {name: a.shape for name, a in self.data.items()}
            if len({shape[:1] for shape in shapes.values()}) != 1 or () in shapes.values() or not self.count:
                raise InputError(f"data: arrays of shapes {shapes} given; the same number of rows in each, at least 1, is needed")
            return
        tokens, segments, positions = self.bins.tokens, self.bins.segments, self.bins.positions
        if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or tokens.shape[0] < 1 or tokens.shape[1] < 2:
            given = f"{tokens.dtype} of shape {tokens.shape}"
            raise InputError(f"data: {given} given; integers [N, T + 1] with N and T at least 1 are needed")
        if not tokens.shape == segments.shape == positions.shape:
            shapes = f"{tokens.shape}, {segments.shape}, {positions.shape}"
            raise InputError(f"data: tokens, segments, positions of shapes {shapes} given; equal shapes are needed")

    @property
    def count(self) -> int:
        """The number of rows N."""
        return len(next(iter(self.data.values()))) if isinstance(self.data, Mapping) else len(self.bins.tokens)

    @cached_property
    def bins(self) -> Bins:
        """Texts as bins; windows become rows with one segment (views, without memory of their own)."""
        if isinstance(self.data, Bins):
            return self.data
        assert not isinstance(self.data, Mapping)
        shape = self.data.shape
        places = np.arange(shape[-1], dtype=np.int32)
        return Bins(self.data, np.broadcast_to(np.int32(1), shape), np.broadcast_to(places, shape))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of rows, sizes, batch size and seed: equal fingerprints mean equal batches at every step."""
        if isinstance(self.data, Mapping):
            digest = hashlib.sha256(f"stream of arrays 1 {self.batch_size} {self.seed}\n".encode())
            for name, array in sorted(self.data.items()):
                digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
                digest.update(np.ascontiguousarray(array).data)
            return digest.hexdigest()
        arrays = (self.bins.tokens, self.bins.segments, self.bins.positions)
        digest = hashlib.sha256(f"stream 1 {arrays[0].shape} {self.batch_size} {self.seed}\n".encode())
        for array in arrays:
            digest.update(np.ascontiguousarray(array, "<i4").data)
        return digest.hexdigest()

    def rows(self, step: SupportsIndex) -> np.ndarray:
        """The indices [B] of the rows in the batch of `step`; costs nothing but the order of the epoch.

        >>> stream = Stream(np.zeros((3, 2), np.int32), batch_size=2)
        >>> sorted(np.concatenate([stream.rows(0), stream.rows(1), stream.rows(2)]).tolist())
        [0, 0, 1, 1, 2, 2]
        """
        first = operator.index(step) * self.batch_size
        if first < 0:
            raise InputError(f"step: {step} given; at least 0 is needed")
        count, place, stop = self.count, first, first + self.batch_size
        parts = []
        while place < stop:
            epoch, begin = divmod(place, count)
            parts.append(_order(self.seed, epoch, count)[begin : begin + stop - place])
            place += len(parts[-1])
        return np.concatenate(parts)

    def batch(self, step: SupportsIndex) -> Batch:
        """The batch of `step`, a pure function of (data, batch size, seed, step).

        Returns:
          tokens, targets, segments, positions: int32 [B, T]; a target is the next token of the same segment, else 0.
          weights: float32 [B, T], 1 where there is a target, 0 on the last token of a segment and on padding.
          Of named arrays: their rows [B, ...], by name.

        Raises:
          InputError: a negative step.
        """
        rows = self.rows(step)
        if isinstance(self.data, Mapping):
            return {name: array[rows] for name, array in self.data.items()}
        arrays = (self.bins.tokens, self.bins.segments, self.bins.positions)
        tokens, segments, positions = (array[rows].astype(np.int32, copy=False) for array in arrays)
        follows = (segments[:, 1:] == segments[:, :-1]) & (segments[:, :-1] > 0)
        return {
            "tokens": tokens[:, :-1].copy(),
            "targets": np.where(follows, tokens[:, 1:], np.int32(0)),
            "weights": follows.astype(np.float32),
            "segments": segments[:, :-1].copy(),
            "positions": positions[:, :-1].copy(),
        }


def prefetch(stream: Batches, start: int, stop: int, workers: int = 2) -> Iterator[Batch]:
    """The batches of steps start, start + 1, ..., stop - 1, computed ahead of their use in threads.

    Grain only prefetches: the batches are those of `stream.batch`, bit for bit and in order. It uses threads, so a
    script needs no `if __name__ == "__main__"`. About twice as many batches as workers wait in memory.

    Raises:
      InputError: start below 0 or beyond stop, or fewer than one worker.
    """
    if not 0 <= start <= stop:
        raise InputError(f"start, stop: {start}, {stop} given; 0 <= start <= stop is needed")
    at_least("workers", workers)
    import grain  # late: it takes a second that only training should pay

    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * workers)
    return iter(grain.MapDataset.range(start, stop).map(stream.batch).to_iter_dataset(options))


@lru_cache(maxsize=4)  # two epochs meet in a batch, and prefetching threads may be on either side
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    # Not `Generator.permutation`: across its versions NumPy promises the same raw words only.
    words = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(count)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False  # the cache hands out the same array again
    return order
