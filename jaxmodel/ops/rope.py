"""Rotary position embedding (Su et al., 2021), in the half-split order of HF weights."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rope_tables(positions: Int[Array, "B T"], width: int, base: float) -> tuple[Float[Array, "B T f"], Float[Array, "B T f"]]:
    """Sine and cosine of every position, to be computed once a step and used in all layers.

    Args:
      positions: of the tokens.
      width: of a head; there are `f = width / 2` frequencies `base^(-2i / width)`.
      base: of the frequencies.
    """
    frequency = base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle = positions[..., None].astype(jnp.float32) * frequency[None, None]
    return jnp.sin(angle), jnp.cos(angle)


def rotate(x: Float[Array, "B T N h"], tables: tuple[Array, Array]) -> Float[Array, "B T N h"]:
    """Rotate queries or keys by their positions' tables."""
    sin, cos = (table[:, :, None, :] for table in tables)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
