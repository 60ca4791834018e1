"""The gradients of a step, from the whole batch or accumulated over micro-batches.

A *gradient function* is `run(trains, batch, rng) -> ((value, metrics), grads)`, as
`jax.value_and_grad` makes it from a loss of the trained part. For another kind of gradient (at a
perturbed point, from a pipeline), make such a function from the loss.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmodel import ops, tree
from jaxmodel.errors import InputError, at_least
from jaxmodel.leaves import Compressed
from jaxmodel.ops.probe import GRADIENT
from jaxmodel.rng import fold

type Found = tuple[jax.Array, dict[str, jax.Array]]
"""The value of a loss, a scalar, and its metrics."""
type Objective = Callable[[tree.Params, Mapping[str, Any], jax.Array], Found]
"""`objective(trains, batch, rng) -> (value, metrics)`."""
type GradientFn = Callable[[tree.Params, Mapping[str, Any], jax.Array], tuple[Found, tree.Params]]
"""`run(trains, batch, rng) -> ((value, metrics), grads)`."""


def value_and_grad(objective: Objective, dtype: Any = jnp.bfloat16) -> GradientFn:
    """Return the plain gradient function of an objective.

    The gradient of a compressed leaf that trains is that of the array it stands for. It is taken by
    a probe (see `ops.Probe`), so that this array never exists as a whole.

    Args:
      objective: see `Objective`.
      dtype: the dtype of the gradients of compressed leaves; those of other leaves keep theirs.
    """

    def run(trains: tree.Params, *args: Any) -> Any:
        leaves = tree.flatten(trains)
        arrays = {
            path: jnp.zeros(leaf.shape, dtype) if isinstance(leaf, Compressed) else leaf
            for path, leaf in leaves.items()
        }

        def of(arrays: dict[str, Any]) -> Any:
            probed = {
                path: ops.Probe(leaf, {GRADIENT: arrays[path]})
                if isinstance(leaf, Compressed)
                else arrays[path]
                for path, leaf in leaves.items()
            }
            return objective(tree.unflatten(probed), *args)

        found, grads = jax.value_and_grad(of, has_aux=True)(arrays)
        return found, tree.unflatten(grads)

    def either(trains: tree.Params, *args: Any) -> Any:
        is_compressed = lambda node: isinstance(node, Compressed)
        compressed = any(map(is_compressed, jax.tree.leaves(trains, is_leaf=is_compressed)))
        return (run if compressed else plain)(trains, *args)

    plain = jax.value_and_grad(objective, has_aux=True)
    return either


def accumulated(run: GradientFn, parts: int) -> GradientFn:
    """Accumulate the gradient over `parts` micro-batches in a scan.

    `g = sum_i w_i g_i / sum_i w_i`, where w_i is the `weight` of micro-batch i. This equals the
    gradient of the whole batch for every loss that is a mean over its weight. It needs the memory
    of one micro-batch and of a second set of gradients. Micro-batch i has the rows i, i + parts, i
    + 2 parts, ..., so that on a mesh each device keeps its own rows.

    Args:
      run: a gradient function whose metrics have `weight`.
      parts: the number of micro-batches; 1 changes nothing.

    Raises:
      InputError: `parts` is below 1 or, when called, does not divide the batch.
    """
    at_least("accumulate", parts)
    if parts == 1:
        return run

    def cut(a: Any) -> jax.Array:
        if a.shape[0] % parts:
            raise InputError(
                f"accumulate: {parts} micro-batches do not divide a batch of {a.shape[0]} rows"
            )
        return jnp.moveaxis(jnp.asarray(a).reshape(a.shape[0] // parts, parts, *a.shape[1:]), 1, 0)

    def whole(trains: Any, batch: Mapping[str, Any], rng: jax.Array) -> Any:
        pieces = jax.tree.map(cut, dict(batch))
        base = fold(rng, "micro-batch")
        keys = jax.vmap(functools.partial(jax.random.fold_in, base))(jnp.arange(parts))

        def weighted(piece: Any, key: jax.Array) -> tuple[Any, jax.Array]:
            (value, metrics), grads = run(trains, piece, key)
            weight = metrics["weight"].astype(jnp.float32)
            others = {name: metric for name, metric in metrics.items() if name != "weight"}
            return jax.tree.map(
                lambda a: a.astype(jnp.float32) * weight, ((value, others), grads)
            ), weight

        def body(total: Any, xs: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, weighted(*xs)), None

        shapes = jax.eval_shape(weighted, jax.tree.map(lambda a: a[0], pieces), keys[0])
        zeros = optax.tree.zeros_like(shapes)
        dtypes = jax.eval_shape(run, trains, jax.tree.map(lambda a: a[0], pieces), keys[0])[1]
        (((value, metrics), grads), weight), _ = jax.lax.scan(body, zeros, (pieces, keys))
        share = 1 / jnp.maximum(weight, jnp.finfo(jnp.float32).tiny)
        (value, metrics), grads = jax.tree.map(lambda a: a * share, ((value, metrics), grads))
        return (value, {**metrics, "weight": weight}), optax.tree.cast_like(grads, dtypes)

    return whole
