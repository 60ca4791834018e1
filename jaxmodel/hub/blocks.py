"""The tensors of a GGUF file: as floats, or as the stored codes and scales (`QTensor`).

Both forms are the same weights, bit for bit. Only the `gguf` package knows the bit layout of each
block type. It is asked for codes and scales by decoding modified blocks: with all scales one, the
result is the codes; with all codes one, the scales; with all codes zero, the minima.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodel.errors import require
from jaxmodel.hub.gguf import GGUFFile
from jaxmodel.hub.names import Tensors
from jaxmodel.leaves import QTensor
from jaxmodel.leaves.leaf import to_tensors

type Bytes = tuple[tuple[int, int, int], ...]  # (first, last + 1, value) of a block's bytes


@dataclasses.dataclass(frozen=True)
class Layout:
    """A block type: what a leaf needs to know, and which bytes of a block hold what.

    Attributes:
      bits: of a code.
      group: number of codes that share a scale.
      ones: the bytes that set every code to one.
      unit: the bytes that set every scale to one.
      minima: the bytes that set every minimum to zero; empty where there are no minima. With
        minima, codes begin at zero.
      half: whether a 16-bit float holds the scales and minima exactly.
    """

    bits: int
    group: int
    ones: Bytes
    unit: Bytes
    minima: Bytes = ()
    half: bool = True


def _one(at: int) -> Bytes:
    """Return the two bytes of a 16-bit 1.0 (0x3C00, little-endian) at an offset."""
    return (at, at + 1, 0x00), (at + 1, at + 2, 0x3C)


# Q4_K and Q5_K: eight scales and minima of 6 bits, interleaved
_SIX_BITS = (
    *_one(0),
    (4, 8, 1),
    (8, 12, 0),
    (12, 16, 1),
)
LAYOUTS = {
    "Q8_0": Layout(8, 32, ((2, 34, 0x01),), _one(0)),
    "Q4_0": Layout(4, 32, ((2, 18, 0x99),), _one(0)),
    "Q4_1": Layout(4, 32, ((4, 20, 0x11),), _one(0), ((2, 4, 0),)),
    "Q5_0": Layout(5, 32, ((2, 6, 0xFF), (6, 22, 0x11)), _one(0)),
    "Q5_1": Layout(5, 32, ((4, 8, 0x00), (8, 24, 0x11)), _one(0), ((2, 4, 0),)),
    "Q2_K": Layout(
        2, 16, ((16, 80, 0x55),), ((0, 16, 0x01), *_one(80)), ((82, 84, 0),), half=False
    ),
    "Q3_K": Layout(
        3,
        16,
        ((0, 32, 0xFF), (32, 96, 0x55)),
        ((96, 104, 0x11), (104, 108, 0xAA), *_one(108)),
        half=False,
    ),
    "Q4_K": Layout(4, 32, ((16, 144, 0x11),), _SIX_BITS, ((2, 4, 0),), half=False),
    "Q5_K": Layout(5, 32, ((16, 48, 0x00), (48, 176, 0x11)), _SIX_BITS, ((2, 4, 0),), half=False),
    "Q6_K": Layout(
        6, 16, ((0, 128, 0x11), (128, 192, 0xAA)), ((192, 208, 0x01), *_one(208)), half=False
    ),
}


class Blocks(Tensors):
    """The tensors of a GGUF file.

    With `packed`, a matrix of a type in `LAYOUTS` is presented as the tensors of a `QTensor`
    (`NAME_packed`, `NAME_scale`, `NAME_minimum`), whose static fields are in `fields`.
    """

    def __init__(self, file: GGUFFile, packed: bool = False):
        self.where = file.path.name
        self._file = file
        self.fields: dict[str, dict[str, Any]] = {}
        self._virtual: dict[str, tuple[str, jax.ShapeDtypeStruct]] = {}
        self._last: tuple[Any, dict[str, np.ndarray]] = (None, {})
        for name, entry in file.tensors.items():
            if packed and entry.type in LAYOUTS and len(entry.shape) == 2:
                arrays, fields = to_tensors(_shapes(entry.shape, LAYOUTS[entry.type]))
                assert fields is not None
                self.fields[name] = fields
                self._virtual |= {
                    f"{name}_{suffix}": (name, array) for suffix, array in arrays.items()
                }

    def names(self) -> Collection[str]:
        """Return the names of all tensors."""
        return [*(name for name in self._file.tensors if name not in self.fields), *self._virtual]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return (
            self._virtual[name][1].shape if name in self._virtual else self._file.entry(name).shape
        )

    def dtype(self, name: str) -> np.dtype:
        """Return the dtype that `read` gives."""
        if name in self._virtual:
            return np.dtype(self._virtual[name][1].dtype)
        self._file.entry(name)
        return np.dtype(np.float32)

    def read(self, name: str, index: tuple[Any, ...] = ()) -> np.ndarray:
        """Return a tensor, or the part of it that `index` selects."""
        if name not in self._virtual:
            return self._file.read(name, index)
        base = self._virtual[name][0]
        suffix = name.rsplit("_", 1)[1]
        rows = index[0] if index else slice(None)
        key = base, str(rows) if isinstance(rows, slice) else rows.tobytes()
        if self._last[0] != key:  # the parts of a leaf are requested one after another
            leaf = unpack_blocks(self._file.raw(base)[rows], self._file.entry(base).type)
            self._last = (
                key,
                {part: np.asarray(array) for part, array in to_tensors(leaf)[0].items()},
            )
        return self._last[1][suffix][(slice(None), *index[1:])]


def unpack_blocks(data: np.ndarray, kind: str) -> QTensor:
    """Return rows of blocks as a `QTensor`.

    It decodes to the same values as the file's own dequantisation, bit for bit.

    Args:
      data: uint8 `[rows, bytes]`.
      kind: a type in `LAYOUTS`.
    """
    gguf = require("gguf", "hub")
    layout = LAYOUTS[kind]
    type_ = gguf.GGMLQuantizationType[kind]
    size = gguf.GGML_QUANT_SIZES[type_][1]
    length = gguf.GGML_QUANT_SIZES[type_][0]
    rows = data.shape[0]
    n = data.shape[1] // size * length

    def decoded(*changes: tuple[int, int, int]) -> np.ndarray:
        blocks = data.reshape(-1, size).copy()
        for first, stop, value in changes:
            blocks[:, first:stop] = value
        return gguf.quants.dequantize(blocks.reshape(data.shape), type_)

    def of_groups(*changes: tuple[int, int, int]) -> jax.Array:
        values = decoded(*changes).reshape(rows, n // layout.group, layout.group)[:, :, 0]
        return jnp.asarray(values.astype(np.float16 if layout.half else np.float32))

    codes = decoded(*layout.unit, *layout.minima).astype(np.uint8 if layout.minima else np.int8)
    scale = of_groups(*layout.ones, *layout.minima)
    minimum = (
        of_groups(*((first, stop, 0) for first, stop, _ in layout.ones)) if layout.minima else None
    )
    return QTensor.from_codes(
        jnp.asarray(codes), scale, minimum, bits=layout.bits, group=layout.group
    )


def _shapes(shape: tuple[int, ...], layout: Layout) -> QTensor:
    """Return the leaf of a matrix, with shapes in place of arrays."""
    kind = jnp.float16 if layout.half else jnp.float32
    codes = jax.ShapeDtypeStruct(shape, jnp.uint8 if layout.minima else jnp.int8)
    scale = jax.ShapeDtypeStruct((shape[0], shape[1] // layout.group), kind)

    def make(codes: jax.Array, scale: jax.Array) -> QTensor:
        return QTensor.from_codes(
            codes, scale, scale if layout.minima else None, bits=layout.bits, group=layout.group
        )

    return jax.eval_shape(make, codes, scale)
