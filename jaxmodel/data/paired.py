"""Two streams side by side: labelled rows, each with some unlabelled ones."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import SupportsIndex

from jaxmodel.brief import briefly
from jaxmodel.data.cached import cached
from jaxmodel.data.stream import Batch, Batches, global_rows
from jaxmodel.errors import InputError

UNLABELLED = "unlabelled_"
"""Prefix of the names of the other stream's fields."""


@briefly
@dataclass(frozen=True, eq=False)
class WithUnlabelled:
    """A stream of rows that each carry `each` rows of another stream.

    The fields of the other stream get a prefix: `unlabelled_pixels` `[B, each, Y, X, C]`. So a
    batch still has B rows, however a mesh, several hosts or micro-batches divide it. Both streams
    shuffle by themselves and have their own epochs. The ratio of their batch sizes gives `each`.

    Attributes:
      stream: a stream with B rows in a batch, such as labelled ones.
      other: a stream with `each * B` rows in a batch.

    Raises:
      InputError: a batch size of the other stream that is not a multiple of the first, or a field
        that already has the prefix.

    >>> import numpy as np
    >>> from jaxmodel.data import Stream
    >>> few, many = {"x": np.arange(4), "labels": np.arange(4)}, {"x": np.arange(100, 200)}
    >>> batch = WithUnlabelled(Stream(few, 2), Stream(many, 6)).batch(0)
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
        """Return how many rows of the other stream come with each row."""
        return self.other.batch_size // self.stream.batch_size

    @property
    def batch_size(self) -> int:
        """Return the rows of the first stream in a batch, B."""
        return self.stream.batch_size

    @cached
    def fingerprint(self) -> str:
        """Return the SHA-256 of both fingerprints; if equal, batches are equal at every step."""
        return hashlib.sha256(
            f"paired 1 {self.stream.fingerprint} {self.other.fingerprint}".encode()
        ).hexdigest()

    def batch(self, step: SupportsIndex, rows: slice = slice(None)) -> Batch:
        """Return the batch of `step` (or its rows) with the other stream's rows `[B, each, ...]`.

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
