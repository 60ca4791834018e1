"""Reading a leaf, which may be compressed, in a Linen module."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp


def leaf(
    module: nn.Module, name: str, initializer: nn.initializers.Initializer, shape: tuple[int, ...]
) -> Any:
    """Return the leaf of this name; create it as a float32 array if it does not exist.

    `self.param` would insist on the initialiser's shape, but a leaf may be compressed, narrower
    after shrinking, or a `Probe`.
    """
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, initializer, shape, jnp.float32)
