"""Values of images against Pillow, colorsys and scipy."""

from __future__ import annotations

import colorsys
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage

from jaxmodel.data import augment
from jaxmodel.data.augment import pixels as values
from jaxmodel.data.augment.colour import Brightness, ColourJitter, Hue, Posterize, Solarize

RNG = np.random.default_rng(0)
ROWS = 4
Y = 21
X = 26


def photos(channels: int) -> np.ndarray:
    """Bytes whose levels are used unevenly; the last row has one level in one channel, two in the
    others.
    """
    photos = (
        255 * RNG.beta(2, 5, (ROWS, Y, X, channels)) * RNG.uniform(0.4, 1, (ROWS, 1, 1, channels))
    ).astype(np.uint8)
    photos[-1] = np.where(RNG.random((Y, X, channels)) < 0.3, 90, 40)
    photos[-1, ..., 0] = 90
    return photos


def by_pillow(photos: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    images = [Image.fromarray(p if p.shape[-1] == 3 else p[..., 0]) for p in photos]
    return np.stack(
        [np.asarray(change(image)).reshape(photos.shape[1:]) for image in images]
    ).astype(np.float64)


def rows(value: float) -> jax.Array:
    return jnp.full(ROWS, value, jnp.float32)


@functools.cache
def compiled(name: str) -> Callable[..., jax.Array]:
    return jax.jit(getattr(values, name))


def changed(made: augment.Augmentation, pixels: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(made)(jax.random.key(0), {"pixels": pixels})["pixels"], np.float64)


EXACT: list[tuple[str, tuple[float, ...], Callable[[Any], Any]]] = [
    ("invert", (), ImageOps.invert),
    ("equalize", (), ImageOps.equalize),
    *[
        ("posterize", (bits,), lambda image, bits=bits: ImageOps.posterize(image, bits))
        for bits in (1, 3, 5, 8)
    ],
    *[
        ("solarize", (t / 255,), lambda image, t=t: ImageOps.solarize(image, t))
        for t in (0, 60, 255, 256)
    ],
]
CLOSE: list[tuple[str, tuple[float, ...], Callable[[Any], Any]]] = [
    ("autocontrast", (), ImageOps.autocontrast),
    *[
        (ours, (factor,), lambda image, theirs=theirs, factor=factor: theirs(image).enhance(factor))
        for factor in (0.1, 0.7, 1.9)
        for ours, theirs in [
            ("brightness", ImageEnhance.Brightness),
            ("contrast", ImageEnhance.Contrast),
            ("saturation", ImageEnhance.Color),
            ("sharpness", ImageEnhance.Sharpness),
        ]
    ],
]


@pytest.mark.parametrize("channels", [1, 3])
def test_equal_to_pillow(channels: int) -> None:
    bytes_ = photos(channels)
    pixels = jnp.asarray(bytes_ / np.float32(255))
    for name, setting, change in EXACT:
        out = np.asarray(compiled(name)(pixels, *map(rows, setting)), np.float64) * 255
        np.testing.assert_allclose(
            out, by_pillow(bytes_, change), atol=1e-3, err_msg=f"{name} {setting}"
        )
    for name, setting, change in CLOSE:  # Pillow rounds to bytes, in between too
        out = np.asarray(compiled(name)(pixels, *map(rows, setting)), np.float64) * 255
        wanted = by_pillow(bytes_, change)
        np.testing.assert_allclose(out, wanted, atol=2.0, err_msg=f"{name} {setting}")
        assert abs(out - wanted).mean() < 0.9, (name, setting)


def test_equalize_is_pillows_down_to_its_odd_cases() -> None:
    for seed in range(6):  # few pixels, few levels, one level
        rng = np.random.default_rng(seed)
        bytes_ = rng.choice(rng.integers(0, 256, 1 + 3 * seed), (ROWS, Y, X, 1)).astype(np.uint8)
        out = compiled("equalize")(jnp.asarray(bytes_ / np.float32(255)))
        np.testing.assert_allclose(out * 255, by_pillow(bytes_, ImageOps.equalize), atol=1e-3)


def test_hue_equals_colorsys() -> None:
    pixels = RNG.random((2, 6, 7, 3), np.float32)
    pixels[0, 0] = 0.5  # grey
    pixels[0, 1, :3] = np.eye(3)
    pixels[0, 2, :3] = 1 - np.eye(3)
    for turn in (0.1, -0.3, 0.5):
        out = np.asarray(compiled("hue")(jnp.asarray(pixels), jnp.full(2, turn, jnp.float32)))
        for index in np.ndindex(2, 6, 7):
            h, s, v = colorsys.rgb_to_hsv(*map(float, pixels[index]))
            np.testing.assert_allclose(
                out[index], colorsys.hsv_to_rgb((h + turn) % 1, s, v), atol=1e-5
            )


def test_blur_equals_scipy() -> None:
    pixels = RNG.random((3, 8, 11, 3), np.float32)
    sigmas = [0.4, 1.0, 2.0]
    out = jax.jit(values.blur, static_argnums=2)(pixels, jnp.array(sigmas), 6)
    for i, sigma in enumerate(sigmas):
        wanted = ndimage.gaussian_filter(pixels[i], sigma, axes=(0, 1), radius=6, mode="reflect")
        np.testing.assert_allclose(out[i], wanted, atol=1e-5)
    wide = jax.jit(values.blur, static_argnums=2)(
        pixels, jnp.full(3, 4.0), 12
    )  # wider than the image
    np.testing.assert_allclose(
        wide[0], ndimage.gaussian_filter(pixels[0], 4, axes=(0, 1), radius=12), atol=1e-5
    )


def test_members_draw_their_settings_for_each_row() -> None:
    grey = np.full((400, 1, 1, 3), 0.5, np.float32)
    factor = changed(Brightness(0.4), grey)[:, 0, 0, 0] / 0.5
    assert 0.6 < factor.min() < 0.62 and 1.38 < factor.max() < 1.4 and abs(factor.mean() - 1) < 0.04
    red = np.tile(np.array([1, 0, 0], np.float32), (400, 1, 1, 1))
    out = changed(Hue(0.1), red)[:, 0, 0]
    turn = out[:, 1] / 6 - out[:, 2] / 6
    assert -0.1 < turn.min() < -0.095 and 0.095 < turn.max() < 0.1 and abs(turn.mean()) < 0.01
    jitter = changed(ColourJitter(0, 0, 0, 0.1), red)
    assert len(np.unique(jitter[:, 0, 0, 1])) > 150
    made = changed(Posterize(3), grey)
    assert np.allclose(made, 128 / 255)
    assert np.allclose(changed(Solarize(0.5), grey * 1.2), 0.4)


def test_noise() -> None:
    pixels = np.full((50, 8, 9, 3), 0.5, np.float32)
    out = changed(augment.Noise(0.1), pixels) - 0.5
    assert abs(out.mean()) < 0.004 and abs(out.std() - 0.1) < 0.003
    assert len(np.unique(out)) > 0.95 * out.size


def test_cutout() -> None:
    rows = 3000
    size = 4
    white = np.ones((rows, 9, 10, 3), np.float32)
    out = changed(augment.Cutout(size, fill=0.25), white)
    assert set(np.unique(out)) == {0.25, 1} and (out == out[..., :1]).all()
    hole = out[..., 0] == 0.25
    across = hole.any(1)
    down = hole.any(2)
    # a rectangle of four by four, but where it left the image: then of two or three
    assert (hole == down[:, :, None] & across[:, None, :]).all()
    for found, length in ((down, 9), (across, 10)):
        assert set(found.sum(1)) == {2, 3, 4}
        centre = np.where(found[:, 0], found.sum(1) - size // 2, found.argmax(1) + size // 2)
        counts = np.bincount(centre, minlength=length)
        assert (
            len(counts) == length and abs(counts - rows / length).max() < 4 * (rows / length) ** 0.5
        )
