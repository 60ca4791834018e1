"""Records of a state in a manifest, and the differences of two records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodel.leaves import Compressed
from jaxmodel.leaves.leaf import to_tensors
from jaxmodel.report.json_out import to_plain

LATER = ("extra.batch_size", "extra.first_row")
"""Counters of a state that earlier versions did not save; they are 0 there."""


def flat(state: Any) -> dict[str, Any]:
    """Return the arrays of a state by name, in the order of its leaves.

    >>> from jaxmodel.train import TrainState
    >>> state = TrainState(jnp.int32(3), jnp.int32(3), {"w": jnp.ones(2)}, (), {})
    >>> list(flat(state))
    ['step', 'data_step', 'params.w']
    """
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").replace("/", "."): leaf
        for path, leaf in leaves
    }


def fields(state: Any) -> dict[str, Any]:
    """Return the static fields of the compressed leaves by name."""
    leaves = jax.tree_util.tree_flatten_with_path(
        state, is_leaf=lambda node: isinstance(node, Compressed)
    )[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): to_tensors(leaf)[1]
        for path, leaf in leaves
        if isinstance(leaf, Compressed)
    }


def fingerprint(state: Any) -> str:
    """Return the SHA-256 of the names, dtypes, shapes and bytes of a state.

    Two states with equal bits have the same fingerprint.
    """
    digest = hashlib.sha256()
    for name, leaf in sorted(flat(state).items()):
        array = np.asarray(jax.device_get(leaf))
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def of_other_devices(record: dict[str, Any], wanted: dict[str, Any]) -> set[str]:
    """Return the names of the residuals of gradient compression if the number of devices changed.

    They have an axis of devices, so they cannot be restored onto another number. Without such a
    change the set is empty.
    """
    names = {name for name in {*wanted, *record["arrays"]} if name.startswith("extra.residual.")}
    there = {name: record["arrays"].get(name, [None])[0] for name in names}
    same = all(
        name in wanted and list(wanted[name].shape) == shape for name, shape in there.items()
    )
    return set() if same else names


def zeros(wanted: dict[str, Any], names: Collection[str]) -> dict[str, jax.Array]:
    """Make zeros for the named ones of the wanted arrays, with their shardings."""
    shapes = {name: wanted[name] for name in names if name in wanted}
    where = {name: a.sharding for name, a in shapes.items()}
    make = lambda: {name: jnp.zeros(a.shape, a.dtype) for name, a in shapes.items()}
    return jax.jit(make, out_shardings=where)() if shapes else {}


@jax.jit
def copied(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Copy arrays on their devices, so that the next step may reuse the memory of the old ones."""
    return jax.tree.map(jnp.copy, arrays)


def digest_of(record: Mapping[str, Any]) -> str:
    """Compute the SHA-256 of a record as JSON."""
    return hashlib.sha256(json.dumps(to_plain(record), sort_keys=True).encode()).hexdigest()


def differences(then: Any, now: Any, where: str = "") -> list[str]:
    """List the values that differ between two records of plain data: `width 64 then, 128 now`."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        keys = [*then, *(key for key in now if key not in then)]
        inside = lambda key: differences(
            then.get(key), now.get(key), f"{where}.{key}" if where else str(key)
        )
        return [line for key in keys for line in inside(key)]
    return [] if then == now else [f"{where} was {shown(then)}, is {shown(now)}"]


def field_of(line: str) -> str:
    """Return the name at the start of a line of `differences`, without the prefix `train.`."""
    return line.split(" ", 1)[0].removeprefix("train.")


def is_about(name: str, line: str) -> bool:
    """Return whether a line of `differences` is about a name.

    The name may be a field with its config or without (`train.learning_rate`, `learning_rate`), or
    a whole config (`model`).
    """
    path = line.split(" ", 1)[0]
    return name in (path, path.removeprefix("train.")) or path.startswith(f"{name}.")


def shown(value: Any) -> str:
    """Format a value of a record for people: shortened, an array as `float32[2, 3]`."""
    if value is None:
        return "absent"
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], list):
        return f"{value[1]}{value[0]}"
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:57]}..."
