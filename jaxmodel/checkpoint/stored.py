"""The arrays of a checkpoint in a folder: orbax writes and reads them, and JAX in S3.

(orbax does not support S3.) Both write in threads. Each process writes the parts that it holds, and
each part is read directly onto the devices that need it. So no process ever holds the arrays of the
others, and nothing is stored on a disk in between.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import jax

from jaxmodel.distributed.startup import coordinator

PATIENCE = 1800.0
"""Seconds after which a save counts as failed.

Without it tensorstore would retry for ever, for example if the bucket is gone.
"""


@runtime_checkable
class Stored(Protocol):
    """A writer and reader of arrays, one save at a time.

    All processes make one and call the same methods.
    """

    def save(self, place: Any, arrays: dict[str, jax.Array]) -> None:
        """Start writing arrays by name into a new folder; return once the arrays may change."""
        ...

    def wait(self) -> None:
        """Wait until all processes have finished the save.

        Raises:
          Exception: the save failed; the class depends on the store.
        """
        ...

    def restore(self, place: Any, wanted: dict[str, Any]) -> dict[str, jax.Array]:
        """Read arrays by name, with the shapes, dtypes and shardings of `wanted`."""
        ...

    def close(self) -> None:
        """End the threads."""
        ...


def stored(folder: str) -> Stored:
    """Return the writer for a path or URL."""
    return _S3() if folder.startswith("s3://") else _Orbax()


class _Orbax:
    def __init__(self) -> None:
        import orbax.checkpoint as ocp

        logging.getLogger("absl").setLevel(logging.ERROR)  # orbax logs every phase of a save
        self._ocp = ocp
        # no compression: it hardly makes trained floats smaller
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(use_compression=False)
        )

    def save(self, place: Any, arrays: dict[str, jax.Array]) -> None:
        self._checkpointer.save(place, args=self._ocp.args.PyTreeSave(arrays))

    def wait(self) -> None:
        self._checkpointer.wait_until_finished()

    def restore(self, place: Any, wanted: dict[str, Any]) -> dict[str, jax.Array]:
        args = {
            name: self._ocp.ArrayRestoreArgs(
                sharding=a.sharding, global_shape=a.shape, dtype=a.dtype
            )
            for name, a in wanted.items()
        }
        shapes = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in wanted.items()}
        # The folder may hold arrays that are not wanted; `Checkpoints` has checked that it has all
        # that are.
        chosen = self._ocp.args.PyTreeRestore(item=shapes, restore_args=args, partial_restore=True)
        return self._checkpointer.restore(place, args=chosen)

    def close(self) -> None:
        self._checkpointer.close()


class _S3:
    """A store in S3 that keeps each array as a Zarr array of its own.

    These environment variables give the store and the credentials: `AWS_ACCESS_KEY_ID`,
    `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, and for a store that is not Amazon's `AWS_ENDPOINT_URL`.
    """

    numbers = itertools.count()  # counts the saves; all processes agree on the number

    def __init__(self) -> None:
        self._number = 0
        self._futures = []
        self._problem = None

    def save(self, place: Any, arrays: dict[str, jax.Array]) -> None:
        from jax.experimental.array_serialization.tensorstore_impl import async_serialize

        self._number = next(self.numbers)
        self._futures = []
        self._problem = None

        async def begin() -> None:
            await asyncio.gather(
                *(
                    async_serialize(a, _spec(place, name), commit_future=self._futures)
                    for name, a in arrays.items()
                )
            )

        try:
            _in_a_thread(lambda: asyncio.run(begin()))
        except Exception as error:  # raised by `wait`, which tells the other processes
            self._problem = error

    def wait(self) -> None:
        until = time.monotonic() + PATIENCE
        try:
            for future in self._futures:
                future.result(timeout=max(0.0, until - time.monotonic()))
        except Exception as error:
            late = (
                TimeoutError(f"not written within {PATIENCE:.0f} s")
                if isinstance(error, TimeoutError)
                else None
            )
            self._problem = self._problem or late or error
            for future in self._futures:
                future.cancel()
        self._futures = []
        if (client := coordinator()) is not None:
            where = f"jaxmodel/save/{self._number}"
            if self._problem is not None:
                client.key_value_set(f"{where}/{jax.process_index()}", str(self._problem))
            client.wait_at_barrier(where, int(2000 * PATIENCE))
            told = client.key_value_dir_get(f"{where}/")
            self._problem = self._problem or next(
                (OSError(f"{name}: {text}") for name, text in told), None
            )
        if self._problem is not None:
            raise self._problem

    def restore(self, place: Any, wanted: dict[str, Any]) -> dict[str, jax.Array]:
        from jax.experimental.array_serialization import serialization

        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        specs = [_spec(place, name) for name in wanted]
        places = [a.sharding or one for a in wanted.values()]
        shapes = [a.shape for a in wanted.values()]
        dtypes = [a.dtype for a in wanted.values()]
        # the manager limits the bytes that are in flight
        reader = serialization.GlobalAsyncCheckpointManager()
        found = _in_a_thread(lambda: reader.deserialize(places, specs, shapes, dtypes))
        return dict(zip(wanted, found, strict=True))

    def close(self) -> None:
        pass


def _in_a_thread[R](work: Callable[[], R]) -> R:
    """Run work in a thread, so that an event loop running here (a notebook's) does no harm."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def _spec(place: Any, name: str) -> dict[str, Any]:
    bucket, _, folder = str(place).removeprefix("s3://").partition("/")
    store = {"driver": "s3", "bucket": bucket, "path": f"{folder}/{name}"}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        store |= {"endpoint": endpoint, "aws_region": region}
    # By default zeros are not stored, and a missing part is read as zeros.
    return {
        "driver": "zarr",
        "kvstore": store,
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
    }
