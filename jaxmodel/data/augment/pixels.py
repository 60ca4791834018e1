"""Functions of pixel values: arrays in, arrays out, with a setting `[B]` for each row.

Images are `[B, Y, X, C]` from 0 to 1 with one channel or three (red, green, blue), and stay in that
range. The definitions are Pillow's, so that published settings keep their meaning. If a definition
needs bytes, values are rounded to 256 levels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodel.data.augment.base import computed_once, per_row
from jaxmodel.errors import InputError

type Pixels = Float[Array, "B Y X C"]
type Setting = Float[Array, "B"]


def brightness(pixels: Pixels, factor: Setting) -> Pixels:
    """Compute `factor x`; 1 changes nothing."""
    return _blend(jnp.zeros_like(pixels), pixels, factor)


def contrast(pixels: Pixels, factor: Setting) -> Pixels:
    """Compute `m + factor (x - m)` with m the mean of the grey image; 1 changes nothing."""
    return _blend(grey(jnp.mean(pixels, axis=(1, 2), keepdims=True)), pixels, factor)


def saturation(pixels: Pixels, factor: Setting) -> Pixels:
    """Compute `g + factor (x - g)` with g the grey image; 1 changes nothing.

    Images of one channel do not change.
    """
    return _blend(grey(pixels), pixels, factor)


def sharpness(pixels: Pixels, factor: Setting) -> Pixels:
    """Compute `s + factor (x - s)` with s the smoothed image; 1 changes nothing.

    Smoothing is over 3 x 3 pixels and leaves out the border.
    """
    rows, columns = pixels.shape[1:3]
    pixels = computed_once(pixels)
    ring = jnp.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)))
    down = ring[:, :-2] + ring[:, 1:-1] + ring[:, 2:]
    box = down[:, :, :-2] + down[:, :, 1:-1] + down[:, :, 2:]
    y = jnp.arange(rows)[:, None]
    x = jnp.arange(columns)[None, :]
    within = (y > 0) & (y < rows - 1) & (x > 0) & (x < columns - 1)
    return _blend(
        jnp.where(within[None, :, :, None], (box + 4 * pixels) / 13, pixels), pixels, factor
    )


def hue(pixels: Pixels, turn: Setting) -> Pixels:
    """Rotate the hue by `turn` of the circle, and keep saturation and brightness (HSV).

    Images of one channel do not change.
    """
    if _channels(pixels) == 1:
        return pixels
    red = pixels[..., 0]
    green = pixels[..., 1]
    blue = pixels[..., 2]
    value = jnp.max(pixels, axis=-1)
    chroma = value - jnp.min(pixels, axis=-1)
    safe = jnp.where(chroma > 0, chroma, 1.0)
    sixth = jnp.where(
        value == red,
        (green - blue) / safe,
        jnp.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixth = sixth + 6 * turn[:, None, None]
    made = []
    for n in (5, 3, 1):
        k = jnp.mod(n + sixth, 6)
        made.append(value - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0, 1))
    # images that are not turned stay bit for bit as they are
    return jnp.where(per_row(turn) == 0, pixels, jnp.clip(jnp.stack(made, axis=-1), 0, 1))


def grey(pixels: Pixels) -> Float[Array, "B Y X 1"]:
    """Compute the luma of ITU-R 601: `0.299 red + 0.587 green + 0.114 blue`.

    Images of one channel do not change.

    Raises:
      InputError: neither one channel nor three.
    """
    if _channels(pixels) == 1:
        return pixels
    return 0.299 * pixels[..., :1] + 0.587 * pixels[..., 1:2] + 0.114 * pixels[..., 2:]


def invert(pixels: Pixels) -> Pixels:
    """Compute `1 - x`."""
    return 1 - pixels


def solarize(pixels: Pixels, threshold: Setting) -> Pixels:
    """Compute `1 - x` where x reaches the threshold; a threshold above 1 changes nothing."""
    return jnp.where(pixels < per_row(threshold), pixels, 1 - pixels)


def posterize(pixels: Pixels, bits: Setting) -> Pixels:
    """Keep the highest `bits` of the eight bits of a value; 8 and more change nothing."""
    step = per_row(jnp.exp2(8 - bits))
    return jnp.where(step > 1, jnp.floor(jnp.round(pixels * 255) / step) * step / 255, pixels)


def autocontrast(pixels: Pixels) -> Pixels:
    """Compute `(x - min) / (max - min)` of each channel; a constant channel does not change."""
    low = jnp.min(pixels, axis=(1, 2), keepdims=True)
    high = jnp.max(pixels, axis=(1, 2), keepdims=True)
    span = high - low
    return jnp.where(span > 0, (pixels - low) / jnp.where(span > 0, span, 1.0), pixels)


def equalize(pixels: Pixels) -> Pixels:
    """Map each level of a channel to the share of pixels below it, which flattens the histogram.

    `level i -> (s // 2 + #(pixels below i)) // s` of 255 with `s = #(pixels below the highest
    level) // 255`. If s is 0, the channel does not change.
    """
    levels = jnp.round(pixels * 255).astype(jnp.int32).reshape(len(pixels), -1, pixels.shape[-1])
    channel = jnp.broadcast_to(jnp.arange(pixels.shape[-1])[None], levels.shape[1:])

    def one(levels: Array) -> Array:
        counts = (
            jnp.zeros((256, levels.shape[-1]), jnp.int32)
            .at[levels, channel]
            .add(1, mode="promise_in_bounds")
        )
        below = jnp.cumsum(counts, axis=0) - counts
        step = jnp.max(below, axis=0, keepdims=True, where=counts > 0, initial=0) // 255
        table = (step // 2 + below) // jnp.maximum(step, 1)
        table = jnp.where(step > 0, jnp.minimum(table, 255).astype(jnp.float32) / 255, -1.0)
        return table.at[levels, channel].get(mode="promise_in_bounds")

    made = jax.vmap(one)(levels).reshape(pixels.shape)
    return jnp.where(made < 0, pixels, made)


def blur(pixels: Pixels, sigma: Setting, radius: int) -> Pixels:
    """Blur with a Gaussian of standard deviation `sigma` pixels, cut off at `radius`.

    Images are mirrored at their borders. A sigma of 0 changes nothing.
    """
    taps = jnp.arange(-radius, radius + 1, dtype=jnp.float32)[None, :]
    width = sigma[:, None]
    weights = jnp.exp(-0.5 * (taps / jnp.where(width > 0, width, 1.0)) ** 2)
    weights = jnp.where(width > 0, weights, (taps == 0).astype(jnp.float32))
    weights = weights / jnp.sum(weights, axis=1, keepdims=True)
    for axis in (1, 2):
        padding = [(radius, radius) if a == axis else (0, 0) for a in range(4)]
        padded = computed_once(jnp.pad(pixels, padding, mode="symmetric"))
        length = pixels.shape[axis]
        pixels = sum(
            (
                jax.lax.slice_in_dim(padded, i, i + length, axis=axis) * per_row(weights[:, i])
                for i in range(2 * radius + 1)
            ),
            start=jnp.zeros_like(pixels),
        )
    return jnp.clip(pixels, 0, 1)


def _blend(other: Array, pixels: Pixels, factor: Setting) -> Pixels:
    """Compute `other + factor (x - other)`, written so that a factor of 1 is exact."""
    return jnp.clip(pixels + (1 - per_row(factor)) * (other - pixels), 0, 1)


def _channels(pixels: Pixels) -> int:
    if pixels.shape[-1] not in (1, 3):
        raise InputError(f"batch: pixels have {pixels.shape[-1]} channels; allowed: 1 or 3")
    return pixels.shape[-1]
