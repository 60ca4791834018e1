"""Several streams mixed by weights, exactly."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import SupportsIndex

import numpy as np

from jaxmodel.brief import briefly
from jaxmodel.data.cached import cached
from jaxmodel.data.stream import Batch, Batches, consecutive, global_rows
from jaxmodel.errors import InputError, at_least

PERIOD = 2**16
"""The longest period of a mixture, in rows."""


@briefly
@dataclass(frozen=True, eq=False)
class Mixture:
    """An endless stream of rows from several streams, in proportion to weights at every moment.

    For every g, component k with share w_k has given n_k(g) of the first g rows, where
    |n_k(g) - w_k g| < 1. If row g is of component k, it is that component's row n_k(g), so each
    component goes through its own epochs. The pattern repeats after P rows, where P is the common
    denominator of the shares, and a table of one period finds any row:
    n_k(g) = (g div P) n_k(P) + n_k(g mod P). Shares with a denominator above 2^16 are rounded to
    multiples of 2^-16; `shares` holds the result.

    Attributes:
      components: streams with their weights, of any sum. Their batch sizes may differ.
      batch_size: rows in a batch, B.

    Raises:
      InputError: no component, a weight that is not above 0, or components whose batches differ in
        fields, dtypes or shapes.

    The order within a period: Tijdeman, The chairman assignment problem, 1980.

    >>> from jaxmodel.data import Stream
    >>> ones, twos = (Stream({"x": np.full(5, i)}, batch_size=1) for i in (1, 2))
    >>> Mixture([(ones, 0.75), (twos, 0.25)], batch_size=8).batch(0)["x"].tolist()
    [1, 1, 2, 1, 1, 1, 2, 1]
    """

    components: Sequence[tuple[Batches, int | float]]
    batch_size: int
    shares: tuple[Fraction, ...] = field(init=False)

    def __post_init__(self) -> None:
        at_least("batch_size", self.batch_size)
        if not self.components:
            raise InputError("components: none given; allowed: at least one")
        weights = [weight for _, weight in self.components]
        if not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise InputError(f"weights: {weights} given; each must be above 0")
        object.__setattr__(self, "shares", _shares(weights))
        shapes = [_shapes(stream) for stream, _ in self.components]
        for i, other in enumerate(shapes):
            if other != shapes[0]:
                differ = sorted({name for name, _ in set(other.items()) ^ set(shapes[0].items())})
                given = (
                    f"component {i} has {_show(other, differ)}, component 0 "
                    f"{_show(shapes[0], differ)}"
                )
                raise InputError(f"components: {given}; allowed: equal fields, dtypes and widths")
        _ = self._counts  # compute it now, so that no step waits for it

    @cached
    def fingerprint(self) -> str:
        """Return the SHA-256 of the components' fingerprints, shares and batch size.

        Equal fingerprints mean equal batches at every step.
        """
        parts = [
            f"{stream.fingerprint} {share}"
            for (stream, _), share in zip(self.components, self.shares, strict=True)
        ]
        return hashlib.sha256(f"mixture 1 {self.batch_size} {parts}".encode()).hexdigest()

    def batch(self, step: SupportsIndex, rows: slice = slice(None)) -> Batch:
        """Return the batch of `step` or its rows `rows`, a pure function of settings and step.

        Raises:
          InputError: a negative step, or rows outside of the batch.
        """
        first, stop = global_rows(step, rows, self.batch_size)
        period = len(self._pattern)
        owners = self._pattern[(first % period + np.arange(stop - first)) % period]
        batch: Batch = {}
        for k, (stream, _) in enumerate(self.components):
            mine = owners == k
            begin = self.place(k, first)
            for name, array in consecutive(stream, begin, begin + int(mine.sum())).items():
                batch.setdefault(name, np.empty((len(mine), *array.shape[1:]), array.dtype))[
                    mine
                ] = array
        return batch

    def place(self, component: int, rows: int) -> int:
        """Return how many of the first `rows` rows of the mixture are of a component."""
        whole, rest = divmod(rows, len(self._pattern))
        counts = self._counts[component]
        return whole * int(counts[-1]) + int(counts[rest])

    @cached_property
    def _pattern(self) -> np.ndarray:
        """Return the component of each row of a period, [P]."""
        period = math.lcm(*(share.denominator for share in self.shares))
        return _assign([int(share * period) for share in self.shares])

    @cached_property
    def _counts(self) -> np.ndarray:
        """Return the rows of each component before each row of a period and in all: [K, P + 1]."""
        mine = self._pattern == np.arange(len(self.shares))[:, None]
        return np.cumsum(np.pad(mine, ((0, 0), (1, 0))), axis=1)


def _shares(weights: Sequence[int | float]) -> tuple[Fraction, ...]:
    exact = [Fraction(str(weight)) for weight in weights]  # 0.1 is meant as a tenth
    shares = [weight / sum(exact) for weight in exact]
    if math.lcm(*(share.denominator for share in shares)) <= PERIOD:
        return tuple(shares)
    parts = [max(1, math.floor(share * PERIOD)) for share in shares]
    # The remainder of rounding down goes to the shares that lost most.
    for _ in range(PERIOD - sum(parts)):
        lost = [share * PERIOD - part for share, part in zip(shares, parts, strict=True)]
        parts[lost.index(max(lost))] += 1
    return tuple(Fraction(part, sum(parts)) for part in parts)


def _assign(parts: Sequence[int]) -> np.ndarray:
    """Assign the rows of one period by Tijdeman's rule.

    Of the components that have waited long enough, the one with the earliest deadline is next. With
    s_k the share and n_k the rows so far of component k, those with s_k t - n_k >= 1 / (2 K - 2)
    may have row t, and the one with the least (1 - 1 / (2 K - 2) - (s_k t - n_k)) / s_k gets it. To
    stay in whole numbers, everything is multiplied by 2 (K - 1) P.
    """
    period = sum(parts)
    scale = 2 * (len(parts) - 1)
    pattern = np.zeros(period, np.int64)
    if len(parts) == 1:
        return pattern
    weights = np.array(parts)
    given = np.zeros(len(parts), np.int64)
    for t in range(1, period + 1):
        waiting = (weights * t - given * period) * scale
        turn = np.where(waiting >= period, ((scale - 1) * period - waiting) / weights, np.inf)
        pattern[t - 1] = k = int(np.argmin(turn))
        given[k] += 1
    return pattern


def _shapes(stream: Batches) -> dict[str, str]:
    fields = consecutive(stream, 0, 0)
    return {
        name: f"{array.dtype} [{', '.join(['B', *map(str, array.shape[1:])])}]"
        for name, array in fields.items()
    }


def _show(shapes: dict[str, str], names: Sequence[str]) -> str:
    return ", ".join(f"{name} {shapes.get(name, 'missing')}" for name in names)
