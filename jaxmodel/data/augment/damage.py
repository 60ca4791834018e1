"""Augmentations that remove information: noise, blur, a missing square."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodel.data.augment import pixels as values
from jaxmodel.data.augment.base import ImageAugmentation, Keys, uniforms
from jaxmodel.schema import Index, Range, Share


@dataclass(frozen=True)
class Noise(ImageAugmentation):
    """Normal noise, drawn for each value; the result is clipped to 0 to 1.

    Attributes:
      deviation: standard deviation of the noise.
      probability: probability that a row is changed.
    """

    deviation: Annotated[float, Range(0, 10)] = 0.1

    def change(self, keys: Keys, pixels: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        """Change all images; see the class."""
        noise = jax.vmap(lambda key: jax.random.normal(key, pixels.shape[1:]))(keys)
        return jnp.clip(pixels + self.deviation * noise, 0, 1)


@dataclass(frozen=True)
class Blur(ImageAugmentation):
    """A Gaussian blur whose standard deviation is drawn uniformly up to `sigma` pixels.

    Attributes:
      sigma: the greatest standard deviation, in pixels.
      probability: probability that a row is changed.
    """

    sigma: Annotated[float, Range(0, 100)] = 1.0

    def change(self, keys: Keys, pixels: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        """Change all images; see the class."""
        return values.blur(pixels, self.sigma * uniforms(keys), radius=math.ceil(3 * self.sigma))


@dataclass(frozen=True)
class Cutout(ImageAugmentation):
    """A square of one value around a uniformly drawn pixel (DeVries & Taylor, 2017).

    Part of the square may lie outside of the image.

    Attributes:
      size: side of the square, in pixels.
      fill: the value.
      probability: probability that a row is changed.
    """

    size: Index = 8
    fill: Share = field(default=0.0, kw_only=True)

    def change(self, keys: Keys, pixels: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        """Change all images; see the class."""
        sides = jnp.array(pixels.shape[1:3], jnp.float32)[None]
        start = jnp.floor(uniforms(keys, 2) * sides).astype(jnp.int32) - self.size // 2
        return jnp.where(inside(pixels, start, start + self.size), self.fill, pixels)


def inside(pixels: Float[Array, "B Y X C"], start: Array, stop: Array) -> Array:
    """Mark the pixels `[B, Y, X, 1]` in boxes `[B, 2]` (y, x) from `start` to before `stop`."""

    def along(axis: int) -> Array:
        place = jnp.arange(pixels.shape[1 + axis], dtype=jnp.int32)[None]
        return (place >= start[:, axis, None]) & (place < stop[:, axis, None])

    return (along(0)[:, :, None] & along(1)[:, None, :])[..., None]
