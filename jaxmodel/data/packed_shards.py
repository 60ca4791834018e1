"""Rows of shards: bins packed by a plan that is made once and stored, or windows of all tokens.

The plan takes 2^16 documents at a time, so that memory is bounded. It cuts them into pieces as
`pack` does and puts every piece, the longest first, into the first bin that has room for it (first
fit decreasing with all bins open; small pieces come last and fill the gaps). It depends only on the
lengths of the documents, neither on a seed nor on the hosts. Beside the shards it stores the pieces
in the order of their bins (`pack-*.starts`: int64, the start of each in the sequence of all tokens;
`pack-*.sizes`: int32) and the number of pieces before each bin (`pack-*.firsts`: int64, one more
than bins).
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from jaxmodel import schema
from jaxmodel.data import storage
from jaxmodel.data.cached import cached
from jaxmodel.data.pack import PackedRows, cut, first_fit
from jaxmodel.data.shards import Shards
from jaxmodel.errors import InputError, at_least
from jaxmodel.progress import bar

WINDOW = 2**16
"""Number of documents that are packed together."""
_ARRAYS = {"starts": np.dtype("<i8"), "sizes": np.dtype("<i4"), "firsts": np.dtype("<i8")}


@dataclass(frozen=True, eq=False)
class PackedShards:
    """Documents of shards packed into bins, for the `data` of a `Stream`.

    The plan is made if there is none yet.

    Each token stands in exactly one place, each piece in a segment of its own. Batches of width T
    need `length=T + 1`.

    Attributes:
      shards: the documents.
      length: tokens in a bin, at least 2.
      folder: a path or URL for the plan; default: beside the shards.

    Raises:
      InputError: a length below 2, or a folder that cannot be written.
    """

    shards: Shards
    length: int
    folder: storage.Where | None = None

    def __post_init__(self) -> None:
        at_least("length", self.length, 2)
        if not _is_whole(self._path, self.fingerprint):
            _make_plan(self.shards, self.length, self._path, self.fingerprint)

    @property
    def fill(self) -> float:
        """Return the share of positions that hold a token."""
        return self.shards.tokens / (len(self) * self.length)

    @cached
    def fingerprint(self) -> str:
        """Return the SHA-256 of the shards' digests and the length; it costs nothing."""
        return hashlib.sha256(
            f"packed 1 {self.length} {WINDOW} {self.shards.fingerprint}".encode()
        ).hexdigest()

    def __len__(self) -> int:
        """Return the number of bins."""
        return self._bins

    def verify(self) -> None:
        """Compare the digests of the plan's arrays with those stored.

        `shards.verify()` checks the tokens.

        Raises:
          InputError: a file that is not what was written.
        """
        with storage.reading(f"{self._path}.json") as file:
            digests = _head(file.read())["sha256"]
        for name in _ARRAYS:
            path = f"{self._path}.{name}"
            if storage.sha256(path) != digests[name]:
                raise InputError(
                    f"plan: {path!r} has changed since it was written (another sha256): delete it, "
                    "and it is made again"
                )

    def take(self, indices: np.ndarray) -> PackedRows:
        """Return the bins with these indices; nothing else is read."""
        starts, sizes, firsts = self._columns
        edges = firsts.take(indices, np.full(len(indices), 2)).reshape(-1, 2)
        pieces = edges[:, 1] - edges[:, 0]
        begins = starts.take(edges[:, 0], pieces)
        counts = sizes.take(edges[:, 0], pieces).astype(np.int64)
        tokens = self.shards.read(begins, counts)
        segments = storage.ranges(np.ones_like(pieces), pieces)
        filled = np.bincount(np.repeat(np.arange(len(indices)), pieces), counts, len(indices))
        held = np.arange(self.length) < filled[:, None]

        def place(values: np.ndarray) -> np.ndarray:
            out = np.zeros(held.shape, np.int32)
            out[held] = (
                # rows are filled from the left, so the pieces have the same order as in `values`
                values
            )
            return out

        return PackedRows(
            place(tokens),
            place(np.repeat(segments, counts)),
            place(storage.ranges(np.zeros_like(counts), counts)),
        )

    @property
    def _path(self) -> str:
        """Return the path of the plan without an ending."""
        return storage.join(
            self.folder or self.shards.folder, f"pack-{self.length}-{self.fingerprint[:16]}"
        )

    @cached_property
    def _bins(self) -> int:
        return (
            storage.sizes(self.folder or self.shards.folder)[f"{Path(self._path).name}.firsts"] // 8
            - 1
        )

    @cached_property
    def _columns(self) -> list[storage.Column]:
        with storage.reading(f"{self._path}.json") as file:
            digests = _head(file.read())["sha256"]
        return [
            storage.Column(f"{self._path}.{name}", dtype, digests[name])
            for name, dtype in _ARRAYS.items()
        ]


