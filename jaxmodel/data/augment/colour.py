"""Augmentations of colour: the functions of `pixels.py` with settings drawn for each row.

Images of one channel have no hue and no saturation to change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodel.data.augment import pixels as values
from jaxmodel.data.augment.base import ImageAugmentation, Keys, uniforms
from jaxmodel.schema import Range, Share


@dataclass(frozen=True)
class Brightness(ImageAugmentation):
    """Multiplication by a factor drawn from 1 - strength to 1 + strength.

    Attributes:
      strength: the largest distance of the factor from 1.
    """

    strength: Share = 0.4

    def change(self, keys: Keys, pixels: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        """Change all images; see the class."""
        return values.brightness(pixels, _factor(self.strength, uniforms(keys)))


@dataclass(frozen=True)
class Contrast(ImageAugmentation):
    """Scaling of the distance from the mean grey by a factor from 1 - strength to 1 + strength.

    Attributes:
      strength: the largest distance of the factor from 1.
    """

    strength: Share = 0.4

    def change(self, keys: Keys, pixels: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        """Change all images; see the class."""
        return values.contrast(pixels, _factor(self.strength, uniforms(keys)))


@dataclass(frozen=True)
class Saturation(ImageAugmentation):
    """Scaling of the distance from grey by a factor drawn from 1 - strength to 1 + strength.

    Attributes:
      strength: the largest distance of the factor from 1.
    """

    strength: Share = 0.4

    def change(self, keys: Keys, pixels: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        """Change all images; see the class."""
        return values.saturation(pixels, _factor(self.strength, uniforms(keys)))


@dataclass(frozen=True)
class Hue(ImageAugmentation):
    """Rotation of the hue by an amount drawn from -turn to turn, as a share of the circle.

    Attributes:
      turn: the largest turn, as a share of the circle.
    """

    turn: Annotated[float, Range(0, 0.5)] = 0.1

    def change(self, keys: Keys, pixels: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        """Change all images; see the class."""
        return values.hue(pixels, self.turn * (2 * uniforms(keys) - 1))


@dataclass(frozen=True)
class ColourJitter(ImageAugmentation):
    """Brightness, contrast, saturation and hue in this order, each drawn by itself.

    Source: Chen et al., 2020.

    Attributes:
      brightness: see `Brightness`.
      contrast: see `Contrast`.
      saturation: see `Saturation`.
      hue: see `Hue`.
      probability: probability that a row is changed.
    """

    brightness: Share = 0.4
    contrast: Share = 0.4
    saturation: Share = 0.4
    hue: Annotated[float, Range(0, 0.5)] = 0.1

    def change(self, keys: Keys, pixels: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        """Change all images; see the class."""
        drawn = uniforms(keys, 4)
        pixels = values.brightness(pixels, _factor(self.brightness, drawn[:, 0]))
        pixels = values.contrast(pixels, _factor(self.contrast, drawn[:, 1]))
        pixels = values.saturation(pixels, _factor(self.saturation, drawn[:, 2]))
        return values.hue(pixels, self.hue * (2 * drawn[:, 3] - 1))


@dataclass(frozen=True)
class Greyscale(ImageAugmentation):
    """Replacement of every channel by the luma."""

    probability: Share = 0.2

    def change(self, keys: Keys, pixels: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        """Change all images; see the class."""
        return jnp.broadcast_to(values.grey(pixels), pixels.shape)


@dataclass(frozen=True)
class Sharpness(ImageAugmentation):
    """Scaling of the distance from the smoothed image by a factor 1 - strength to 1 + strength.

    Attributes:
      strength: the largest distance of the factor from 1.
    """

    strength: Share = 0.9

    def change(self, keys: Keys, pixels: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        """Change all images; see the class."""
        return values.sharpness(pixels, _factor(self.strength, uniforms(keys)))


@dataclass(frozen=True)
class Posterize(ImageAugmentation):
    """Reduction of each value to its highest `bits` of eight bits.

    Attributes:
      bits: the number of bits that are kept.
    """

    bits: Annotated[int, Range(1, 8)] = 4

    def change(self, keys: Keys, pixels: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        """Change all images; see the class."""
        return values.posterize(pixels, jnp.full(len(pixels), self.bits, jnp.float32))


@dataclass(frozen=True)
class Solarize(ImageAugmentation):
    """Inversion of values that reach the threshold; above 1, of none.

    Attributes:
      threshold: the least value that is inverted.
    """

    threshold: Annotated[float, Range(0, 2)] = 0.5

    def change(self, keys: Keys, pixels: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        """Change all images; see the class."""
        return values.solarize(pixels, jnp.full(len(pixels), self.threshold, jnp.float32))


@dataclass(frozen=True)
class Equalize(ImageAugmentation):
    """Equalisation of the histogram of each channel."""

    probability: Share = 1.0

    def change(self, keys: Keys, pixels: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        """Change all images; see the class."""
        return values.equalize(pixels)


@dataclass(frozen=True)
class Autocontrast(ImageAugmentation):
    """Stretching of each channel to reach 0 and 1."""

    probability: Share = 1.0

    def change(self, keys: Keys, pixels: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        """Change all images; see the class."""
        return values.autocontrast(pixels)


@dataclass(frozen=True)
class Invert(ImageAugmentation):
    """Inversion of all values, a negative."""

    probability: Share = 1.0

    def change(self, keys: Keys, pixels: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        """Change all images; see the class."""
        return values.invert(pixels)


def _factor(strength: float, drawn: Float[Array, "B"]) -> Float[Array, "B"]:
    return 1 + strength * (2 * drawn - 1)
