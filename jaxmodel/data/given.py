"""Data as people pass it to `fit`: arrays, pairs, rows, lists or iterables of batches."""

from __future__ import annotations

import hashlib
import operator
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np

from jaxmodel.data.cached import cached
from jaxmodel.data.stream import Batch, Batches, Rows, Stream, global_rows
from jaxmodel.errors import InputError

DEFAULT_ROWS = 32
KEPT_FIRST = 1024
KEPT_LAST = 8
"""The part of an iterable that is kept: batches with this many first rows, and the last batches.

Batch statistics are measured on the first rows.
"""

FORMS = (
    "a data.Stream, a dict of arrays, a pair (x, y), rows such as data.ImageFolder, a list of "
    "batches, an iterable of batches "
    "such as a DataLoader"
)


def as_batches(
    given: Any,
    *,
    input_name: str = "inputs",
    batch_size: int | None = None,
    seed: int = 0,
    argument: str = "data",
) -> Batches:
    """Make `Batches` of data in any accepted form.

    A dict of arrays, a pair and rows are shuffled by the seed into an endless stream. A list of
    batches is repeated in its order. An iterable of batches (a generator, a DataLoader) is read in
    order, and started again at its end if possible; `Passed` describes its limits.

    Args:
      given: `Batches` (returned as they are); a dict of arrays `[N, ...]`; a pair `(x, y)` of
        arrays; `Rows`; token ids `[N, T + 1]`; a list of batches; or an iterable of batches. A
        batch is a dict of arrays or a pair; tensors of other libraries are accepted.
      input_name: the name for x, that of the model's only input. y is named `labels` if it has
        whole numbers, else `targets`.
      batch_size: rows in a batch of arrays; None for 32 (or all, if there are fewer).
      seed: the seed of the order of arrays.
      argument: the name of `given` in errors.

    Raises:
      InputError: data of another form, or a batch size for data that has its own.

    >>> stream = as_batches((np.zeros((100, 4)), np.arange(100) % 3), input_name="features")
    >>> {name: (a.shape, str(a.dtype)) for name, a in stream.batch(0).items()}
    {'features': ((32, 4), 'float32'), 'labels': ((32,), 'int32')}
    """
    if isinstance(given, Batches):
        if batch_size is not None:
            raise InputError(
                f"batch_size: {batch_size} given; {argument} already has batches of "
                f"{given.batch_size} rows"
            )
        return given
    if isinstance(given, Rows):
        return Stream(given, batch_size or min(DEFAULT_ROWS, len(given)), seed)
    arrays = _dataset(given, input_name)
    if arrays is not None:
        count = len(arrays if isinstance(arrays, np.ndarray) else next(iter(arrays.values()), ()))
        return Stream(arrays, batch_size or max(1, min(DEFAULT_ROWS, count)), seed)
    if batch_size is not None:
        raise InputError(
            f"batch_size: {batch_size} given; the batches of {argument} have their own size"
        )
    if (
        isinstance(given, Sequence)
        and not isinstance(given, str | bytes)
        and all(map(_is_batch, given))
        and len(given)
    ):
        return Listed([_batch(one, input_name, argument) for one in given])
    if isinstance(given, Iterable) and not isinstance(given, str | bytes | Sequence):
        return Passed(given, input_name, argument)
    what = f"{given!r:.60}" if isinstance(given, str) else type(given).__name__
    hint = (
        " (data.windows and data.pack make rows of token ids)"
        if isinstance(given, Sequence)
        else ""
    )
    raise InputError(f"{argument}: {what} given; allowed: {FORMS}{hint}")


class Listed:
    """A list of batches, repeated; a shorter batch is filled up with rows of weight 0.

    Args:
      batches: dicts of arrays `[B, ...]`.

    Raises:
      InputError: batches that differ in names, dtypes or shapes of rows.
    """

    def __init__(self, batches: Sequence[Batch]):
        size = max(_rows(batch) for batch in batches)
        if any(_rows(batch) < size for batch in batches):
            batches = [fill(batch, size) for batch in batches]
        kinds = [{name: (a.dtype, a.shape[1:]) for name, a in batch.items()} for batch in batches]
        for i, kind in enumerate(kinds):
            if kind != kinds[0]:
                differ = sorted(kind.items() ^ kinds[0].items(), key=str)
                names = ", ".join(dict.fromkeys(name for name, _ in differ))
                raise InputError(
                    f"data: batch {i} differs from batch 0 in {names}; allowed: equal names, "
                    f"dtypes and shapes"
                )
        self._batches = list(batches)
        self.batch_size = size

    @property
    def count(self) -> int:
        """Return the number of rows of all batches."""
        return len(self._batches) * self.batch_size

    @cached
    def fingerprint(self) -> str:
        """Return the SHA-256 of the arrays."""
        digest = hashlib.sha256(f"batches 1 {len(self._batches)}\n".encode())
        for batch in self._batches:
            for name, a in sorted(batch.items()):
                digest.update(f"{name} {a.dtype.str} {a.shape}\n".encode())
                digest.update(np.ascontiguousarray(a).data)
        return digest.hexdigest()

    def batch(self, step: SupportsIndex, rows: slice = slice(None)) -> Batch:
        """Return the batch of a step, or some of its rows."""
        global_rows(step, rows, self.batch_size)
        return {
            name: a[rows]
            for name, a in self._batches[operator.index(step) % len(self._batches)].items()
        }


