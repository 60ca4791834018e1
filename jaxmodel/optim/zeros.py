"""Training with weights that are zero and stay so: masks in the optimiser's state.

Each function here wraps an optimiser, any optax transformation, and is the outermost of all. The
optimiser sees no gradient of a weight that is not kept, and the weight's update is what makes it
zero, so zeros are exact after any number of steps. Layers of a segment, and experts, have masks of
their own, as if they were not stacked. A moving average of the weights has the zeros that were
there from its start.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmodel import rng, tree
from jaxmodel.axes import Roles, guessed
from jaxmodel.errors import InputError, at_least, one_of
from jaxmodel.leaves import Compressed
from jaxmodel.leaves.largest import largest

type Leaves = dict[str, jax.Array]
type Fractions = float | tree.Rules


class Kept(NamedTuple):
    """The state of an optimiser with masks.

    Attributes:
      inner: the state of the optimiser itself.
      count: the number of updates made.
      masks: of each pruned leaf, at its path: bool, true for the weights that are kept.
      movement: of each pruned leaf the sum of `-w dL/dw`, if the masks follow from it, else empty.
      pruned: beside it, the values that pruned weights had and that may come back.
    """

    inner: Any
    count: Any
    masks: tree.Params
    movement: tree.Params
    pruned: tree.Params


def kept(state: Any) -> Kept:
    """Find the masks in the state of an optimiser, or in a `TrainState`.

    Raises:
      InputError: there are none.
    """
    is_kept = lambda node: isinstance(node, Kept)
    found = [node for node in jax.tree.leaves(state, is_leaf=is_kept) if is_kept(node)]
    if not found:
        raise InputError("state: no masks in it; allowed: of optim.keep, prune_gradually or rewire")
    return found[0]


def keep(
    optimizer: optax.GradientTransformation,
    masks: tree.Params | None = None,
    *,
    roles: Roles = guessed,
) -> optax.GradientTransformationExtraArgs:
    """Keep the zeros of matrices exactly zero while the other weights train.

    Args:
      optimizer: the optimiser of the weights.
      masks: a tree with a bool array for each leaf whose mask is given; None for those weights of
        all matrices that are not zero when the run begins.
      roles: the role of each leaf, `axes.role_of(model.axes)`; by default guessed.

    >>> params = {"w": jnp.array([[0.0, 1.0], [2.0, 0.0]])}
    >>> sgd = keep(optax.sgd(0.5))
    >>> grads = {"w": jnp.ones((2, 2))}
    >>> updates, _ = sgd.update(grads, sgd.init(params), params)
    >>> optax.apply_updates(params, updates)["w"].tolist()
    [[0.0, 0.5], [1.5, 0.0]]
    """

    def begin(params: Any) -> Leaves:
        if masks is not None:
            return {path: jnp.asarray(mask, bool) for path, mask in tree.flatten(masks).items()}
        chosen = _fractions(0.0, params, roles)
        return {path: leaf != 0 for path, leaf in tree.flatten(params).items() if path in chosen}

    return _masked(optimizer, begin, lambda count, masks, moved, grads, params: masks)


def prune_gradually(
    optimizer: optax.GradientTransformation,
    fractions: Fractions,
    *,
    begin: int,
    end: int,
    every: int = 100,
    power: float = 3.0,
    by: Literal["magnitude", "movement"] = "magnitude",
    roles: Roles = guessed,
) -> optax.GradientTransformationExtraArgs:
    """Prune more and more weights in training, and keep what is pruned at zero.

    At the update t from `begin` to `end`, every so many, the fraction `1 - (1 - s)^power` of what
    is pruned in the end is pruned, with `s = (t - begin) / (end - begin)`: the schedule of Zhu and
    Gupta (2017), "AGP". `begin = end` prunes once.

    Args:
      optimizer: the optimiser of the weights.
      fractions: of the weights that are zero in the end: a number, for all matrices, or rules path
        -> number or None; see `densities`.
      begin: the first update that prunes, from 0.
      end: the last one.
      every: the number of updates from one to the next.
      power: 3 prunes fast at first; 1 evenly.
      by: "magnitude" prunes the smallest weights; "movement" those that training moves towards
        zero, by the sum of `-w dL/dw` so far (Sanh et al., 2020). There the sum of a pruned weight
        goes on with the value that it had, and with that it comes back when its sum is high enough
        at a later change; so the state has a copy of these values. By magnitude it stays pruned.
      roles: see `keep`.

    Raises:
      InputError: a number out of range, or rules that do not fit.

    >>> params = {"w": jnp.array([[0.1, -3.0, 0.2, 2.0]])}
    >>> sgd = prune_gradually(optax.sgd(0.0), 0.5, begin=0, end=0)
    >>> updates, _ = sgd.update({"w": jnp.ones((1, 4))}, sgd.init(params), params)
    >>> optax.apply_updates(params, updates)["w"].tolist()
    [[0.0, -3.0, 0.0, 2.0]]
    """
    at_least("begin", begin, 0)
    at_least("end", end, begin)
    at_least("every", every)
    one_of("by", by, ("magnitude", "movement"))
    all_of = functools.partial(_fractions, fractions, roles=roles)

    def revise(count: Any, masks: Leaves, moved: Leaves, grads: Leaves, params: Leaves) -> Leaves:
        due = (count >= begin) & (count <= end) & (((count - begin) % every == 0) | (count == end))
        part = jnp.clip((count - begin) / max(end - begin, 1), 0.0, 1.0) if end > begin else 1.0
        share = 1 - (1 - jnp.float32(part)) ** power
        goals = all_of(tree.unflatten(params))

        def pruned() -> Leaves:
            out = {}
            for path, mask in masks.items():
                size = moved[path] if by == "movement" else jnp.abs(params[path])
                goal = jnp.asarray(goals[path], jnp.float32) * share
                whole = math.prod(mask.shape[-2:])
                left = whole - jnp.round(whole * goal).astype(jnp.int32)
                free = mask if by == "magnitude" else jnp.ones_like(mask)
                out[path] = free & largest(jnp.where(free, size, -jnp.inf), left, axes=2)
            return out

        return jax.lax.cond(due, pruned, lambda: masks)

    ones = lambda params: {path: _ones(params, path) for path in all_of(params)}
    return _masked(optimizer, ones, revise, movement=by == "movement")


def rewire(
    optimizer: optax.GradientTransformation,
    fractions: Fractions,
    *,
    grow: Literal["gradient", "random"] = "gradient",
    every: int = 100,
    end: int = 2**31 - 1,
    drop: float = 0.3,
    seed: int = 0,
    roles: Roles = guessed,
) -> optax.GradientTransformationExtraArgs:
    """Train sparse from the start, with connections that move to where they are needed.

    The masks begin at random (the first update sets the other weights to zero). Every so many
    updates a share of each layer's connections, the smallest, is dropped, and as many are grown at
    zero: where the gradient is largest (RigL: Evci et al., 2020), or at random (SET: Mocanu et al.,
    2018). Their number never changes.

    Args:
      optimizer: the optimiser of the weights.
      fractions: of the weights that are zero: a number, for all matrices, or rules path -> number
        or None; see `densities`.
      grow: where connections grow: "gradient" or "random".
      every: the number of updates from one change of the masks to the next.
      end: from this update on the masks stay.
      drop: the share of the connections that moves at first; it falls to 0 at `end` like a cosine.
      seed: of the masks, and of what grows at random.
      roles: see `keep`.

    Raises:
      InputError: a number out of range, or rules that do not fit.

    >>> params = {"w": jnp.ones((4, 8))}
    >>> sparse = rewire(optax.sgd(0.1), 0.75)
    >>> int(jnp.sum(sparse.init(params).masks["w"]))
    8
    """
    at_least("every", every)
    one_of("grow", grow, ("gradient", "random"))
    if not 0 <= drop <= 1:
        raise InputError(f"drop: {drop} given; allowed: a number of 0 to 1")

    def begin(params: Any) -> Leaves:
        out = {}
        for path, goal in _fractions(fractions, params, roles=roles).items():
            shape = tree.flatten(params)[path].shape
            whole = math.prod(shape[-2:])
            left = whole - np.round(whole * goal).astype(np.int32)
            key = rng.fold(jax.random.key(seed), "first masks")
            out[path] = largest(_uniform(key, path, shape), jnp.asarray(left), axes=2)
        return out

    def revise(count: Any, masks: Leaves, moved: Leaves, grads: Leaves, params: Leaves) -> Leaves:
        due = (count > 0) & (count % every == 0) & (count < end)
        share = drop / 2 * (1 + jnp.cos(jnp.pi * count.astype(jnp.float32) / end))
        key = jax.random.fold_in(rng.fold(jax.random.key(seed), "grown masks"), count)

        def rewired() -> Leaves:
            out = {}
            for path, mask in masks.items():
                there = jnp.sum(mask, axis=(-2, -1), dtype=jnp.int32)
                less = jnp.round(share * there.astype(jnp.float32)).astype(jnp.int32)
                size = jnp.where(mask, jnp.abs(params[path]), -jnp.inf)
                stays = mask & largest(size, there - less, axes=2)
                wish = (
                    jnp.abs(grads[path]) if grow == "gradient" else _uniform(key, path, mask.shape)
                )
                out[path] = stays | largest(jnp.where(stays, -jnp.inf, wish), less, axes=2)
            return out

        return jax.lax.cond(due, rewired, lambda: masks)

    return _masked(optimizer, begin, revise)


def densities(
    params: tree.Params,
    fraction: float,
    kind: Literal["uniform", "erk"] = "erk",
    *,
    roles: Roles = guessed,
) -> tree.Rules:
    """Divide a total of zeros among the matrices.

    Args:
      params: of the model.
      fraction: of the weights of all matrices together that are to be zero.
      kind: "uniform" gives each matrix the same; "erk" keeps more of small and narrow matrices:
        what `[out, in]` keeps is proportional to `(out + in) / (out in)`, at most all (Erdos-Renyi
        kernels: Evci et al., 2020; a kernel of a convolution counts as the matrix of its storage).
      roles: see `keep`.

    Returns:
      Rules path -> fraction, and None for all that is no matrix.

    >>> layers = {"a": jnp.ones((4, 4)), "b": jnp.ones((16, 16))}
    >>> [(path, round(value, 3)) for path, value in densities(layers, 0.5)[:-1]]
    [('a', 0.0), ('b', 0.531)]
    """
    tree.check(params)
    one_of("kind", kind, ("uniform", "erk"))
    shapes = {
        layer: tree.layer_shape(path, leaf)
        for path, leaf in tree.flatten(params).items()
        for layer in tree.layer_paths(path)
    }
    chosen = {
        layer: shape
        for layer, shape in shapes.items()
        if _is_matrix(roles(layer, shape), shape) and math.prod(shape)
    }
    found = divide(chosen, dict.fromkeys(chosen, fraction), kind)
    return [*((re.escape(layer), value) for layer, value in found.items()), (".*", None)]


def divide(
    shapes: Mapping[str, tuple[int, ...]], fractions: Mapping[str, float], kind: str
) -> dict[str, float]:
    """Divide the zeros of some matrices among them anew; their number stays.

    Args:
      shapes: path -> `[..., out, in]`.
      fractions: path -> of the weights that are zero.
      kind: "uniform" or "erk"; see `densities`.
    """
    sizes = {path: math.prod(shape) for path, shape in shapes.items()}
    left = sum(sizes[path] * (1 - fraction) for path, fraction in fractions.items())
    if kind == "uniform":
        return dict.fromkeys(shapes, 1 - left / max(sum(sizes.values()), 1))
    weights = {path: sum(shape[-2:]) / math.prod(shape[-2:]) for path, shape in shapes.items()}
    free = set(shapes)
    while True:  # those that would keep more than all keep all, and the others share the rest
        rest = left - sum(size for path, size in sizes.items() if path not in free)
        factor = rest / max(sum(weights[path] * sizes[path] for path in free), 1e-30)
        full = {path for path in free if factor * weights[path] > 1}
        if not full:
            return {path: 1 - factor * weights[path] if path in free else 0.0 for path in shapes}
        free -= full


type _Revise = Callable[[jax.Array, Leaves, Leaves, Leaves, Leaves], Leaves]


def _masked(
    optimizer: optax.GradientTransformation,
    begin: Callable[[Any], Leaves],
    revise: _Revise,
    movement: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimiser with masks.

    Args:
      optimizer: the optimiser of the weights.
      begin: params -> the first masks.
      revise: (count, masks, movement, gradients, params) -> the masks from this update on.
      movement: whether the sum of `-w dL/dw` is kept.
    """
    run = optax.with_extra_args_support(optimizer).update

    def init(params: Any) -> Any:
        masks = begin(params)
        moved = {path: jnp.zeros(mask.shape, jnp.float32) for path, mask in masks.items()}
        leaves = tree.flatten(params)
        away = {path: jnp.zeros_like(leaves[path]) for path in masks}
        of_movement = (tree.unflatten(of if movement else {}) for of in (moved, away))
        zero = jnp.zeros((), jnp.int32)
        return Kept(optimizer.init(params), zero, tree.unflatten(masks), *of_movement)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if params is None:
            raise InputError(
                "params: none given; masks need them: optimizer.update(updates, state, params)"
            )
        old = tree.flatten(state.masks)
        now = {path: leaf for path, leaf in tree.flatten(params).items() if path in old}
        grads = {path: leaf for path, leaf in tree.flatten(updates).items() if path in old}
        moved = tree.flatten(state.movement)
        wide = lambda array: array.astype(jnp.float32)
        away = tree.flatten(state.pruned)
        values = {path: jnp.where(old[path], now[path], away[path]) for path in away}
        moved = {path: m - wide(values[path]) * wide(grads[path]) for path, m in moved.items()}
        new = revise(state.count, old, moved, grads, now)
        held = {path: jnp.where(new[path], g, jnp.zeros((), g.dtype)) for path, g in grads.items()}
        steps: Any
        steps, inner = run(_put(updates, held), state.inner, params, **extra)

        def exact(path: str, step: Any) -> Any:
            if path not in new:
                return step
            # what is not kept ends at zero whatever it was, what is new where it was or at zero
            zero = jnp.zeros((), now[path].dtype)
            end = jnp.where(new[path], values.get(path, zero), zero)
            return jnp.where(new[path] & old[path], step, (end - now[path]).astype(step.dtype))

        away = {path: jnp.where(new[path], 0, value) for path, value in values.items()}
        of_masks = map(tree.unflatten, (new, moved, away))
        return tree.map_leaves(exact, steps), Kept(inner, state.count + jnp.int32(1), *of_masks)

    return optax.GradientTransformationExtraArgs(init, update)


