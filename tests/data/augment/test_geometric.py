"""Maps of images against scipy.ndimage, crops against windows cut by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jaxmodel.data import augment
from jaxmodel.data.augment.affine import affine, linear_map
from jaxmodel.data.augment.geometric import (
    HorizontalFlip,
    RandomResizedCrop,
    Translate,
    VerticalFlip,
)


def changed(made: augment.Augmentation, pixels: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(made)(jax.random.key(0), {"pixels": pixels})["pixels"])


def reference(
    image: np.ndarray, matrix: np.ndarray, shift: np.ndarray, fill: float | None
) -> np.ndarray:
    middle = (np.array(image.shape[:2]) - 1) / 2
    how = {"mode": "nearest"} if fill is None else {"mode": "grid-constant", "cval": fill}
    layers = [
        ndimage.affine_transform(
            image[..., c].astype(np.float64),
            matrix,
            middle + shift - matrix @ middle,
            order=1,
            **how,
        )
        for c in range(image.shape[-1])
    ]
    return np.stack(layers, axis=-1)


@pytest.mark.parametrize("fill", [0.0, 0.7, None])
def test_affine_equals_scipy(fill: float | None) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.random((12, 9, 7, 3), np.float32)
    matrix = (np.eye(2) + rng.normal(0, 0.4, (12, 2, 2))).astype(np.float32)
    shift = rng.normal(0, 3, (12, 2)).astype(np.float32)
    out = jax.jit(affine, static_argnames="fill")(pixels, matrix, shift, fill=fill)
    for i in range(12):
        np.testing.assert_allclose(
            out[i], reference(pixels[i], matrix[i], shift[i], fill), atol=2e-5
        )


def test_the_map_turns_shears_and_enlarges() -> None:
    rng = np.random.default_rng(1)
    image = jnp.asarray(rng.random((1, 8, 8, 1), np.float32))
    still = jnp.zeros((1, 2))
    zero = jnp.zeros(1)
    one = jnp.ones(1)
    turned = affine(image, linear_map(jnp.array([90.0]), one, zero, zero), still)
    np.testing.assert_allclose(turned[0], np.rot90(image[0]), atol=1e-5)
    for degrees in (30.0, -75.0):
        turned = affine(image, linear_map(jnp.array([degrees]), one, zero, zero), still)
        wanted = ndimage.rotate(
            image[0, ..., 0], degrees, reshape=False, order=1, mode="grid-constant"
        )
        np.testing.assert_allclose(turned[0, ..., 0], wanted, atol=1e-5)
    doubled = affine(image, linear_map(zero, jnp.array([2.0]), zero, zero), still)
    np.testing.assert_allclose(
        doubled[0], reference(np.asarray(image[0]), np.eye(2) / 2, np.zeros(2), 0.0), atol=1e-6
    )
    # matrices of (y, x), so x reads what lies `0.3 y` further
    slanted = linear_map(zero, one, jnp.array([0.2]), jnp.array([0.3]))
    np.testing.assert_allclose(slanted[0], [[1, 0.2], [0.3, 1]], atol=1e-7)
    both = linear_map(jnp.array([20.0]), jnp.array([1.5]), jnp.array([0.2]), jnp.array([0.3]))
    turn = linear_map(jnp.array([20.0]), one, zero, zero)
    np.testing.assert_allclose(both[0], turn[0] @ slanted[0] / 1.5, atol=1e-6)


def test_members_draw_within_their_settings() -> None:
    sides = jnp.array([[10.0, 20.0]])
    ends = jnp.array([[1.0] * 6, [-1.0] * 6])
    angle = np.deg2rad(30)
    for text, matrix, shift in [
        ("rotate(30)", [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]], [0, 0]),
        ("scale(0.25)", np.eye(2) / 1.25, [0, 0]),
        ("shear(0.3)", [[1, 0.3], [0.3, 1]], [0, 0]),
        ("translate(0.2)", np.eye(2), [2, 4]),
    ]:
        (made,) = augment.parse(text).links
        found, moved = made.maps(ends, sides)
        np.testing.assert_allclose(found[0], matrix, atol=1e-6)
        np.testing.assert_allclose(moved[0], shift, atol=1e-6)
        np.testing.assert_allclose(moved[1], -np.array(shift), atol=1e-6)
        if text.startswith("scale"):
            np.testing.assert_allclose(found[1], np.eye(2) * 1.25, atol=1e-6)
    # and evenly: the centre of mass of a dot says where it went
    pixels = np.zeros((500, 21, 21, 1), np.float32)
    pixels[:, 10, 10] = 1
    out = changed(Translate(0.2), pixels)[..., 0]
    place = np.arange(21) - 10.0
    for moved in ((out * place[:, None]).sum((1, 2)), (out * place).sum((1, 2))):
        assert (
            moved.min() < -3.9
            and moved.max() > 3.9
            and abs(moved).max() < 4.21
            and abs(moved.mean()) < 0.4
        )
        assert abs(np.abs(moved).mean() - 2.1) < 0.2


def test_all_in_one_sampling() -> None:
    rng = np.random.default_rng(2)
    pixels = rng.random((4, 9, 7, 1), np.float32)
    for text, alone in [
        ("affine(30)", "rotate(30)"),
        ("affine(0, 0.3)", "scale(0.3)"),
        ("affine(0, 0, 0.3)", "shear(0.3)"),
    ]:
        out, wanted = (changed(augment.parse(t), pixels) for t in (text, alone))
        assert np.array_equal(out, wanted) and not np.array_equal(out, pixels)


def test_flips() -> None:
    pixels = np.random.default_rng(3).random((300, 3, 4, 1), np.float32)
    for made, flipped in [
        (HorizontalFlip(), pixels[:, :, ::-1]),
        (VerticalFlip(0.5), pixels[:, ::-1]),
    ]:
        out = changed(made, pixels)
        turned = (out == flipped).all((1, 2, 3))
        assert (turned ^ (out == pixels).all((1, 2, 3))).all() and abs(turned.mean() - 0.5) < 0.12


def test_random_crop_cuts_every_window() -> None:
    image = np.random.default_rng(4).random((5, 6, 3), np.float32)
    out = changed(augment.RandomCrop(2, fill=0.5), np.tile(image, (500, 1, 1, 1)))
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), constant_values=0.5)
    windows = [padded[y : y + 5, x : x + 6] for y in range(5) for x in range(5)]
    counts = [int((out == w).all((1, 2, 3)).sum()) for w in windows]
    assert sum(counts) == 500 and min(counts) > 4


def test_random_resized_crop_takes_what_it_says() -> None:
    rows = 400
    sides = (20, 30)
    y, x = np.meshgrid(np.arange(20), np.arange(30), indexing="ij")
    ramps = np.tile(np.stack([y / 20, x / 30, x * 0], axis=-1).astype(np.float32), (rows, 1, 1, 1))
    made = RandomResizedCrop((0.1, 0.4), (0.5, 2.0))
    out = changed(made, ramps).astype(np.float64)
    # an image of its own coordinates tells where each part began and how long it was
    size = np.stack(
        [
            (out[:, 12, 0, 0] - out[:, 7, 0, 0]) / 5 * 20,
            (out[:, 0, 17, 1] - out[:, 0, 12, 1]) / 5 * 30,
        ],
        axis=-1,
    )
    middle = (
        np.stack([out[:, 9:11, 0, 0].mean(1) * 20, out[:, 0, 14:16, 1].mean(1) * 30], axis=-1) + 0.5
    )
    start = middle - size * np.array(sides) / 2
    area = size.prod(1)
    aspect = size[:, 1] / size[:, 0]
    assert 0.1 < area.min() < 0.11 and 0.38 < area.max() < 0.4 and abs(area.mean() - 0.25) < 0.02
    assert (
        0.5 < aspect.min() < 0.53 and 1.9 < aspect.max() < 2.0 and abs(np.log(aspect).mean()) < 0.1
    )
    assert start.min() > -1e-3 and (start + size * np.array(sides) < np.array(sides) + 1e-3).all()
    free = start / (np.array(sides) * (1 - size))
    assert free.min() < 0.02 and free.max() > 0.98 and (abs(free.mean(0) - 0.5) < 0.05).all()
