"""The arrays of a checkpoint, written to a folder and read from it: by orbax, or in S3, which orbax
does not know, by JAX.

Both write in threads, each process the parts that it holds, and read each part onto the devices
that want it: no process ever holds what the others have, and nothing lies on a disk in between.
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
"""Seconds after which a save has failed: tensorstore would go on for ever where, say, the bucket is
gone.
"""


@runtime_checkable
class Stored(Protocol):
    """One save at a time; all processes make one and call the same of it."""

    def save(self, place: Any, arrays: dict[str, jax.Array]) -> None:
        """Begin to write arrays by name into a folder that is not there yet; back once they may
        change.
        """
        ...

    def wait(self) -> None:
        """Until all processes are through with the save.

        Raises what went wrong, of whatever class the store has for it.
        """
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
        self._ocp = ocp
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
        # not all that is there need be wanted; `Checkpoints` knows that all that is wanted is there
        chosen = self._ocp.args.PyTreeRestore(item=shapes, restore_args=args, partial_restore=True)
        return self._checkpointer.restore(place, args=chosen)

    def close(self) -> None:
        self._checkpointer.close()


class _S3:
    """Each array is a Zarr of its own. The environment says where the store is and who asks:
    `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, and of a store that is not Amazon's
    `AWS_ENDPOINT_URL`.
    """

    numbers = itertools.count()  # of the saves of this process, the same in all processes

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
        except Exception as error:  # told by `wait`, where the other processes hear of it
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
        reader = (
            serialization.GlobalAsyncCheckpointManager()
        )  # it bounds the bytes that are on their way
        found = _in_a_thread(lambda: reader.deserialize(places, specs, shapes, dtypes))
        return dict(zip(wanted, found, strict=True))

    def close(self) -> None:
        pass


def _in_a_thread[R](work: Callable[[], R]) -> R:
    """So that a loop of events that runs here, as in a notebook, is not in the way of another."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def _spec(place: Any, name: str) -> dict[str, Any]:
    bucket, _, folder = str(place).removeprefix("s3://").partition("/")
    store = {"driver": "s3", "bucket": bucket, "path": f"{folder}/{name}"}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        store |= {"endpoint": endpoint, "aws_region": region}
    # else zeros would not be stored, and a part that is missing would be read as zeros
    return {
        "driver": "zarr",
        "kvstore": store,
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
    }
