"""Weights stored in 16 bits train by float32 copies of them, their masters (Micikevicius et al.,
2018), in the optimiser's state.

A weight in bfloat16 has 8 bits: a step of less than a 512th of it is rounded away, and with a usual
rate nearly all are. So the optimiser sees masters and gradients in float32, and a weight is its
master, rounded. This costs 4 bytes a weight, and moments in float32 (8 bytes for Adam). With
weights in float32, or compressed ones, nothing is added.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmodel import tree
from jaxmodel.leaves import Compressed


class Masters(NamedTuple):
    """The state of an optimiser with masters.

    Attributes:
      inner: the optimiser's own.
      params: of the leaves in 16 bits, the float32 ones.
    """

    inner: Any
    params: tree.Params


def with_masters(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The optimiser with masters for what is stored in 16 bits; as it is where nothing is.

    Updates are then float32, and such that parameters and updates add up, rounded, to the masters,
    rounded. A weight that somebody has changed since the last update is its own master again.

    >>> sgd = with_masters(optax.sgd(1.0))
    >>> params = {"w": jnp.ones(1, jnp.bfloat16)}
    >>> state = sgd.init(params)
    >>> for _ in range(8):  # of which each is too small for bfloat16
    ...     updates, state = sgd.update({"w": jnp.full(1, -(2.0**-10), jnp.bfloat16)}, state, params)
    ...     params = {"w": (params["w"].astype(jnp.float32) + updates["w"]).astype(jnp.bfloat16)}
    >>> float(params["w"][0])
    1.0078125
    """
    run = optax.with_extra_args_support(optimizer).update

    def init(params: Any) -> Any:
        narrow = {
            path: _wide(leaf) for path, leaf in tree.flatten(params).items() if _is_narrow(leaf)
        }
        if not narrow:
            return optimizer.init(params)
        return Masters(optimizer.init(_put(params, narrow)), tree.unflatten(narrow))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if not isinstance(state, Masters):
            return run(updates, state, params, **extra)
        now = tree.flatten(params)
        masters = tree.flatten(state.params)
        masters = {
            path: jnp.where(a.astype(now[path].dtype) == now[path], a, _wide(now[path]))
            for path, a in masters.items()
        }
        grads = {path: _wide(g) for path, g in tree.flatten(updates).items() if path in masters}
        changes: Any
        changes, inner = run(_put(updates, grads), state.inner, _put(params, masters), **extra)
        moved = tree.flatten(changes)
        new = {path: a + _wide(moved[path]) for path, a in masters.items()}
        steps = {
            path: _wide(a.astype(now[path].dtype)) - _wide(now[path]) for path, a in new.items()
        }
        return _put(changes, steps), Masters(inner, tree.unflatten(new))

    return optax.GradientTransformationExtraArgs(init, update)


def _is_narrow(leaf: Any) -> bool:
    return (
        not isinstance(leaf, Compressed)
        and jnp.issubdtype(leaf.dtype, jnp.floating)
        and jnp.dtype(leaf.dtype).itemsize < 4
    )


def _wide(a: Any) -> jax.Array:
    return a.astype(jnp.float32)


def _put(params: tree.Params, leaves: dict[str, Any]) -> tree.Params:
    return tree.map_leaves(lambda path, leaf: leaves.get(path, leaf), params)
