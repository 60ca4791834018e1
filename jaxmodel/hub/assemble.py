"""Parameter trees from the tensors of a file.

All tensors are checked first. Then each leaf is read directly into its final place. On a mesh, each
device's slice is read by itself. On a CPU, a slice is read into the buffer that the device uses, so
loading takes the memory of the weights plus that of the one tensor being converted.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodel import axes, sharding, tree
from jaxmodel.errors import InputError, nearest
from jaxmodel.hub.names import Family, Name, Tensors, find, layer_shapes, read_leaf
from jaxmodel.leaves import Compressed
from jaxmodel.leaves.leaf import from_tensors, tensor_names
from jaxmodel.models import Model
from jaxmodel.progress import progress

ALIGNED = 64  # bytes; a CPU device uses a buffer with this alignment without copying it
type Read = Callable[[tuple[slice, ...]], np.ndarray]


def assemble(
    model: Model,
    family: Family,
    names: Iterable[Name],
    tensors: Tensors,
    *,
    fields: Mapping[str, Any] | None = None,
    narrow: Mapping[str, int] | None = None,
    dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> tree.Params:
    """Return the parameters of a model.

    Args:
      model: whose leaves are read.
      family: which tensors its files may omit or have in addition.
      names: the file's entry of each leaf.
      tensors: the file.
      fields: the static fields of compressed leaves by their packed name.
      narrow: the groups with fewer units than the config says, see `axes.narrower`.
      dtype: of plain floating leaves; None for the stored dtype.
      mesh: on which they are placed by the model's rules; None for the default device.

    Raises:
      InputError: a tensor is missing, has the wrong shape, or has no place. Everything is checked
        before any tensor is read.
    """
    names = tuple(names)
    fields = fields or {}
    whole = layer_shapes(model)
    shapes = tree.flatten(axes.shapes(model.axes, whole, narrow) if narrow else whole)
    there = tensors.names()
    used = set[str]()

    def place(tensor: str) -> str | None:
        return next((name for name in family.spelt(tensor) if name in there), None)

    def need(tensor: str) -> str:
        name = place(tensor)
        if name is None:
            close = ", ".join(nearest(tensor, there)) or "none"
            raise InputError(f"{tensors.where}: the tensor {tensor!r} is missing; nearest: {close}")
        used.add(name)
        return name

    def fits(tensor: str, found: Iterable[int], needed: Iterable[int]) -> None:
        if tuple(found) != tuple(needed):
            raise InputError(
                f"{tensors.where}: the tensor {tensor!r} has shape {list(found)}; the config "
                f"needs {list(needed)}"
            )

    readers: dict[str, list[Read]] = {}  # layer path -> a reader for each buffer of its leaf
    leaves: dict[str, Any] = {}  # layer path -> the leaf, with the shapes of its buffers
    for path, want in shapes.items():
        name, layer = find(names, path)
        name = dataclasses.replace(name, experts=want.shape[0]) if name.experts else name
        base = name.packed.format(layer)
        if base in fields:
            leaves[path], readers[path] = _packed(
                tensors, base, name, want.shape, fields[base], place, need
            )
            fits(base, leaves[path].shape, want.shape)
            continue
        name = name.alone if name.part is not None and place(base) else name
        found: set[np.dtype] = set()
        for tensor in name.tensors(layer):
            stored = need(tensor)
            if not jnp.issubdtype(tensors.dtype(stored), jnp.floating):
                raise InputError(
                    f"{tensors.where}: the tensor {tensor!r} is {tensors.dtype(stored)}; allowed: "
                    "floating-point numbers"
                )
            fits(tensor, tensors.shape(stored), name.file_shape(want.shape))
            found.add(tensors.dtype(stored))
        kind = (
            jnp.dtype(dtype)
            if dtype is not None
            else jnp.result_type(*found)
            if len(found) > 1
            else found.pop()
        )
        leaves[path] = jax.ShapeDtypeStruct(want.shape, kind)
        readers[path] = [_reader(tensors, family, name, layer, want.shape)]
    _check_rest(tensors, family, used, shapes, place, names)
    shape_tree = jax.eval_shape(tree.stack, tree.unflatten(leaves))
    if mesh is None:
        placed = jax.tree.map(
            lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), shape_tree
        )
    else:
        shape_tree, placed = sharding.shardings(model.rules, shape_tree, mesh)
    places = tree.flatten(placed)
    out: dict[str, Any] = {}
    for path, leaf in progress(tree.flatten(shape_tree).items(), "load"):
        buffers, structure = jax.tree.flatten(leaf)
        layers = [readers[layer] for layer in tree.layer_paths(path)]
        stacked = tree.is_stacked(path)
        made = [
            _make(buffer, where, [of_layer[i] for of_layer in layers], stacked)
            for i, (buffer, where) in enumerate(
                zip(buffers, jax.tree.leaves(places[path]), strict=True)
            )
        ]
        out[path] = jax.tree.unflatten(structure, made)
        if isinstance(out[path], Compressed):
            out[path].check()
    return tree.unflatten(out)


def settle(config: Any, family: Family, tensors: Tensors) -> Any:
    """Return the config that a file means; its head tensor decides whether it is tied.

    transformers 5 reads it in the same way.

    Args:
      config: as config.json states it.
      family: of the file.
      tensors: the file.
    """
    if not hasattr(config, "tied") or family.head not in family.copies:
        return config
    table = next(
        name.tensor for name in family.names(config) if name.path == family.copies[family.head]
    )
    there = tensors.names()
    head, table = (
        next((name for name in family.spelt(one) if name in there), None)
        for one in (family.head, table)
    )
    if head is None or table is None:
        return family.settle(config, None if head is None else not config.tied)
    return family.settle(config, not config.tied or not _equal(tensors, head, table))


def _reader(
    tensors: Tensors, family: Family, name: Name, layer: str, shape: tuple[int, ...]
) -> Read:
    """Return a function that reads part of a plain leaf; its tensors may have other spellings."""
    spelt = [dataclasses.replace(name, tensor=tensor) for tensor in family.spelt(name.tensor)]
    entry = next(entry for entry in spelt if entry.at(layer) in tensors.names())
    return lambda index: read_leaf(tensors, entry, layer, shape, index)


def _packed(
    tensors: Tensors,
    base: str,
    name: Name,
    shape: tuple[int, ...],
    fields: Mapping[str, Any],
    place: Callable[[str], str | None],
    need: Callable[[str], str],
) -> tuple[Any, list[Read]]:
    """Return a compressed leaf with the shapes of its buffers, and a reader for each."""
    try:
        present = [suffix for suffix in tensor_names(fields) if place(f"{base}_{suffix}")]
        stored = {suffix: need(f"{base}_{suffix}") for suffix in present}
        shapes = {
            s: jax.ShapeDtypeStruct(tensors.shape(name), tensors.dtype(name))
            for s, name in stored.items()
        }
        leaf = from_tensors(shapes, fields)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{tensors.where}: the tensor {base!r} does not fit its fields: {reason}"
        ) from None
    by_buffer = {id(shapes[suffix]): name for suffix, name in stored.items()}
    order = [by_buffer[id(buffer)] for buffer in jax.tree.leaves(leaf)]
    rows = name.rows(shape[0]) if name.pairs else None

    def reader(stored: str) -> Read:
        return lambda index: tensors.read(
            stored, index if rows is None else (rows[index[0]], *index[1:])
        )

    return leaf, [reader(name) for name in order]


def _make(
    buffer: jax.ShapeDtypeStruct, where: jax.sharding.Sharding, readers: list[Read], stacked: bool
) -> jax.Array:
    """Return one array; each device of this host gets only its own slice."""
    done: dict[Any, np.ndarray] = {}  # a slice that several devices hold is read only once
    shards = []
    for device, index in where.addressable_devices_indices_map(buffer.shape).items():
        full = tuple(
            slice(*s.indices(n)[:2]) for s, n in zip(index or (), buffer.shape, strict=True)
        )
        key = tuple((s.start, s.stop) for s in full)
        if key not in done:
            done[key] = _aligned(tuple(s.stop - s.start for s in full), buffer.dtype)
            if stacked:
                for i, reader in enumerate(readers[full[0]]):
                    done[key][i] = reader(full[1:])
            else:
                done[key][...] = readers[0](full)
        shards.append(jax.device_put(done[key], device, may_alias=True))
    return jax.make_array_from_single_device_arrays(buffer.shape, where, shards)


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    size = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNED, np.uint8)
    start = -raw.ctypes.data % ALIGNED
    return raw[start : start + size].view(dtype).reshape(shape)


def _check_rest(
    tensors: Tensors,
    family: Family,
    used: set[str],
    shapes: Mapping[str, Any],
    place: Callable[[str], str | None],
    names: tuple[Name, ...],
) -> None:
    """Check the tensors that the model did not use.

    Only masks, tables and copies of tied leaves are allowed.
    """
    ignored = re.compile(f"({re.escape(family.prefix)})?({family.ignored})")
    for tensor, path in family.copies.items():
        name = place(tensor)
        if name is None or name in used or path not in shapes:
            continue
        used.add(name)
        entry, layer = find(names, path)
        original = place(entry.at(layer))
        if original is not None and not _equal(tensors, name, original):
            raise InputError(
                f"{tensors.where}: the tensor {name!r} differs from {original!r}, to which this "
                "config ties it"
            )
    extra = [name for name in tensors.names() if name not in used and not ignored.fullmatch(name)]
    if extra:  # without a bias or a table of rotary factors this would be another model
        raise InputError(
            f"{tensors.where}: {len(extra)} tensors have no place in the model, the first is "
            f"{min(extra)!r}"
        )


def _equal(tensors: Tensors, one: str, other: str, rows: int = 4096) -> bool:
    shape = tensors.shape(one)
    pieces = [(slice(i, min(i + rows, shape[0])),) for i in range(0, shape[0], rows)]
    return shape == tensors.shape(other) and all(
        np.array_equal(tensors.read(one, i), tensors.read(other, i)) for i in pieces
    )
