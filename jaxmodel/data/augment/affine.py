"""Affine maps of images, one map for each row, with bilinear sampling."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodel.data.augment.base import computed_once


def linear_map(
    degrees: Float[Array, "B"],
    scale: Float[Array, "B"],
    shear_y: Float[Array, "B"],
    shear_x: Float[Array, "B"],
) -> Float[Array, "B 2 2"]:
    """Return the maps of (y, x) from the result to the image: `A = R(degrees) S / scale`.

    Args:
      degrees: angle of the rotation, counter-clockwise as displayed.
      scale: above 1 enlarges.
      shear_y: pixels along Y for each pixel along X.
      shear_x: pixels along X for each pixel along Y.
    """
    angle = jnp.deg2rad(degrees)
    cos = jnp.cos(angle)
    sin = jnp.sin(angle)
    one = jnp.ones_like(angle)
    turn = jnp.stack([jnp.stack([cos, sin], -1), jnp.stack([-sin, cos], -1)], -2)
    shear = jnp.stack([jnp.stack([one, shear_y], -1), jnp.stack([shear_x, one], -1)], -2)
    # not `matmul`, which on an accelerator would round the coordinates to bfloat16
    return jnp.sum(turn[:, :, :, None] * shear[:, None, :, :], axis=2) / scale[:, None, None]


def affine(
    pixels: Float[Array, "B Y X C"],
    matrix: Float[Array, "B 2 2"],
    shift: Float[Array, "B 2"],
    fill: float | None = 0.0,
) -> Float[Array, "B Y X C"]:
    """Sample images: pixel o of the result is the image at `matrix o + shift`.

    Both positions are counted from the centre of the image.

    Args:
      pixels: the images.
      matrix: the linear part, for (y, x).
      shift: (y, x), in pixels.
      fill: the value outside of the image; None for that of the nearest pixel.
    """
    rows, columns = pixels.shape[1:3]
    middle_y = (rows - 1) / 2
    middle_x = (columns - 1) / 2
    y = (jnp.arange(rows, dtype=jnp.float32) - middle_y)[None, :, None]
    x = (jnp.arange(columns, dtype=jnp.float32) - middle_x)[None, None, :]
    entry = lambda values: values[:, None, None]
    at_y = entry(matrix[:, 0, 0]) * y + entry(matrix[:, 0, 1]) * x + entry(shift[:, 0]) + middle_y
    at_x = entry(matrix[:, 1, 0]) * y + entry(matrix[:, 1, 1]) * x + entry(shift[:, 1]) + middle_x
    return _sample(pixels, at_y, at_x, fill)


def _sample(
    pixels: Float[Array, "B Y X C"],
    y: Float[Array, "B Y X"],
    x: Float[Array, "B Y X"],
    fill: float | None,
) -> Float[Array, "B Y X C"]:
    rows, columns, channels = pixels.shape[1:]
    if fill is None:
        y = jnp.clip(y, 0, rows - 1)
        x = jnp.clip(x, 0, columns - 1)
    # A frame of one pixel holds the value outside, so that no tap needs a mask.
    padded = computed_once(
        jnp.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=fill or 0.0)
    )
    y = jnp.clip(y + 1, 0, rows + 1)
    x = jnp.clip(x + 1, 0, columns + 1)
    top = jnp.clip(jnp.floor(y), 0, rows)
    left = jnp.clip(jnp.floor(x), 0, columns)
    v = (y - top)[..., None]
    u = (x - left)[..., None]
    place = (top.astype(jnp.int32) * (columns + 2) + left.astype(jnp.int32)).reshape(
        len(pixels), -1
    )
    flat = padded.reshape(len(pixels), -1, channels)
    take = jax.vmap(lambda image, at: image.at[at].get(mode="promise_in_bounds"))
    tap = lambda offset: take(flat, place + jnp.int32(offset)).reshape(pixels.shape)
    # which stays between them, however it is rounded
    between = lambda a, b, share: a + share * (b - a)
    upper = between(tap(0), tap(1), u)
    lower = between(tap(columns + 2), tap(columns + 3), u)
    return between(upper, lower, v)