def _put(params: Any, leaves: Leaves) -> Any:
    return tree.map_leaves(lambda path, leaf: leaves.get(path, leaf), params)


def _is_matrix(role: str, shape: tuple[int, ...]) -> bool:
    return role in ("matrix", "experts") and len(shape) >= 2


def _fractions(fractions: Fractions, params: Any, roles: Roles) -> dict[str, np.ndarray]:
    """Return path -> the fraction of each matrix of a leaf, `[layers, experts]` as it has them."""
    leaves = tree.flatten(params)
    shapes = {
        layer: tree.layer_shape(path, leaf)
        for path, leaf in leaves.items()
        for layer in tree.layer_paths(path)
    }
    if isinstance(fractions, int | float):
        by_layer: Mapping[str, Any] = {
            layer: fractions if _is_matrix(roles(layer, shape), shape) else None
            for layer, shape in shapes.items()
        }
    else:
        by_layer = tree.assign(fractions, params)
    out = {}
    for path, leaf in leaves.items():
        found = [by_layer[layer] for layer in tree.layer_paths(path)]
        if all(value is None for value in found):
            continue
        for value in found:
            if value is not None and not (isinstance(value, int | float) and 0 <= value < 1):
                raise InputError(
                    f"fractions: {value!r} given for {path!r}; allowed: a number of at least 0 and "
                    "below 1, or None"
                )
        shape = tree.layer_shape(path, leaf)
        if isinstance(leaf, Compressed) or len(shape) < 2:
            raise InputError(
                f"fractions: a number given for {path!r} of shape {list(shape)}; allowed: plain "
                "matrices"
            )
        each = np.asarray([value or 0.0 for value in found])
        each = each if tree.is_stacked(path) else each[0]
        lead = leaf.shape[:-2]
        out[path] = np.broadcast_to(each.reshape(each.shape + (1,) * (len(lead) - each.ndim)), lead)
    return out


def _ones(params: Any, path: str) -> jax.Array:
    return jnp.ones(tree.flatten(params)[path].shape, bool)


def _uniform(key: jax.Array, path: str, shape: tuple[int, ...]) -> jax.Array:
    """Draw numbers for a leaf, the same however its layers are stacked."""
    stacked = tree.is_stacked(path)
    shape = shape[1:] if stacked else shape
    each = [jax.random.uniform(rng.fold(key, layer), shape) for layer in tree.layer_paths(path)]
    return jnp.stack(each) if stacked else each[0]
