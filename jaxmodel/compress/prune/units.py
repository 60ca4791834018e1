"""Pruning of whole units in all leaves that hold them: neurons, heads, experts, channels.

Which axes of which leaves are the same units is what `axes.groups` says of a model. Here units get
a score, the highest are chosen, and the others are set to zero where they stand. A unit that is
zero everywhere does nothing, and an expert whose row of the router is zero is never chosen, so a
model masked so computes what the one computes from which `axes.select` has removed them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxmodel import axes, tree
from jaxmodel.axes import Axes, Group, Member
from jaxmodel.compress.observe import Stats
from jaxmodel.compress.stats import places, statistic, stats_of
from jaxmodel.errors import InputError, one_of, unknown
from jaxmodel.leaves import decode
from jaxmodel.leaves.largest import largest

type Units = Mapping[str, jax.Array]


def score_units(
    declared: Axes,
    params: tree.Params,
    letters: str = "F",
    by: Literal["magnitude", "activity", "gradient"] = "magnitude",
    stats: Stats | None = None,
) -> dict[str, Float[Array, " units"]]:
    """Score the units of each group by all leaves that hold them.

    Args:
      declared: `model.axes`.
      params: of the model, plain or compressed.
      letters: of the groups to score: `F` hidden units, `K` groups of heads with their queries, `E`
        experts.
      by: "magnitude", the sum of the squares of a unit's weights, in each leaf relative to their
        mean over the units (DepGraph: Fang et al., 2023); "activity", the same of what the leaves
        that read the unit make of it (`|x|^2 |w|^2`, Wanda's measure), with `square` of the inputs;
        or "gradient", the size of the sum of `w dL/dw`, what the loss loses with the unit to first
        order (Molchanov et al., 2019), with the `gradient` of `observe_gradients`.
      stats: for activity and gradient.

    Returns:
      Name of a group -> `[units]`. Scores of one letter are comparable between layers.

    Raises:
      InputError: the model has no such units of which some may go, statistics are missing, or an
        unknown score.
    """
    tree.check(params)
    one_of("by", by, ("magnitude", "activity", "gradient"))
    known = axes.assign(declared, params)
    leaves = tree.flatten(tree.unstack(params))
    where = places(stats or {}, leaves)
    out = {}
    for name, group in unit_groups(declared, params, letters).items():
        total = jnp.zeros(group.size, jnp.float32)
        for member in group.members:
            path = member.path
            if known[path].role == "measured" or (by == "activity" and not reads(known, member)):
                continue
            value = decode(leaves[path], jnp.float32)
            if by == "gradient":
                found = stats_of(path, stats or {}, where) or {}
                if "gradient" in found:  # of a bias none is measured
                    total = total + _sums(value * found["gradient"], member, group.size)
                continue
            value = value**2
            if by == "activity":
                value = value * statistic("square", path, stats or {}, where)[..., None, :]
            own = _sums(value, member, group.size)
            total = total + own / jnp.maximum(jnp.mean(own), 1e-30)
        out[name] = jnp.abs(total)
    return out


def choose_units(
    scores: Mapping[str, Float[Array, " units"]],
    fraction: float,
    together: bool = False,
    *,
    multiple: int = 1,
    least: int = 1,
) -> dict[str, jax.Array]:
    """Choose the units that stay, for `axes.select` or `mask_units`.

    Args:
      scores: from `score_units`.
      fraction: of the units that go.
      together: compare the units of all groups.
      multiple: of which the number that stays in a group is one.
      least: how many stay in each group at least.

    Returns:
      Name of a group -> the indices of the units that stay, in order.

    >>> found = choose_units({"F": jnp.array([3.0, 1.0, 2.0, 4.0])}, 0.5)
    >>> found["F"].tolist()
    [0, 3]
    """
    if not 0 <= fraction < 1:
        raise InputError(f"fraction: {fraction} given; allowed: at least 0 and below 1")

    def whole(number: float, size: int) -> int:
        number = max(1, round(number / multiple)) * multiple
        return min(max(number, least), size)

    numbers = {name: (1 - fraction) * score.size for name, score in scores.items()}
    if together:
        sure = [jnp.where(largest(one, least), jnp.inf, one) for one in scores.values()]
        every = jnp.concatenate(sure)
        marks = largest(every, max(round((1 - fraction) * every.size), least * len(scores)))
        ends = list(itertools.accumulate(score.size for score in scores.values()))
        parts = jnp.split(marks, ends[:-1])
        numbers = {name: float(jnp.sum(part)) for name, part in zip(scores, parts, strict=True)}
    return {
        name: jnp.flatnonzero(largest(score, whole(numbers[name], score.size))).astype(jnp.int32)
        for name, score in scores.items()
    }


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


def unit_groups(declared: Axes, params: tree.Params, letters: str) -> dict[str, Group]:
    """Return the groups of units of some letters by name, of which any may go.

    Raises:
      InputError: the model has no such units of which some may go.
    """
    every = axes.groups(declared, params)
    known = {name: group for name, group in every.items() if not group.fixed}
    found = {name: group for name, group in known.items() if group.letter[0] in letters}
    if not found:
        there = sorted({group.letter[0] for group in known.values()})
        needed = any(group.letter[0] in letters for group in every.values())
        raise InputError(
            f"letters: {letters!r} given{', of which this model needs all units' * needed}; "
            f"allowed: some of {', '.join(there) or 'none'}"
        )
    return found


def reads(known: Mapping[str, axes.Letters], member: Member) -> bool:
    """Return whether a leaf reads the units, or is a stack of one matrix for each of them."""
    letters = known[member.path]
    last = member.axis == len(letters.axes) - 1
    role = letters.role
    return (role in ("matrix", "head", "experts") and last) or (
        role == "experts" and member.axis == 0
    )


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
