"""Placement of batches: rows over the batch axes of the mesh, each process with its own rows."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodel import axes, tree
from jaxmodel.data import Batches, Shifted
from jaxmodel.errors import InputError
from jaxmodel.losses.contract import IGNORED
from jaxmodel.models import Model
from jaxmodel.report.run import versions
from jaxmodel.sharding import BATCH_AXES


@dataclasses.dataclass(frozen=True, eq=False)
class ShardedLoader:
    """A stream whose batches are placed on the devices of a mesh.

    With several processes, each makes only its own rows.

    Attributes:
      stream: batches by step.
      mesh: None for one device.

    Raises:
      InputError: rows that do not divide over the batch axes of the mesh.
    """

    stream: Batches
    mesh: jax.sharding.Mesh | None

    def __post_init__(self) -> None:
        check_rows(self.stream.batch_size, self.mesh)

    @property
    def parts(self) -> int:
        """The number of parts into which the rows are cut."""
        return _parts(self.mesh)

    @property
    def batch_size(self) -> int:
        """The number of rows of the whole batch."""
        return self.stream.batch_size

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the stream."""
        return self.stream.fingerprint

    def batch(self, step: SupportsIndex, rows: slice = slice(None)) -> dict[str, Any]:
        """Return the batch of a step, on the devices of the mesh or, without one, in host memory.

        A single device gets the batch with the call that uses it. That takes a tenth of the host
        time of `device_put` and is just as early, because steps are queued ahead. With `rows` only
        these rows are made, which works with one process.
        """
        if self.mesh is None:
            return dict(self.stream.batch(step, rows))
        where = rows_sharding(self.mesh)
        if jax.process_count() == 1:
            return jax.device_put(self.stream.batch(step, rows), where)
        count = self.stream.batch_size
        found = {part: self.stream.batch(step, slice(*part)) for part in local_rows(where, count)}

        def made(name: str, a: Any) -> jax.Array:
            own = lambda index: np.asarray(found[index[0].indices(count)[:2]][name])
            return jax.make_array_from_callback((count, *a.shape[1:]), where, own)

        return {name: made(name, a) for name, a in next(iter(found.values())).items()}


