"""Two streams side by side: labelled rows, and with each of them some that have no labels."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import SupportsIndex

from jaxmodel.brief import briefly
from jaxmodel.data.stream import Batch, Batches, global_rows
from jaxmodel.errors import InputError

UNLABELLED = "unlabelled_"
"""What the names of the other stream's fields begin with."""


@briefly
@dataclass(frozen=True, eq=False)
class Paired:
    """Each row of a stream with `each` rows of another, which have names of their own:
    `unlabelled_pixels` `[B, each, Y, X, C]`.

    So a batch still has B rows, whatever a mesh, several hosts or micro-batches make of them. Both
    streams shuffle for themselves and go through their own epochs; how large their batches are says
    how many rows come together.

    Attributes:
      stream: B rows a batch, such as labelled ones.
      other: `each * B` rows a batch.

    Raises:
      InputError: batches of the other stream whose rows are no multiple of the stream's, or a field
        with such a name.

    >>> import numpy as np
    >>> from jaxmodel.data import Stream
    >>> few, many = {"x": np.arange(4), "labels": np.arange(4)}, {"x": np.arange(100, 200)}
    >>> batch = Paired(Stream(few, 2), Stream(many, 6)).batch(0)
    >>> {name: array.shape for name, array in batch.items()}
    {'x': (2,), 'labels': (2,), 'unlabelled_x': (2, 3)}
    """

    stream: Batches
    other: Batches

    def __post_init__(self) -> None:
        mine = self.stream.batch_size
        theirs = self.other.batch_size
        if theirs % mine:
            near = max(mine, theirs - theirs % mine)
            raise InputError(
                f"other: batches of {theirs} rows given; allowed: a multiple of the stream's "
                f"{mine}, such as {near}"
            )
        if clash := [
            name for name in self.stream.batch(0, slice(0, 0)) if name.startswith(UNLABELLED)
        ]:
            raise InputError(
                f"stream: the field {clash[0]!r} given; allowed: names that do not begin with "
                f"{UNLABELLED!r}"
            )

    @property
    def each(self) -> int:
        """How many rows of the other stream come with each row."""
        return self.other.batch_size // self.stream.batch_size

    @property
    def batch_size(self) -> int:
        """Rows of the stream in a batch, B."""
        return self.stream.batch_size

    @property
    def fingerprint(self) -> str:
        """sha256 of both streams' fingerprints: equal fingerprints mean equal batches at every
        step.
        """
        return self._fingerprint  # pyright takes no cached property for that of a protocol

    @cached_property
    def _fingerprint(self) -> str:
        return hashlib.sha256(
            f"paired 1 {self.stream.fingerprint} {self.other.fingerprint}".encode()
        ).hexdigest()

    def batch(self, step: SupportsIndex, rows: slice = slice(None)) -> Batch:
        """The stream's batch of `step`, or its rows `rows`, and beside them the other's,
        `[B, each, ...]`.

        Raises:
          InputError: a negative step, or rows outside of the batch.
        """
        first, stop = (
            place - int(step) * self.batch_size
            for place in global_rows(step, rows, self.batch_size)
        )
        found = self.other.batch(step, slice(first * self.each, stop * self.each))
        beside = {
            UNLABELLED + name: a.reshape(stop - first, self.each, *a.shape[1:])
            for name, a in found.items()
        }
        return {**self.stream.batch(step, rows), **beside}
