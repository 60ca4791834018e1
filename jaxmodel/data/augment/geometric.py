"""Flips, affine maps and crops of images.

Lengths are shares of the image's sides, so that settings fit every resolution.
"""

from __future__ import annotations

import abc
import math
import operator
from dataclasses import dataclass, field
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodel.data.augment.affine import affine, linear_map
from jaxmodel.data.augment.base import (
    ImageAugmentation,
    Keys,
    uniforms,
)
from jaxmodel.schema import Index, Range, Share

type _Area = Annotated[float, Range(0.001, 1)]
type _Aspect = Annotated[float, Range(0.01, 100)]


@dataclass(frozen=True)
class HorizontalFlip(ImageAugmentation):
    """A flip of left and right."""

    probability: Share = 0.5

    def change(self, keys: Keys, pixels: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        """Change all images; see the class."""
        return pixels[:, :, ::-1]


@dataclass(frozen=True)
class VerticalFlip(ImageAugmentation):
    """A flip of top and bottom."""

    probability: Share = 0.5

    def change(self, keys: Keys, pixels: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        """Change all images; see the class."""
        return pixels[:, ::-1]


@dataclass(frozen=True)
class _Mapped(ImageAugmentation):
    """Base of augmentations that sample each image once through an affine map.

    The numbers for the maps are drawn uniformly from -1 to 1.

    Attributes:
      fill: the value outside of the image.
    """

    fill: Share = field(default=0.0, kw_only=True)

    @abc.abstractmethod
    def maps(self, drawn: Float[Array, "B 6"], sides: Float[Array, "1 2"]) -> tuple[Array, Array]:
        """Return the matrices and shifts that `affine` takes."""

    def change(self, keys: Keys, pixels: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        """Change all images; see the class."""
        sides = jnp.array(pixels.shape[1:3], jnp.float32)[None]
        return affine(pixels, *self.maps(2 * uniforms(keys, 6) - 1, sides), self.fill)


@dataclass(frozen=True)
class Affine(_Mapped):
    """Rotation, scale, shear and translation in one sampling.

    It blurs less and costs less than one after another.

    Attributes:
      degrees: the angle is drawn from -degrees to degrees.
      scale: the factor is drawn from 1 / (1 + scale) to 1 + scale, evenly in its logarithm.
      shear: pixels along one side for each along the other, drawn from -shear to shear for both.
      translate: the shift is drawn from -translate to translate of each side.
      fill: the value outside of the image.
      probability: probability that a row is changed.
    """

    degrees: Annotated[float, Range(0, 180)] = 0.0
    scale: Annotated[float, Range(0, 9)] = 0.0
    shear: Annotated[float, Range(0, 0.9)] = 0.0
    translate: Share = 0.0

    def maps(self, drawn: Float[Array, "B 6"], sides: Float[Array, "1 2"]) -> tuple[Array, Array]:
        """Return the matrices and shifts; see the class."""
        scale = jnp.exp(math.log1p(self.scale) * drawn[:, 1])
        matrix = linear_map(
            self.degrees * drawn[:, 0], scale, self.shear * drawn[:, 2], self.shear * drawn[:, 3]
        )
        return matrix, self.translate * drawn[:, 4:] * sides


@dataclass(frozen=True)
class Rotate(_Mapped):
    """Rotation about the centre by an angle drawn from -degrees to degrees; see `Affine`.

    Attributes:
      degrees: the largest angle.
    """

    degrees: Annotated[float, Range(0, 180)] = 15.0

    def maps(self, drawn: Float[Array, "B 6"], sides: Float[Array, "1 2"]) -> tuple[Array, Array]:
        """Return the matrices and shifts; see the class."""
        return Affine(degrees=self.degrees).maps(drawn, sides)


@dataclass(frozen=True)
class Scale(_Mapped):
    """Scaling about the centre by a factor from 1 / (1 + amount) to 1 + amount; see `Affine`.

    Attributes:
      amount: the largest factor, less 1.
    """

    amount: Annotated[float, Range(0, 9)] = 0.2

    def maps(self, drawn: Float[Array, "B 6"], sides: Float[Array, "1 2"]) -> tuple[Array, Array]:
        """Return the matrices and shifts; see the class."""
        return Affine(scale=self.amount).maps(drawn, sides)


@dataclass(frozen=True)
class Shear(_Mapped):
    """Shear along both sides by amounts drawn from -amount to amount; see `Affine`.

    The unit is pixels for each pixel of the other side.

    Attributes:
      amount: the largest shear along each side.
    """

    amount: Annotated[float, Range(0, 0.9)] = 0.2

    def maps(self, drawn: Float[Array, "B 6"], sides: Float[Array, "1 2"]) -> tuple[Array, Array]:
        """Return the matrices and shifts; see the class."""
        return Affine(shear=self.amount).maps(drawn, sides)


@dataclass(frozen=True)
class Translate(_Mapped):
    """Translation by up to `share` of each side; see `Affine`.

    Attributes:
      share: the largest shift, as a share of the side.
    """

    share: Share = 0.1

    def maps(self, drawn: Float[Array, "B 6"], sides: Float[Array, "1 2"]) -> tuple[Array, Array]:
        """Return the matrices and shifts; see the class."""
        return Affine(translate=self.share).maps(drawn, sides)


@dataclass(frozen=True)
class RandomCrop(ImageAugmentation):
    """A crop of the image's own size from the image with a frame around it (He et al., 2016).

    Attributes:
      padding: width of the frame, in pixels.
      fill: value of the frame.
      probability: probability that a row is changed.
    """

    padding: Index = 4
    fill: Share = field(default=0.0, kw_only=True)

    def change(self, keys: Keys, pixels: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        """Change all images; see the class."""
        pad = self.padding
        padded = jnp.pad(
            pixels, ((0, 0), (pad, pad), (pad, pad), (0, 0)), constant_values=self.fill
        )
        start = jnp.floor(uniforms(keys, 2) * (2 * pad + 1)).astype(jnp.int32)
        cut = lambda image, at: jax.lax.dynamic_slice(
            image, (at[0], at[1], jnp.int32(0)), pixels.shape[1:]
        )
        return jax.vmap(cut)(padded, start)


@dataclass(frozen=True)
class RandomResizedCrop(ImageAugmentation):
    """A crop of the image, resized to the image's size (Szegedy et al., 2015).

    Attributes:
      area: the crop's share of the image, drawn uniformly.
      aspect: width over height of the crop, relative to the image, drawn uniformly in its
        logarithm; the crop is cut if it would be larger than the image.
      probability: probability that a row is changed.
    """

    area: tuple[_Area, _Area] = (0.08, 1.0)
    aspect: tuple[_Aspect, _Aspect] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("area", "aspect"):
            if operator.gt(*getattr(self, name)):
                self.refuse(name, "the smaller number first")

    def change(self, keys: Keys, pixels: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        """Change all images; see the class."""
        drawn = uniforms(keys, 4)
        between = lambda low, high, u: low + (high - low) * u
        area = between(self.area[0], self.area[1], drawn[:, 0])
        aspect = jnp.exp(between(math.log(self.aspect[0]), math.log(self.aspect[1]), drawn[:, 1]))
        size = jnp.minimum(jnp.sqrt(jnp.stack([area / aspect, area * aspect], -1)), 1.0)
        sides = jnp.array(pixels.shape[1:3], jnp.float32)[None]
        shift = (drawn[:, 2:] - 0.5) * (1 - size) * sides
        return affine(
            pixels, size[:, :, None] * jnp.eye(2, dtype=jnp.float32)[None], shift, fill=None
        )
