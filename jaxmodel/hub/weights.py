"""Folders of safetensors, read tensor by tensor."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open

from jaxmodel import schema
from jaxmodel.errors import InputError, border
from jaxmodel.files import open_regular
from jaxmodel.hub.names import Tensors
from jaxmodel.hub.schemas import ShardIndex

WEIGHTS = "model.safetensors"

_DTYPES = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16},
    **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8},
    **{"U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_},
}


class Folder(Tensors):
    """The tensors of some files of safetensors: one, or all shards of an index.

    Attributes:
      metadata: the texts that the files have beside their tensors.
    """

    def __init__(self, where: str, files: dict[str, Any], metadata: dict[str, str] | None = None):
        self.where = where
        self.metadata = metadata or {}
        self._files = files
        self._slices: dict[str, Any] = {}

    def names(self) -> Collection[str]:
        """Return the names of all tensors."""
        return self._files.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> np.dtype:
        """Return the dtype that `read` gives."""
        kind = self._slice(name).get_dtype()
        if kind not in _DTYPES:
            raise InputError(
                f"{self.where}: the tensor {name!r} is {kind}, which is not supported; allowed: "
                f"{', '.join(_DTYPES)}"
            )
        return np.dtype(_DTYPES[kind])

    def read(self, name: str, index: tuple[Any, ...] = ()) -> np.ndarray:
        """Return a tensor, or the part of it that `index` selects."""
        self.dtype(name)
        shape = self.shape(name)
        whole = all(i == slice(0, n) for i, n in zip(index, shape, strict=False))
        with border(f"{self.where}: the tensor {name!r} of shape {list(shape)} cannot be read"):
            return self._files[name].get_tensor(name) if whole else self._slice(name)[index]

    def _slice(self, name: str) -> Any:
        if name not in self._slices:
            self._slices[name] = self._files[name].get_slice(name)
        return self._slices[name]


@contextlib.contextmanager
def open_folder(folder: Path) -> Iterator[Folder]:
    """Open the tensors of a folder while the context lasts.

    Raises:
      InputError: a missing or damaged file.
    """
    index = folder / f"{WEIGHTS}.index.json"
    shards = [WEIGHTS]
    places: dict[str, str] = {}
    if index.exists() and not (folder / WEIGHTS).exists():
        places = schema.read(index, ShardIndex)["weight_map"]
        shards = sorted(set(places.values()))
        for shard in shards:
            if Path(shard).name != shard:
                raise InputError(
                    f"{index}: weight_map has {shard!r}; allowed: names of files in this folder"
                )
    if not (folder / WEIGHTS).exists() and not index.exists():
        raise InputError(f"{folder}: the file {WEIGHTS!r} is missing{_instead(folder)}")
    for shard in shards:
        if not (folder / shard).exists():
            raise InputError(f"{folder}: the file {shard!r} is missing")
    with open_files(str(folder), [folder / shard for shard in shards], places) as tensors:
        yield tensors


@contextlib.contextmanager
def open_files(
    where: str, paths: Collection[Path], places: Mapping[str, str] | None = None
) -> Iterator[Folder]:
    """Open files of safetensors as the tensors of all of them.

    Args:
      where: what names the files in messages.
      paths: the paths of the files.
      places: tensor -> name of the file that it is read from, if several files have it.

    Raises:
      InputError: a file is damaged, or a tensor is in several files and `places` says of none.
    """
    files: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        for path in paths:
            with border(f"{path}: not a complete safetensors file"):
                open_regular(path).close()
                file = stack.enter_context(safe_open(path, framework="numpy"))
                metadata |= file.metadata() or {}
                names = list(file.keys())
            for name in names:
                place = (places or {}).get(name)
                if name in files and place is None:
                    raise InputError(
                        f"{where}: several files have the tensor {name!r}, and the index does not "
                        f"say which of them counts"
                    )
                if name not in files or place == path.name:
                    files[name] = file
        yield Folder(where, files, metadata)


_DEPTH = re.compile(
    r"(num_.*layers|n_layers?|.*depth|layers|blocks|stages|.*block_count)", re.ASCII
)
_FEW = 1000  # layers; up to this depth no check is needed


def check_depth(config: Any, where: str, tensors: Callable[[], int]) -> None:
    """Refuse a config with more layers than tensors, before anything is made for each layer.

    Args:
      config: config.json, or the metadata of a GGUF file.
      where: name of the file in the message.
      tensors: gives the number of tensors; called only for an unusual depth.

    Raises:
      InputError: there are fewer tensors than layers.
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            check_depth(value, where, tensors)
        several = value if isinstance(value, list) else [value]
        deep = (
            max((one for one in several if type(one) is int), default=0)
            if _DEPTH.fullmatch(key)
            else 0
        )
        if deep > _FEW and deep > (most := tensors()):
            raise InputError(
                f"{where}: {key} is {deep:,}; the files have {most:,} tensors, and every layer "
                f"needs one"
            )


def count_tensors(folder: Path) -> int:
    """Return the number of tensors in the files of a folder.

    Raises:
      InputError: see `open_folder`.
    """
    with open_folder(folder) as tensors:
        return len(tensors.names())


def _instead(folder: Path) -> str:
    """Describe what a folder without readable weights contains, and what to do about it."""
    there = sorted(path.name for path in folder.iterdir())
    if found := next(
        (
            name
            for name in there
            if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack"))
        ),
        None,
    ):
        return (
            f"; {found!r} is not supported (only safetensors are; pickled files can run code): "
            "load it with the program that made it and save it with safe_serialization=True"
        )
    if found := next((name for name in there if name.endswith(".gguf")), None):
        return f"; give the file itself: {folder / found}"
    if found := next((name for name in there if name.endswith(".safetensors")), None):
        return f"; {found!r} is not in HF's layout"
    return ""
