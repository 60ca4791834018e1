"""Synthetic pairs of texts: a source, and the target that a model should write for it.

    copy      =qwerty               qwerty
    reverse   <qwerty               ytrewq
    date      @march 12, 1987       1987-03-12      (in four ways of writing a date)

A batch is a function of (seed, step), and no target is in both parts, "train" and "test".

>>> pairs = SyntheticSeq2Seq(("date",), batch_size=2, seed=1)
>>> source, target = pairs.texts(step=0)[0]
>>> batch = pairs.batch(step=0)
>>> decode(batch["source"][0]) == source, decode(batch["targets"][0]) == target
(True, True)
"""

from __future__ import annotations

import datetime
import hashlib
import operator
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np

from jaxmodel.brief import briefly
from jaxmodel.data.stream import Batch, global_rows
from jaxmodel.errors import InputError, at_least, one_of

START = 0
END = 1
"""The ids that begin a target (also padding) and end it."""
ALPHABET = " ,-./<=@0123456789abcdefghijklmnopqrstuvwxyz"
VOCAB = 2 + len(ALPHABET)
"""Number of token ids: two special ones, and one for each character."""
LONGEST = 10
"""Largest number of letters of a text to copy or to reverse; the smallest is 4."""
PARTS = ("train", "test")

type Draw = Callable[[int], int]


def encode(text: str) -> list[int]:
    """Return the ids of a text's characters.

    >>> decode(encode("1987-03-12"))
    '1987-03-12'
    """
    return [2 + ALPHABET.index(character) for character in text]


def decode(ids: Iterable[Any]) -> str:
    """Return the text of ids, up to the end or padding."""
    text = ""
    for i in map(int, ids):
        if i < 2:
            break
        text += ALPHABET[i - 2]
    return text


def _letters(draw: Draw) -> str:
    return "".join(ALPHABET[-1 - draw(26)] for _ in range(4 + draw(LONGEST - 3)))


def _copy(draw: Draw) -> tuple[str, str]:
    text = _letters(draw)
    return f"={text}", text


def _reverse(draw: Draw) -> tuple[str, str]:
    text = _letters(draw)
    return f"<{text}", text[::-1]


def _date(draw: Draw) -> tuple[str, str]:
    day = datetime.date(1900, 1, 1) + datetime.timedelta(days=draw(73049))  # up to 2099
    y = day.year
    m = day.month
    d = day.day
    name = _MONTHS[day.month - 1]
    return "@" + (f"{d} {name} {y}", f"{name} {d}, {y}", f"{d}.{m}.{y}", f"{y}/{m}/{d}")[
        draw(4)
    ], day.isoformat()


_MONTHS = (
    *("january", "february", "march", "april", "may", "june", "july"),
    *("august", "september", "october", "november", "december"),
)
TASKS: dict[str, Callable[[Draw], tuple[str, str]]] = {
    "copy": _copy,
    "reverse": _reverse,
    "date": _date,
}
"""Tasks by name; each makes a pair with a function that draws a whole number below its argument."""
SOURCE = 1 + len("september 30, 1987")
TARGET = 1 + max(LONGEST, len("1987-03-12"))
"""The longest source and target in tokens, the target with its end."""


@briefly
@dataclass(frozen=True)
class SyntheticSeq2Seq:
    """An endless stream of batches of pairs.

    Attributes:
      tasks: names from `TASKS`; each pair is of one of them, drawn uniformly.
      batch_size: pairs in a batch, B.
      seed: 0 to 2^64 - 1.
      part: "train" or "test"; a tenth of all targets belongs to the test part.

    Raises:
      InputError: an unknown task or part, a batch size below 1, a seed out of range.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    batch_size: int = 64
    seed: int = 0
    part: str = "train"

    def __post_init__(self) -> None:
        at_least("batch_size", self.batch_size)
        if not self.tasks:
            raise InputError(f"tasks: none given; allowed: one or more of {', '.join(TASKS)}")
        for task in self.tasks:
            one_of("tasks", task, TASKS)
        one_of("part", self.part, PARTS)
        if not 0 <= self.seed < 2**64:
            raise InputError(f"seed: {self.seed} given; allowed: 0 to 2^64 - 1")

    @property
    def fingerprint(self) -> str:
        """Return the SHA-256 of all settings; if equal, batches are equal at every step."""
        return hashlib.sha256(
            f"pairs 1 {self.tasks} {self.batch_size} {self.seed} {self.part}".encode()
        ).hexdigest()

    def texts(self, step: SupportsIndex, rows: slice = slice(None)) -> list[tuple[str, str]]:
        """Return the pairs in the batch of `step`, or those at its places `rows`.

        Raises:
          InputError: a negative step, or rows outside of the batch.
        """
        first, stop = (
            g - operator.index(step) * self.batch_size
            for g in global_rows(step, rows, self.batch_size)
        )
        # not a `Generator`: only the raw words are the same in all versions of NumPy
        words = np.random.Philox(key=np.array([self.seed, operator.index(step)], np.uint64))
        draw = lambda below: int(words.random_raw()) % below
        found: list[tuple[str, str]] = []
        # those before `first` too: it takes a few microseconds each to draw as they did
        while len(found) < stop:
            source, target = TASKS[self.tasks[draw(len(self.tasks))]](draw)
            if (zlib.crc32(target.encode()) % 10 == 0) == (self.part == "test"):
                found.append((source, target))
        return found[first:]

    def batch(self, step: SupportsIndex, rows: slice = slice(None)) -> Batch:
        """Return the batch of `step` or its rows `rows`, a pure function of settings and step.

        Returns:
          `source` and `source_mask`, int32 and bool [B, S], padded on the right to `SOURCE`;
          `tokens` and `targets`, int32, and `weights`, float32, [B, T] with T = `TARGET`: what the
          decoder reads (beginning with `START`), what it should predict (ending with `END`), and 1
          where there is something to predict.

        Raises:
          InputError: a negative step, or rows outside of the batch.
        """
        texts = self.texts(step, rows)
        source = np.zeros((len(texts), SOURCE), np.int32)
        targets = np.zeros((len(texts), TARGET), np.int32)
        for i, (given, wanted) in enumerate(texts):
            source[i, : len(given)] = encode(given)
            targets[i, : len(wanted) + 1] = [*encode(wanted), END]
        tokens = np.concatenate(
            [np.full((len(texts), 1), START, np.int32), targets[:, :-1]], axis=1
        )
        tokens[tokens == END] = START  # the end is predicted and never read
        weights = (targets != START).astype(np.float32)
        return {
            "source": source,
            "source_mask": source != START,
            "tokens": tokens,
            "targets": targets,
            "weights": weights,
        }
