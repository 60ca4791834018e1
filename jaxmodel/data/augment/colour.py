"""Augmentations of colour:

`pixels.py` with settings drawn for each row. One channel has no hue and no saturation to change.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodel.data.augment import pixels as values
from jaxmodel.data.augment.base import ImageAugmentation, Keys, Number, number, uniforms, whole


@dataclass(frozen=True)
class Brightness(ImageAugmentation):
    """Times a factor drawn from 1 - strength to 1 + strength."""

    strength: Number = field(default=0.4, metadata=number(0.0, 1.0))

    def change(self, keys: Keys, pixels: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        return values.brightness(pixels, _factor(self.strength, uniforms(keys)))


@dataclass(frozen=True)
class Contrast(ImageAugmentation):
    """The distance from the mean grey times a factor drawn from 1 - strength to 1 + strength."""

    strength: Number = field(default=0.4, metadata=number(0.0, 1.0))

    def change(self, keys: Keys, pixels: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        return values.contrast(pixels, _factor(self.strength, uniforms(keys)))


@dataclass(frozen=True)
class Saturation(ImageAugmentation):
    """The distance from grey times a factor drawn from 1 - strength to 1 + strength."""

    strength: Number = field(default=0.4, metadata=number(0.0, 1.0))

    def change(self, keys: Keys, pixels: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        return values.saturation(pixels, _factor(self.strength, uniforms(keys)))


@dataclass(frozen=True)
class Hue(ImageAugmentation):
    """The hue moved by -turn to turn of the circle."""

    turn: Number = field(default=0.1, metadata=number(0.0, 0.5))

    def change(self, keys: Keys, pixels: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        return values.hue(pixels, self.turn * (2 * uniforms(keys) - 1))


@dataclass(frozen=True)
class ColourJitter(ImageAugmentation):
    """Brightness, contrast, saturation and hue, in this order, each by a draw of its own (Chen et
    al., 2020).

    Attributes:
      brightness: see `Brightness`.
      contrast: see `Contrast`.
      saturation: see `Saturation`.
      hue: see `Hue`.
      probability: with which each row is changed.
    """

    brightness: Number = field(default=0.4, metadata=number(0.0, 1.0))
    contrast: Number = field(default=0.4, metadata=number(0.0, 1.0))
    saturation: Number = field(default=0.4, metadata=number(0.0, 1.0))
    hue: Number = field(default=0.1, metadata=number(0.0, 0.5))

    def change(self, keys: Keys, pixels: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        drawn = uniforms(keys, 4)
        pixels = values.brightness(pixels, _factor(self.brightness, drawn[:, 0]))
        pixels = values.contrast(pixels, _factor(self.contrast, drawn[:, 1]))
        pixels = values.saturation(pixels, _factor(self.saturation, drawn[:, 2]))
        return values.hue(pixels, self.hue * (2 * drawn[:, 3] - 1))


@dataclass(frozen=True)
class Greyscale(ImageAugmentation):
    """Every channel the luma of all."""

    probability: Number = field(default=0.2, metadata=number(0.0, 1.0))

    def change(self, keys: Keys, pixels: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        return jnp.broadcast_to(values.grey(pixels), pixels.shape)


@dataclass(frozen=True)
class Sharpness(ImageAugmentation):
    """The distance from the smoothed image times a factor drawn from 1 - strength to 1 + strength."""

    strength: Number = field(default=0.9, metadata=number(0.0, 1.0))

    def change(self, keys: Keys, pixels: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        return values.sharpness(pixels, _factor(self.strength, uniforms(keys)))


@dataclass(frozen=True)
class Posterize(ImageAugmentation):
    """As many of the eight bits of a value as `bits` says."""

    bits: int = field(default=4, metadata=whole(1, 8))

    def change(self, keys: Keys, pixels: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        return values.posterize(pixels, jnp.full(len(pixels), self.bits, jnp.float32))


@dataclass(frozen=True)
class Solarize(ImageAugmentation):
    """Values that reach the threshold are inverted; above 1, none is."""

    threshold: Number = field(default=0.5, metadata=number(0.0, 2.0))

    def change(self, keys: Keys, pixels: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        return values.solarize(pixels, jnp.full(len(pixels), self.threshold, jnp.float32))


@dataclass(frozen=True)
class Equalize(ImageAugmentation):
    """The histogram of each channel made flat."""

    probability: Number = field(default=1.0, metadata=number(0.0, 1.0))

    def change(self, keys: Keys, pixels: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        return values.equalize(pixels)


@dataclass(frozen=True)
class Autocontrast(ImageAugmentation):
    """Each channel stretched to reach 0 and 1."""

    probability: Number = field(default=1.0, metadata=number(0.0, 1.0))

    def change(self, keys: Keys, pixels: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        return values.autocontrast(pixels)


@dataclass(frozen=True)
class Invert(ImageAugmentation):
    """Negatives."""

    probability: Number = field(default=1.0, metadata=number(0.0, 1.0))

    def change(self, keys: Keys, pixels: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        return values.invert(pixels)


def _factor(strength: float, drawn: Float[Array, "B"]) -> Float[Array, "B"]:
    return 1 + strength * (2 * drawn - 1)
