"""The arrays of a checkpoint, written to a folder and read from it: by orbax, or in S3, which orbax does not know, by JAX.

Both write in threads, each process the parts that it holds, and read each part onto the devices that want it: no process ever
holds what the others have, and nothing lies on a disk in between.
"""

from __future__ import annotations

import logging
import os
from typing import Any, Protocol, runtime_checkable

import jax
from jax.experimental.array_serialization import serialization


@runtime_checkable
class Stored(Protocol):
    """One writer at a time; all processes make one and call the same of it."""

    def save(self, place: Any, arrays: dict[str, jax.Array]) -> None:
        """Begin to write arrays by name into a folder that is not there yet; back once they may change."""
        ...

    def wait(self) -> None:
        """Until all processes are through. Raises what went wrong, of whatever class the store has for it."""
        ...

    def restore(self, place: Any, wanted: dict[str, Any]) -> dict[str, jax.Array]:
        """Those of shape, dtype and sharding as wanted, by name."""
        ...

    def close(self) -> None:
        """End the threads."""
        ...


def stored(folder: str) -> Stored:
    """What writes below such a path or URL."""
    return _S3() if folder.startswith("s3://") else _Orbax()


class _Orbax:
    def __init__(self) -> None:
        import orbax.checkpoint as ocp

        logging.getLogger("absl").setLevel(logging.ERROR)  # orbax tells the story of each save
        # trained floats hardly get smaller
        self._checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_compression=False))

    def save(self, place: Any, arrays: dict[str, jax.Array]) -> None:
        import orbax.checkpoint as ocp

        self._checkpointer.save(place, args=ocp.args.PyTreeSave(arrays))

    def wait(self) -> None:
        self._checkpointer.wait_until_finished()

    def restore(self, place: Any, wanted: dict[str, Any]) -> dict[str, jax.Array]:
        import orbax.checkpoint as ocp

        args = {
            name: ocp.ArrayRestoreArgs(sharding=a.sharding, global_shape=a.shape, dtype=a.dtype) for name, a in wanted.items()
        }
        shapes = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in wanted.items()}
        return self._checkpointer.restore(place, args=ocp.args.PyTreeRestore(item=shapes, restore_args=args))

    def close(self) -> None:
        self._checkpointer.close()


class _S3:
    """Each array is a Zarr of its own; where the store is and who asks is said as for all clients of S3, by `AWS_...`."""

    def __init__(self) -> None:
        self._manager = serialization.GlobalAsyncCheckpointManager()

    def save(self, place: Any, arrays: dict[str, jax.Array]) -> None:
        self._manager.serialize([*arrays.values()], [_spec(place, name) for name in arrays], on_commit_callback=lambda: None)

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def restore(self, place: Any, wanted: dict[str, Any]) -> dict[str, jax.Array]:
        shapes, dtypes = [a.shape for a in wanted.values()], [a.dtype for a in wanted.values()]
        places = [a.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0]) for a in wanted.values()]
        found = self._manager.deserialize(places, [_spec(place, name) for name in wanted], shapes, dtypes)
        return dict(zip(wanted, found, strict=True))

    def close(self) -> None:
        self._manager.wait_until_finished()


def _spec(place: Any, name: str) -> dict[str, Any]:
    bucket, _, folder = str(place).removeprefix("s3://").partition("/")
    store = {"driver": "s3", "bucket": bucket, "path": f"{folder}/{name}"}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):  # a store that is not Amazon's
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        store |= {"endpoint": endpoint, "aws_region": region}
    return {"driver": "zarr", "kvstore": store}
