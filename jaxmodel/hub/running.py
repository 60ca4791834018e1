"""The form of each leaf that runs fastest on the processor at hand, made once at load.

The table is by measurement: SmolLM2-135M's 120 products of a decode step, scanned, in turns with
float32 in one process (an AMD EPYC with AVX-512 and VNNI, beside other work on both cores; the best
of 9). "C++" is the kernel of `jaxmodel.ops.kernels`, "XLA" what runs without it; by medians, which
other work slows down, the kernels are 1.4 to 2.8 times as fast as XLA at 1 row and at 8, but for
8 bits at 1 row (1.1). Kernels of 4 and 8 bits that are held to AVX2 are within 10 % of these.

| stored | runs as | 1 row: C++ (XLA) | 8 rows | 32 rows |
|---|---|---|---|---|
| 1 bit | `RowPacked` | 7.0x (1.8x) | 3.3x (1.6x) | 1.6x (1.1x) |
| 2 bits, groups of 64 | `RowPacked` | 3.4x (2.6x) | 2.6x (1.7x) | 1.4x (1.3x) |
| 3 and 4 bits, groups of 64 | `RowPacked` | 3.1x (2.9x) | 2.5x (1.6x) | 1.3x (1.2x) |
| 4 bits in rows | `RowPacked` | 3.8x (2.6x) | 2.9x (1.5x) | 1.6x (1.1x) |
| 4 bits in rows, int8 activations | int8 | as 8 bits | | |
| 5 to 7 bits | 8 bits, grouped | 2.3x (2.5x) | 2.2x (1.6x) | 1.3x (1.4x) |
| 8 bits in rows | as it is | 2.4x (2.3x) | 2.4x (1.4x) | 1.4x (1.2x) |
| 8 bits, int8 activations | as it is | 3.1x (2.2x) | | 4.2x (3.9x) |
| bitmask, table of values, 8-bit floats | expanded to float32 (or to its codes) | 1x | 1x | 1x |

An accelerator unpacks for itself: there only bitmasks are expanded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from jaxmodel import layers, tree
from jaxmodel.errors import one_of
from jaxmodel.leaves import Adapted, Codebook, QTensor, RowPacked, Turned
from jaxmodel.leaves.qtensor import FLOATS
from jaxmodel.leaves.sparse import expand

MEMORY = ("fast", "packed")
"""What `for_inference` may do: grow a leaf for speed, or never."""


def running(params: tree.Params, fused: Sequence[tuple[str, ...]], memory: str) -> tree.Params:
    """Return the params in the form that runs; those in this form already are not copied.

    Args:
      params: the stored form.
      fused: the names of maps that are joined (`Axes.fused`).
      memory: "fast", or "packed" for the fastest form that takes no more bytes than the stored one.

    Raises:
      InputError: `memory` is another word.
    """
    one_of("memory", memory, MEMORY)
    tree.check(params)
    small = memory == "packed"
    joined = layers.fuse(params if small else expand(params), fused)
    if jax.default_backend() != "cpu":
        return joined
    return tree.map_leaves(lambda _, leaf: _form(leaf, small), joined)


def _form(leaf: Any, small: bool) -> Any:
    if isinstance(leaf, Turned | Adapted):
        return dataclasses.replace(leaf, base=_form(leaf.base, small))
    if isinstance(leaf, Codebook) and not small:
        return jax.jit(lambda leaf: leaf.decode())(leaf)
    if not isinstance(leaf, QTensor) or _split(leaf):
        return leaf
    if leaf.form in FLOATS:
        plain = leaf.activations is None and not small
        return jax.jit(lambda leaf: leaf.decode())(leaf) if plain else leaf
    if leaf.bits == 8:
        return leaf
    whole_rows = leaf.groups == 1 and leaf.minimum is None
    if leaf.activations == "int8" and whole_rows and not small:
        return _in_bytes(leaf)
    if leaf.bits > 4:
        return leaf if small else _in_bytes(leaf)
    # three bits and ternary codes grow in this layout
    if small and (leaf.bits == 3 or leaf.form is not None):
        return leaf
    return RowPacked.of(leaf) or leaf


def _in_bytes(leaf: QTensor) -> QTensor:
    """Return the same weight with a byte for each code."""
    group = None if leaf.groups == 1 else (leaf.shape[-1] + leaf.pad) // leaf.groups
    return QTensor.from_codes(
        leaf.codes(),
        leaf.scale,
        leaf.minimum,
        bits=8,
        group=group,
        activations=leaf.activations,
        limit=leaf.limit,
    )


def _split(leaf: QTensor) -> bool:
    """Return whether devices hold parts of the leaf: then it keeps the layout that was cut."""
    place = getattr(leaf.packed, "sharding", None)
    return place is not None and not place.is_fully_replicated
