"""Pruning of whole units in all leaves that hold them: neurons, heads, experts, layers.

Which axes of which leaves are the same units is what `axes.groups` says of a model. Here units get
a score, the highest are chosen, and the others are set to zero where they stand. A unit that is
zero everywhere does nothing where zero in means zero out (hidden units, heads), so a model masked
so computes what the one computes from which `axes.select` has removed them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxmodel import axes, tree
from jaxmodel.axes import Axes, Group, Member
from jaxmodel.compress.observe import Stats
from jaxmodel.compress.stats import places, stats_of
from jaxmodel.errors import InputError, unknown
from jaxmodel.leaves import decode
from jaxmodel.leaves.largest import largest

type Units = Mapping[str, jax.Array]


def score_units(
    declared: Axes, params: tree.Params, letters: str = "F", stats: Stats | None = None
) -> dict[str, Float[Array, " units"]]:
    """Score the units of each group by the weights in all leaves that hold them.

    Args:
      declared: `model.axes`.
      params: of the model, plain or compressed.
      letters: of the groups to score: `F` hidden units, `K` groups of heads with their queries, `E`
        experts.
      stats: None for the root of the sum of squares of a unit's weights; or with `gradient`, from
        `observe_gradients`, for the size of the sum of `w dL/dw`, what the loss loses with the
        unit to first order (Molchanov et al., 2019).

    Returns:
      Name of a group -> `[units]`. Scores of one letter are comparable between layers.

    Raises:
      InputError: the model has no unordered units of these letters.
    """
    tree.check(params)
    leaves = tree.flatten(tree.unstack(params))
    where = places(stats or {}, leaves)
    out = {}
    for name, group in _chosen(declared, params, letters).items():
        total = jnp.zeros(group.size, jnp.float32)
        for member in group.members:
            weight = decode(leaves[member.path], jnp.float32)
            if stats is None:
                value = weight**2
            else:
                found = stats_of(member.path, stats, where) or {}
                if "gradient" not in found:
                    continue  # a bias, of which no gradient is measured
                value = weight * found["gradient"]
            total = total + _sums(value, member, group.size)
        out[name] = jnp.sqrt(total) if stats is None else jnp.abs(total)
    return out


def choose_units(
    scores: Mapping[str, Float[Array, " units"]], fraction: float, together: bool = False
) -> dict[str, jax.Array]:
    """Choose the units that stay, for `axes.select` or `mask_units`.

    Args:
      scores: from `score_units`.
      fraction: of the units that go.
      together: compare the units of all groups; each keeps at least one.

    Returns:
      Name of a group -> the indices of the units that stay, in order.

    >>> found = choose_units({"F": jnp.array([3.0, 1.0, 2.0, 4.0])}, 0.5)
    >>> found["F"].tolist()
    [0, 3]
    """
    if not 0 <= fraction < 1:
        raise InputError(f"fraction: {fraction} given; allowed: at least 0 and below 1")
    count = lambda n: max(1, n - round(n * fraction))
    if together:
        best = {name: largest(score, 1) for name, score in scores.items()}
        kept = sum(score.size for score in scores.values())
        every = [jnp.where(best[name], jnp.inf, score) for name, score in scores.items()]
        marks = largest(jnp.concatenate(every), max(count(kept), len(scores)))
        ends = [sum(score.size for score in every[: i + 1]) for i in range(len(every))]
        found = dict(zip(scores, jnp.split(marks, ends[:-1]), strict=True))
    else:
        found = {name: largest(score, count(score.size)) for name, score in scores.items()}
    return {name: jnp.flatnonzero(keep).astype(jnp.int32) for name, keep in found.items()}


def mask_units(declared: Axes, params: tree.Params, units: Units) -> tree.Params:
    """Set all units of groups to zero but those that are given, in every leaf that holds them.

    Args:
      declared: `model.axes`.
      params: plain arrays.
      units: name of a group -> the indices of the units that stay.

    Raises:
      InputError: the name of no group.
    """
    tree.check(params)
    known = axes.groups(declared, params)
    leaves = tree.flatten(tree.unstack(params))
    for name, index in units.items():
        if name not in known:
            raise unknown("units", name, known)
        group = known[name]
        keep = jnp.zeros(group.size, bool).at[index].set(True)
        for member in group.members:
            leaves[member.path] = _masked(leaves[member.path], member, keep)
    return tree.stack(tree.unflatten(leaves))


def _chosen(declared: Axes, params: tree.Params, letters: str) -> dict[str, Group]:
    every = axes.groups(declared, params)
    known = {name: group for name, group in every.items() if not group.ordered}
    found = {name: group for name, group in known.items() if group.letter[0] in letters}
    if not found:
        there = sorted({group.letter[0] for group in known.values()})
        raise InputError(f"letters: {letters!r} given; allowed: some of {', '.join(there)}")
    return found


def _cut(array: Any, member: Member, size: int) -> tuple[Any, Any, Any]:
    """Cut an array at a member's part; the part is `[..., before, size, after, ...]`."""
    stop = member.start + member.before * size * member.after
    first, own, rest = jnp.split(array, [member.start, stop], axis=member.axis)
    lead = array.shape[: member.axis]
    tail = array.shape[member.axis + 1 :]
    return first, own.reshape(*lead, member.before, size, member.after, *tail), rest


def _sums(array: Any, member: Member, size: int) -> Float[Array, " units"]:
    own = _cut(array, member, size)[1]
    at = member.axis + 1
    return jnp.sum(own, axis=tuple(i for i in range(own.ndim) if i != at))


def _masked(array: Any, member: Member, keep: Bool[Array, " units"]) -> Any:
    first, own, rest = _cut(array, member, keep.size)
    at = member.axis + 1
    wide = keep.reshape((1,) * at + (-1,) + (1,) * (own.ndim - at - 1))
    own = jnp.where(wide, own, jnp.zeros((), own.dtype))
    own = own.reshape(*array.shape[: member.axis], -1, *array.shape[member.axis + 1 :])
    return jnp.concatenate([first, own, rest], axis=member.axis)
