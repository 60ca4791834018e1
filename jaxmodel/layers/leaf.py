"""How a Linen module reads a leaf that may be compressed."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp


def leaf(
    module: nn.Module, name: str, initializer: nn.initializers.Initializer, shape: tuple[int, ...]
) -> Any:
    """The leaf of this name, as it stands; created as a float32 array by the initialiser if there
    is none yet.

    `self.param` would insist on the initialiser's shape, but a leaf may be compressed, narrower
    after shrinking, or a `Probe`.
    """
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, initializer, shape, jnp.float32)
