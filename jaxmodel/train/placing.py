"""Where batches lie: rows over the batch axes of the mesh, each process with its own."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, SupportsIndex

import jax
import numpy as np

from jaxmodel import report
from jaxmodel.data import Batches
from jaxmodel.errors import InputError
from jaxmodel.sharding import BATCH_AXES


@dataclasses.dataclass(frozen=True, eq=False)
class Placed:
    """A stream whose batches lie on the devices of a mesh; of several processes each makes only its own rows.

    Attributes:
      stream: batches by step.
      mesh: None for one device.

    Raises:
      InputError: rows that do not divide over the batch axes of the mesh.
    """

    stream: Batches
    mesh: jax.sharding.Mesh | None

    def __post_init__(self) -> None:
        size, parts = self.stream.batch_size, self.parts
        if size % parts:
            near = [n for n in (size - size % parts, size + parts - size % parts) if n]
            raise InputError(
                f"batch: {size} rows do not divide over the {parts} devices of {' x '.join(self._axes)} in the mesh; "
                f"allowed: a multiple, such as {' or '.join(map(str, near))}"
            )

    @property
    def _axes(self) -> tuple[str, ...]:
        return tuple(axis for axis in BATCH_AXES if self.mesh is not None and axis in self.mesh.shape)

    @property
    def parts(self) -> int:
        """Into how many parts the rows are cut."""
        return math.prod(self.mesh.shape[axis] for axis in self._axes) if self.mesh is not None else 1

    @property
    def batch_size(self) -> int:
        """Rows of the whole batch."""
        return self.stream.batch_size

    @property
    def fingerprint(self) -> str:
        """Of the stream."""
        return self.stream.fingerprint

    def batch(self, step: SupportsIndex, rows: slice = slice(None)) -> dict[str, Any]:
        """The batch of a step: on the devices of the mesh, without one in the host's memory.

        One device gets it with the call that uses it, which takes a tenth of the host's time for `device_put` and is as early,
        because steps are called ahead of their turn.
        """
        if self.mesh is None:
            return dict(self.stream.batch(step))
        where = jax.sharding.NamedSharding(self.mesh, jax.P(self._axes))
        if jax.process_count() == 1:
            return jax.device_put(self.stream.batch(step), where)
        mine = local_rows(where, self.stream.batch_size)
        found = self.stream.batch(step, mine)
        make = lambda a: jax.make_array_from_process_local_data(where, a, (self.stream.batch_size, *a.shape[1:]))
        return {name: make(np.asarray(a)) for name, a in found.items()}


def gather(params: Any) -> Any:
    """A tree with all of its arrays whole on the first device of every process."""

    def whole(a: jax.Array) -> jax.Array:
        if not a.is_fully_addressable and not a.is_fully_replicated:
            from jax.experimental import multihost_utils

            return jax.device_put(multihost_utils.process_allgather(a, tiled=True), jax.local_devices()[0])
        found = a.addressable_data(0) if a.is_fully_replicated else jax.device_get(a)
        return jax.device_put(np.asarray(found), jax.local_devices()[0])

    return jax.tree.map(whole, params)


def environment(mesh: jax.sharding.Mesh | None) -> dict[str, Any]:
    """What the bits of a run depend on besides its config: mesh, processes, devices, processors, jaxlib."""
    known = report.versions()
    return {
        "mesh": {} if mesh is None else dict(mesh.shape),
        "devices": {key: known["devices"][key] for key in ("kind", "count", "processes")},
        "cpu": known["cpu"],
        "jaxlib": known["jaxlib"],
    }


def local_rows(where: jax.sharding.Sharding, rows: int) -> slice:
    """The rows of a batch that the devices of this process hold, from the first to behind the last.

    Raises:
      InputError: they are not next to each other.
    """
    indices = where.addressable_devices_indices_map((rows,)).values()
    parts = {index[0].indices(rows)[:2] for index in indices if index is not None}
    start, stop = min(first for first, _ in parts), max(last for _, last in parts)
    if sum(last - first for first, last in parts) != stop - start:
        held = f"the devices of process {jax.process_index()} hold rows that are not next to each other"
        raise InputError(f"mesh: {held}: {sorted(parts)}")
    return slice(start, stop)