@dataclass(frozen=True, eq=False)
class ShardWindows:
    """Windows of all tokens of shards, cut as by `windows`, for the `data` of a `Stream`.

    Attributes:
      shards: the documents, one after another.
      length: tokens in a window, at least 2.
      stride: tokens between the starts of two windows; `length` when left out. For batches of width
        T in which every token but the first is predicted once: `length=T + 1, stride=T`.

    Raises:
      InputError: a size out of range, or fewer tokens than one window.
    """

    shards: Shards
    length: int
    stride: int | None = None

    def __post_init__(self) -> None:
        at_least("length", self.length, 2)
        at_least("stride", self._step)
        if self.shards.tokens < self.length:
            given = f"{self.shards.tokens} tokens are fewer than one window of {self.length}"
            raise InputError(f"shards: {given}; give more documents or a smaller window")

    @property
    def _step(self) -> int:
        return self.length if self.stride is None else self.stride

    @property
    def fingerprint(self) -> str:
        """Return the SHA-256 of the shards' digests and the sizes; it costs nothing."""
        return hashlib.sha256(
            f"windows 1 {self.length} {self._step} {self.shards.fingerprint}".encode()
        ).hexdigest()

    def __len__(self) -> int:
        """Return the number of windows; a remainder shorter than one is dropped."""
        return (self.shards.tokens - self.length) // self._step + 1

    def take(self, indices: np.ndarray) -> PackedRows:
        """Return the windows with these indices, as bins with one segment."""
        tokens = self.shards.read(indices * self._step, np.full(len(indices), self.length)).reshape(
            len(indices), self.length
        )
        places = np.arange(self.length, dtype=np.int32)
        return PackedRows(tokens, np.ones_like(tokens), np.broadcast_to(places, tokens.shape))


class _Digests(TypedDict):
    starts: str
    sizes: str
    firsts: str


class _Head(TypedDict):
    fingerprint: str
    bytes: dict[str, int]
    sha256: _Digests


def _head(raw: bytes) -> Any:
    return schema.make(schema.parse(raw, "plan"), _Head, "plan")


def _is_whole(path: str, fingerprint: str) -> bool:
    """Return whether there is a finished plan whose arrays have the recorded lengths."""
    found = storage.sizes(os.path.dirname(path))
    name = Path(path).name
    if f"{name}.json" not in found:
        return False
    with storage.reading(f"{path}.json") as file, suppress(InputError):
        head = _head(file.read())
        here = {array: found.get(f"{name}.{array}") for array in _ARRAYS}
        return (head["fingerprint"], head["bytes"]) == (fingerprint, here)
    return False


def _make_plan(shards: Shards, length: int, path: str, fingerprint: str) -> None:
    written = dict.fromkeys(_ARRAYS, 0)
    digests = {name: hashlib.sha256() for name in _ARRAYS}
    with ExitStack() as stack:
        job = stack.enter_context(bar(len(shards), "pack documents", unit="document"))
        out = {name: stack.enter_context(storage.writing(f"{path}.{name}")) for name in _ARRAYS}

        def write(**arrays: np.ndarray) -> None:
            for name, array in arrays.items():
                raw = array.astype(_ARRAYS[name]).tobytes()
                written[name] += out[name].write(raw)
                digests[name].update(raw)

        total = np.zeros(1, np.int64)
        write(firsts=total)
        for begin in range(0, len(shards), WINDOW):
            end = min(begin + WINDOW, len(shards))
            offsets = shards.offsets(begin, end)
            starts, sizes = cut(np.diff(offsets), length)
            longest = np.argsort(-sizes, kind="stable")
            bins, _, _, count = first_fit(sizes[longest].tolist(), length)
            order = longest[np.argsort(bins, kind="stable")]
            edges = total + np.cumsum(np.bincount(bins, minlength=count))
            write(starts=offsets[0] + starts[order], sizes=sizes[order], firsts=edges)
            total = edges[-1:]
            job.advance(end - begin)
    with storage.writing(f"{path}.json") as file:
        sums = {name: digest.hexdigest() for name, digest in digests.items()}
        file.write(
            json.dumps({"fingerprint": fingerprint, "bytes": written, "sha256": sums}).encode()
        )
