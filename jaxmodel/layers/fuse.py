"""Fusing of the linear maps of one input into one leaf for inference, and the inverse.

Starting a small contraction takes time on a CPU however small it is, so `q`, `k`, `v` and `gate`,
`up` run faster as one. The key of a fused leaf tells the proportions of its parts: `3q+k+v` is one
weight whose first three fifths are `q`. This is the only exception to stable paths, and it is for
running only: store, compress and train the tree with separate leaves.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodel import tree
from jaxmodel.leaves import Compressed, QTensor, Turned
from jaxmodel.leaves.adapted import SUFFIX

type Groups = Sequence[tuple[str, ...]]

GROUPS = (("q", "k", "v"), ("gate", "up"))
"""The names of leaves that `Attention`, `MLP` and the experts read as one where they are one. A
model of these layers says so: `Axes(..., fused=GROUPS)`.
"""


def fuse(params: tree.Params, groups: Groups = GROUPS) -> tree.Params:
    """Join each group of maps where their leaves allow it.

    They must be plain arrays of one dtype, or `QTensor`s with the same static fields and a scale
    for every row; or all `Turned` leaves of such, by the same rotation alone. Other leaves stay
    separate, and so does a group in which one leaf has an adapter.
    """
    out = {
        key: child if tree.is_leaf(child) else fuse(child, groups) for key, child in params.items()
    }
    for group in groups:
        members: list[Any] = [out.get(name) for name in group]
        biases: list[Any] = [out.get(f"{name}_bias") for name in group]
        none = [bias is None for bias in biases]
        apart = any(f"{name}{SUFFIX}" in out for name in group) or any(
            isinstance(bias, Compressed) for bias in biases
        )
        if apart or not _joinable(members) or any(none) != all(none):
            continue
        key = _key(group, [leaf.shape[-2] for leaf in members])
        out[key] = jax.tree.map(lambda *arrays: jnp.concatenate(arrays, axis=-2), *members)
        if biases[0] is not None:
            out[f"{key}_bias"] = jnp.concatenate(biases, axis=-1)
        for name in group:
            out.pop(name)
            out.pop(f"{name}_bias", None)
    return out


def unfuse(params: tree.Params) -> tree.Params:
    """Separate the leaves that `fuse` joined."""
    out: dict[str, Any] = {}
    for key, child in params.items():
        parts = divide(key.removesuffix("_bias"))
        if parts is None:
            out[key] = child if tree.is_leaf(child) else unfuse(child)
            continue
        axis, suffix = (-1, "_bias") if key.endswith("_bias") else (-2, "")
        for name, (start, stop) in parts.items():
            out[name + suffix] = jax.tree.map(
                lambda a, s=start, e=stop, x=axis: _cut(a, s, e, x), child
            )
    return out


def divide(key: str) -> dict[str, tuple[float, float]] | None:
    """Return the ranges of a fused key's members, as fractions of the leaf; None for other keys.

    >>> divide("3q+k")
    {'q': (0.0, 0.75), 'k': (0.75, 1.0)}
    """
    if "+" not in key:
        return None
    members = [re.fullmatch(r"(\d*)(\w+)", part) for part in key.split("+")]
    if not all(members):
        return None
    weights = {m[2]: int(m[1] or 1) for m in members if m}
    total = sum(weights.values())
    start = 0
    parts = {}
    for name, weight in weights.items():
        parts[name] = (start / total, (start + weight) / total)
        start += weight
    return parts


def fused_key(keys: Iterable[str], group: Iterable[str]) -> str | None:
    """Return the key among `keys` that holds this group fused, or None."""
    wanted = list(group)
    return next((key for key in keys if list(divide(key) or ()) == wanted), None)


def cut(y: jax.Array, key: str) -> list[jax.Array]:
    """Cut a fused result along its last axis into the parts of its members."""
    parts: Mapping[str, tuple[float, float]] = divide(key) or {}
    return [_cut(y, start, stop, -1) for start, stop in parts.values()]


def _cut(a: jax.Array, start: float, stop: float, axis: int) -> jax.Array:
    n = a.shape[axis]
    return jax.lax.slice_in_dim(a, round(start * n), round(stop * n), axis=axis)


def _key(group: Iterable[str], widths: list[int]) -> str:
    unit = math.gcd(*widths)
    return "+".join(
        f"{width // unit if width > unit else ''}{name}"
        for name, width in zip(group, widths, strict=True)
    )


def _joinable(members: list[Any]) -> bool:
    if any(leaf is None for leaf in members):
        return False
    alike = all(jax.tree.structure(leaf) == jax.tree.structure(members[0]) for leaf in members)
    members = [
        leaf.base if isinstance(leaf, Turned) and leaf.scale is leaf.limit is None else leaf
        for leaf in members
    ]
    first = members[0]
    if isinstance(first, Compressed):
        if not all(
            isinstance(leaf, QTensor)
            and leaf.scale.shape[-2] == leaf.shape[-2]
            and leaf.limit is None  # one of all rows
            for leaf in members
        ):
            return False
    elif not all(hasattr(leaf, "at") or isinstance(leaf, jax.ShapeDtypeStruct) for leaf in members):
        return False

    def signature(leaf: Any) -> list[Any]:
        return [(a.dtype, a.shape[:-2], a.shape[-1]) for a in jax.tree.leaves(leaf)]

    return alike and all(signature(leaf) == signature(first) for leaf in members)
