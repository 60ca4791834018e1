"""Float32 master copies of 16-bit weights, in the optimiser's state (Micikevicius et al., 2018).

A weight in bfloat16 has 8 bits of precision: an update of less than a 512th of it is rounded away,
and at usual learning rates nearly all are. So the optimiser sees masters and gradients in float32,
and a weight is its rounded master. This costs 4 bytes per weight, and moments in float32 (8 bytes
for Adam). For weights in float32, or compressed ones, nothing is added.
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
      inner: the state of the optimiser itself.
      params: the float32 masters of the leaves in 16 bits.
    """

    inner: Any
    params: tree.Params


def with_masters(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Return the optimiser with masters for leaves in 16 bits.

    If there are none, it is unchanged. Otherwise updates are float32, such that the rounded sum of
    parameters and updates is the rounded master. A weight that was changed since the last update
    becomes its own master again.

    >>> sgd = with_masters(optax.sgd(1.0))
    >>> params = {"w": jnp.ones(1, jnp.bfloat16)}
    >>> state = sgd.init(params)
    >>> for _ in range(8):  # each is too small for bfloat16
    ...     grads = {"w": jnp.full(1, -(2.0**-10), jnp.bfloat16)}
    ...     updates, state = sgd.update(grads, state, params)
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