class Passed:
    """An iterable of batches, read in order.

    It cannot go back to an earlier step, so a run that is to be resumed needs a `Stream`. An
    iterable that can be iterated again (a DataLoader) starts again at its end. A generator ends,
    and `batch` then raises `StopIteration`. A shorter batch is filled up with rows of weight 0. The
    batches of the first 1,024 rows and the last ones are kept in memory.

    Args:
      given: the iterable.
      input_name: see `as_batches`.
      argument: the name of `given` in errors.

    Raises:
      InputError: the first item is not a batch, or there is none.
    """

    fingerprint = "an iterable"

    def __init__(self, given: Iterable[Any], input_name: str = "inputs", argument: str = "data"):
        self._given = given
        self._name = input_name
        self._argument = argument
        self._lock = threading.Lock()
        self._source = iter(given)
        self._again = self._source is not given
        first = next(self._source, None)
        if first is None:
            raise InputError(f"{argument}: the iterable gave no batch; allowed: at least one")
        self._kept: dict[int, Batch] = {0: _batch(first, input_name, argument)}
        self.batch_size = _rows(self._kept[0])
        self._next = 1

    def batch(self, step: SupportsIndex, rows: slice = slice(None)) -> Batch:
        """Return the batch of a step, which must be the next one or one that is kept.

        Raises:
          InputError: another step, or a batch with more rows than the first.
          StopIteration: the iterable is at its end.
        """
        number = operator.index(step)
        global_rows(step, rows, self.batch_size)
        with self._lock:
            while number not in self._kept and number >= self._next:
                self._read()
            if number not in self._kept:
                raise InputError(
                    f"{self._argument}: the batch of step {number} was read before, and an "
                    f"iterable cannot go back; allowed: a "
                    "data.Stream, or a list of batches"
                )
            return {name: a[rows] for name, a in self._kept[number].items()}

    def _read(self) -> None:
        try:
            item = next(self._source)
        except StopIteration:
            if not self._again:
                raise
            self._source = iter(self._given)
            item = next(self._source)
        batch = _batch(item, self._name, self._argument)
        if _rows(batch) > self.batch_size:
            raise InputError(
                f"{self._argument}: a batch of {_rows(batch)} rows after one of {self.batch_size}; "
                "allowed: no more rows"
            )
        self._kept[self._next] = (
            batch if _rows(batch) == self.batch_size else fill(batch, self.batch_size)
        )
        old = self._next - KEPT_LAST
        if old * self.batch_size >= KEPT_FIRST:
            self._kept.pop(old, None)
        self._next += 1


def listed(given: Passed, most: int) -> Listed:
    """Collect the first batches of an iterable into a list that repeats."""

    def some() -> Iterator[Batch]:
        for step in range(most):
            try:
                yield given.batch(step)
            except StopIteration:
                return

    return Listed(list(some()))


def fill(batch: Batch, size: int) -> Batch:
    """Fill a batch up to `size` rows with copies of its first row that have weight 0.

    >>> fill({"x": np.array([3, 4])}, 3)
    {'x': array([3, 4, 3]), 'weights': array([1., 1., 0.], dtype=float32)}
    """
    rows = _rows(batch)
    more = {
        name: np.concatenate([a, np.repeat(a[:1], size - rows, axis=0)])
        for name, a in batch.items()
    }
    shape = (
        batch["targets"].shape if batch.get("targets", np.zeros(0)).dtype.kind in "iu" else (rows,)
    )
    weights = batch.get("weights", np.ones(shape, np.float32)).astype(np.float32)
    return {
        **more,
        "weights": np.concatenate(
            [weights, np.zeros((size - rows, *weights.shape[1:]), np.float32)]
        ),
    }


def _dataset(given: Any, input_name: str) -> Any:
    """Return the arrays of a whole data set, or None for data of another form."""
    if isinstance(given, Mapping):
        return _batch(given, input_name, "data")
    if isinstance(given, tuple) and len(given) == 2 and all(map(_is_array, given)):
        return _batch(given, input_name, "data")
    if _is_array(given):
        array = _array(given)
        return array if array.dtype.kind in "iu" and array.ndim == 2 else {input_name: array}
    return None


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype") and len(value.shape) > 0


def _is_batch(value: Any) -> bool:
    pair = isinstance(value, tuple | list) and len(value) == 2 and all(map(_is_array, value))
    return isinstance(value, Mapping) or pair


def _batch(given: Any, input_name: str, argument: str) -> Batch:
    """Make a dict of arrays of a dict or a pair."""
    if isinstance(given, Mapping):
        named = dict(given)
    elif _is_batch(given):
        x, y = given
        y = _array(y)
        y = y.astype(np.int32) if y.dtype == bool else y
        named = {input_name: x, "labels" if y.dtype.kind in "iu" else "targets": y}
    elif _is_array(given):
        named = {input_name: given}
    else:
        raise InputError(
            f"{argument}: a {type(given).__name__} given as a batch; allowed: a dict of arrays, "
            f"or a pair (x, y)"
        )
    batch = {str(name): _array(a) for name, a in named.items()}
    if any(a.ndim == 0 for a in batch.values()) or len({len(a) for a in batch.values()}) != 1:
        shapes = {name: a.shape for name, a in batch.items()}
        raise InputError(
            f"{argument}: arrays of shapes {shapes} given; allowed: the same number of rows in each"
        )
    return batch


def _array(value: Any) -> np.ndarray:
    """Return an array of NumPy in 32 bits, as JAX has them."""
    if hasattr(value, "detach"):  # a torch tensor, perhaps part of a graph or on another device
        value = value.detach().cpu()
    array = np.asarray(value)
    narrow = {
        np.dtype(np.float64): np.float32,
        np.dtype(np.int64): np.int32,
        np.dtype(np.uint64): np.uint32,
    }
    if array.dtype.kind in "OUSMm":
        raise InputError(
            f"data: an array of {array.dtype} given; allowed: numbers, the same count in each row"
        )
    return array.astype(narrow[array.dtype]) if array.dtype in narrow else array


def _rows(batch: Batch) -> int:
    return len(next(iter(batch.values())))