def rows_sharding(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """Return the sharding of a batch's rows on a mesh: over all of its batch axes."""
    return jax.sharding.NamedSharding(mesh, jax.P(_axes(mesh)))


def check_rows(rows: int, mesh: jax.sharding.Mesh | None) -> None:
    """Refuse rows that do not divide over the batch axes of a mesh.

    Raises:
      InputError: the rows cannot be divided; the message names numbers that can.
    """
    devices = _parts(mesh)
    if rows % devices:
        near = [n for n in (rows - rows % devices, rows + devices - rows % devices) if n]
        raise InputError(
            f"batch: {rows} rows cannot be divided among the {devices} devices of "
            f"{' x '.join(_axes(mesh))} in the mesh; "
            f"allowed: a multiple, such as {' or '.join(map(str, near))}"
        )


def _axes(mesh: jax.sharding.Mesh | None) -> tuple[str, ...]:
    return tuple(axis for axis in BATCH_AXES if mesh is not None and axis in mesh.shape)


def _parts(mesh: jax.sharding.Mesh | None) -> int:
    return math.prod(mesh.shape[axis] for axis in _axes(mesh)) if mesh is not None else 1


def check_batch(model: Model, params: tree.Params, batch: Mapping[str, Any]) -> None:
    """Refuse a batch that would make every loss NaN, or that is not numeric.

    Checked are tokens outside of the vocabulary and rows longer than the positions.

    Raises:
      InputError: the batch is not usable; the message says why.
    """
    for name, a in batch.items():
        if np.dtype(a.dtype).kind in "OSUMm":
            hint = "numbers (of names of classes, np.unique(names, return_inverse=True)[1])"
            raise InputError(f"data: {name} is an array of {a.dtype}; allowed: {hint}")
    vocab = getattr(model.config, "vocab", None)
    if "tokens" not in batch:
        return
    for name in ("tokens", "targets"):
        largest = max(int(np.max(part)) for part in _local(batch.get(name, 0)))
        if vocab is not None and largest >= vocab:
            raise InputError(
                f"data: {name} up to {largest} for a model with a vocabulary of {vocab}; does the "
                "tokenizer belong to the model?"
            )
    length = batch["tokens"].shape[1]
    if (rows := _positions(model, params)) is not None and length > rows:
        raise InputError(f"data: rows of {length} tokens for a model with a context of {rows}")


def _positions(model: Model, params: tree.Params) -> int | None:
    """Return how many learnt positions tokens have, or None for any number.

    They are the rows of a table over positions (`t`) beside the table of the vocabulary (`V`).
    """
    known = [(re.compile(pattern), axes.read(text)) for pattern, text, *_ in model.axes.rules]
    tables: dict[str, str] = {}
    for path in tree.flatten(params):
        found = next((letters for pattern, letters in known if pattern.fullmatch(path)), None)
        if found is not None and found.role == "table":
            tables[path] = axes.written(found.axes[0])[0]
    words = {path.rpartition("/")[0] for path, letter in tables.items() if letter == "V"}
    lengths = [
        tree.flatten(params)[path].shape[0]
        for path, letter in tables.items()
        if letter == "t" and path.rpartition("/")[0] in words
    ]
    return min(lengths, default=None)


def explain(model: Model, stream: Batches, step: int, what: str = "data") -> None:
    """Refuse a batch whose loss is not finite, if a label, target or token is out of range.

    It is called only for such batches, so good ones cost nothing.

    Args:
      model: the model, whose vocabulary or logits determine the allowed range.
      stream: batches by step.
      step: the step of the batch.
      what: the name of the argument that held the batch.

    Raises:
      InputError: a value is out of range; the message names row, value and what is allowed.
    """
    batch = stream.batch(step)
    for name in ("tokens", "targets", "labels"):
        a = np.asarray(batch.get(name, 0.0))
        if a.dtype.kind not in "iu" or (limit := _limit(model, name)) is None:
            continue
        wrong = (a < 0) | (a >= limit)
        if name != "tokens":
            weights = np.asarray(batch.get("weights", np.ones(len(a))))
            counts = weights.reshape(*weights.shape, *[1] * (a.ndim - weights.ndim)) > 0
            wrong &= (a != IGNORED) & counts
        if wrong.any():
            allowed = f"0 to {limit - 1}" + (
                "" if name == "tokens" else f", or {IGNORED} for positions that do not count"
            )
            raise InputError(
                f"{what}: {name} hold {a[wrong][0]} in {_place(stream, step, wrong)}; allowed: "
                f"{allowed}"
            )


def not_finite(stream: Batches, step: int) -> dict[str, str]:
    """Return the leaves of a batch that hold NaN or infinity, each with the first value and place.

    It is called only for batches whose loss or gradient is not finite, so good ones cost nothing.
    """
    found = {}
    for name, leaf in stream.batch(step).items():
        a = np.asarray(leaf)
        # the kind of ml_dtypes' floats is V
        wrong = ~np.isfinite(a) if a.dtype.kind in "fcV" else np.zeros(a.shape, bool)
        if wrong.any():
            found[name] = f"{name} hold {a[wrong][0]} in {_place(stream, step, wrong)}"
    return found


def _place(stream: Batches, step: int, wrong: np.ndarray) -> str:
    """Return in words where the first wrong value of a batch stands."""
    if not wrong.ndim:
        return f"batch {step}"
    row = int(np.argwhere(wrong)[0][0])
    known = getattr(getattr(stream, "stream", stream), "rows", None)
    if known is not None and isinstance(stream, Shifted):
        known = stream.rows
    return f"row {row} of batch {step}" if known is None else f"row {known(step)[row]}"


def _limit(model: Model, name: str) -> int | None:
    """Return the number of different values that a model knows."""
    if name != "labels":
        return getattr(model.config, "vocab", None)

    def logits(key: jax.Array) -> jax.Array:
        inputs = {name: jnp.zeros(a.shape, a.dtype) for name, a in model.inputs(1, 1).items()}
        return model.apply(model.init(key), inputs).logits

    return jax.eval_shape(logits, jax.random.key(0)).shape[-1]


def _local(a: Any) -> list[np.ndarray]:
    """Return the parts of an array that are on this process."""
    return (
        [np.asarray(part.data) for part in a.addressable_shards]
        if isinstance(a, jax.Array)
        else [np.asarray(a)]
    )


def gather(params: tree.Params) -> tree.Params:
    """Return parameters with all arrays whole on the first device of every process."""
    tree.check(params)
    return whole(params)


def whole(arrays: Any) -> Any:
    """Gather the arrays of any pytree, as `gather` does."""

    def one(a: jax.Array) -> jax.Array:
        if not a.is_fully_addressable and not a.is_fully_replicated:
            from jax.experimental import multihost_utils

            return jax.device_put(
                multihost_utils.process_allgather(a, tiled=True), jax.local_devices()[0]
            )
        found = a.addressable_data(0) if a.is_fully_replicated else jax.device_get(a)
        return jax.device_put(np.asarray(found), jax.local_devices()[0])

    return jax.tree.map(one, arrays)


def environment(mesh: jax.sharding.Mesh | None) -> dict[str, Any]:
    """Return what the bits of a run depend on besides its config.

    That is the mesh, processes, devices, processors and jaxlib.
    """
    known = versions()
    return {
        "mesh": {} if mesh is None else dict(mesh.shape),
        "devices": {key: known["devices"][key] for key in ("kind", "count", "processes")},
        "cpu": known["cpu"],
        "jaxlib": known["jaxlib"],
        "draws": "named",  # streams of `rng.fold`; before, keys were folded with other numbers
    }


def local_rows(where: jax.sharding.Sharding, rows: int) -> list[tuple[int, int]]:
    """Return the rows of a batch that the devices of this process hold, as ranges (start, stop).

    On a TPU slice, where a mesh follows the interconnect, they need not be adjacent.
    """
    indices = where.addressable_devices_indices_map((rows,)).values()
    return sorted({index[0].indices(rows)[:2] for index in indices if index is not None})
