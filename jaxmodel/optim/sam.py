"""`sam`: gradients at the worst point nearby (sharpness-aware minimisation)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmodel.errors import ABOVE_ZERO, InputError, within
from jaxmodel.leaves import Compressed


def sam(run: Callable[..., Any], radius: float = 0.05) -> Callable[..., Any]:
    """Return a gradient function for sharpness-aware minimisation (Foret et al., 2021).

    It takes the gradient at `p + radius g / |g|`.

    That is the point nearby where the loss is worst. A step costs twice as much. If a step takes
    its batch in parts, each part has its own worst point, which the authors found to work even
    better.

    Args:
      run: `run(params, ...) -> ((value, metrics), grads)`, as
        `jax.value_and_grad(..., has_aux=True)` makes it.
      radius: the length of the step uphill, over all leaves together, above 0.

    Returns:
      A function of the same kind. Value and metrics are those at `params`.

    >>> run = jax.value_and_grad(lambda p: (jnp.sum(p["w"] ** 2), {}), has_aux=True)
    >>> (value, _), grads = sam(run, radius=0.5)({"w": jnp.array([3.0, 4.0])})
    >>> float(value), [round(float(g), 4) for g in grads["w"]]  # 2 (w + 0.5 w / 5)
    (25.0, [6.6, 8.8])
    """
    within("radius", radius, ABOVE_ZERO)

    def worst(params: Any, *args: Any) -> Any:
        is_compressed = lambda node: isinstance(node, Compressed)
        if any(map(is_compressed, jax.tree.leaves(params, is_leaf=is_compressed))):
            raise InputError(
                "trainable: compressed leaves given, which SAM cannot perturb; allowed: arrays"
            )
        (value, metrics), grads = run(params, *args)
        wide = optax.tree.cast(grads, jnp.float32)
        scale = radius / jnp.maximum(optax.tree.norm(wide), 1e-12)
        near = jax.tree.map(
            lambda p, g: (p.astype(jnp.float32) + scale * g).astype(p.dtype), params, wide
        )
        return (value, metrics), run(near, *args)[1]

    return worst
