"""Token ids as arrays of one width: windows of a text, or documents packed into bins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmodel.brief import briefly
from jaxmodel.errors import InputError, at_least

type Ids = Sequence[int] | np.ndarray

_LARGEST = np.iinfo(np.int32).max


@briefly
@dataclass(frozen=True, eq=False)
class PackedRows:
    """Rows of one width with several documents each, as three int32 arrays [N, length].

    Attributes:
      tokens: token ids, 0 in padding.
      segments: 1, 2, ... for the pieces of documents in the order of the row; 0 in padding.
      positions: 0, 1, ... from the start of each segment; 0 in padding.
    """

    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray

    @property
    def fill(self) -> float:
        """Return the share of positions that hold a token."""
        return float(np.count_nonzero(self.segments) / self.segments.size)


def windows(
    ids: Ids,
    length: int,
    stride: int | None = None,
    limit: int | None = None,
    begin: Sequence[int] = (),
) -> np.ndarray:
    """Cut the ids of a whole text into windows; a remainder shorter than a window is dropped.

    For batches of width T in which every token but the first is predicted once, cut
    `length=T + 1, stride=T`.

    Args:
      ids: token ids [n].
      length: tokens in a window.
      stride: tokens between the starts of two windows; by default the number of text tokens in a
        window, so that windows do not overlap.
      limit: the largest number of windows; the first ones are taken.
      begin: ids that every window begins with, part of its length (`tokenizer.begins`: the
        begin-of-text token of models that need one).

    Returns:
      int32 [N, length].

    Raises:
      InputError: fewer ids than one window, or a size below 1.

    >>> windows(range(8), length=3)
    array([[0, 1, 2],
           [3, 4, 5]], dtype=int32)
    >>> windows(range(4), length=3, begin=[9])
    array([[9, 0, 1],
           [9, 2, 3]], dtype=int32)
    """
    at_least("length", length, len(begin) + 1)
    own = length - len(begin)
    stride = own if stride is None else stride
    for argument, value in (("stride", stride), ("limit", 1 if limit is None else limit)):
        at_least(argument, value)
    flat = _int32("ids", ids)
    head = _int32("begin", begin)
    if flat.size < own:
        raise InputError(
            f"ids: {flat.size} tokens are fewer than one window of {own}; give a longer text or a "
            f"smaller window"
        )
    views = np.lib.stride_tricks.sliding_window_view(flat, own)[::stride][:limit]
    # a copy: views of one buffer would be read-only and alias each other
    return np.concatenate([np.broadcast_to(head, (len(views), head.size)), views], axis=1)


def pack(documents: Sequence[Ids], length: int, eos_id: int | None = None) -> PackedRows:
    """Pack documents into bins, each token in exactly one place.

    The result depends neither on a seed nor on the hosts.

    A document longer than a bin is cut into pieces of `length` (the last is shorter); each piece is
    its own segment. In the order given, every piece goes into the first bin that has room for it
    (first fit with all bins open; a tree of free space finds the bin in O(log N)). Empty documents
    are skipped. Batches of width T need `length=T + 1`.

    Args:
      documents: token ids of each document.
      length: tokens in a bin.
      eos_id: appended to every document, before it is cut.

    Returns:
      PackedRows of [N, length].

    Raises:
      InputError: no document has a token, or a size below 1.

    >>> pack([[5, 6, 7], [8, 9, 10], [11]], length=4).segments
    array([[1, 1, 1, 2],
           [1, 1, 1, 0]], dtype=int32)
    """
    at_least("length", length)
    end = np.empty(0, np.int32) if eos_id is None else _int32("eos_id", [eos_id])
    arrays = [
        array for i, ids in enumerate(documents) if (array := _int32(f"documents[{i}]", ids)).size
    ]
    if not arrays:
        raise InputError(
            f"documents: none of the {len(documents)} has a token; allowed: at least one that has"
        )
    flat = np.concatenate([part for array in arrays for part in (array, end)])
    _, pieces = cut(np.array([array.size for array in arrays]) + end.size, length)
    rows, offsets, segments, bins = first_fit(pieces.tolist(), length)
    within = np.arange(flat.size) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    places = np.repeat(rows * length + offsets, pieces) + within

    def scatter(values: np.ndarray) -> np.ndarray:
        out = np.zeros(bins * length, np.int32)
        out[places] = values
        return out.reshape(bins, length)

    return PackedRows(scatter(flat), scatter(np.repeat(segments, pieces)), scatter(within))


def cut(totals: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return start and size of the pieces that consecutive documents are cut into.

    >>> cut(np.array([3, 5]), length=4)
    (array([0, 3, 7]), array([3, 4, 1]))
    """
    counts = -(-totals // length)
    pieces = np.full(counts.sum(), length)
    pieces[np.cumsum(counts)[counts > 0] - 1] = (totals - (counts - 1) * length)[counts > 0]
    return np.cumsum(pieces) - pieces, pieces


def first_fit(pieces: list[int], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Return row, offset and segment number of each piece and the number of rows; see `pack`."""
    # First fit leaves at most one bin half empty or worse, which limits the number of bins. Unused
    # bins are leaves of the tree with all their room, so one descent finds the first with room.
    leaves = 1 << min(len(pieces), 2 * sum(pieces) // length + 1).bit_length()
    room = [length] * (2 * leaves)
    held = [0] * leaves
    placed = []
    for size in pieces:
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < size:
                node += 1
        row = node - leaves
        held[row] += 1
        placed.append((row, length - room[node], held[row]))
        room[node] -= size
        while node > 1:
            node //= 2
            most = max(room[2 * node], room[2 * node + 1])
            if room[node] == most:
                break
            room[node] = most
    rows, offsets, segments = np.array(placed).T
    return rows, offsets, segments, int(rows.max()) + 1


def _int32(argument: str, ids: Ids) -> np.ndarray:
    try:
        array: np.ndarray[Any, Any] = np.asarray(ids)
    except ValueError:  # lists of unequal lengths
        raise InputError(
            f"{argument}: nested lists given; allowed: a flat list of integers"
        ) from None
    if array.ndim == 1 and array.size == 0:
        return np.empty(0, np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InputError(
            f"{argument}: {array.dtype} of shape {array.shape} given; allowed: a flat list of "
            "integers"
        )
    if array.min() < 0 or array.max() > _LARGEST:
        raise InputError(
            f"{argument}: ids from {array.min()} to {array.max()} given; allowed: 0 to {_LARGEST}"
        )
    return array.astype(np.int32, copy=False)
