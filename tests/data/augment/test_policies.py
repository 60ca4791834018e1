"""RandAugment and AugMix: each operation is the one that it is named after, chosen evenly, mixed as
the formula says.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxmodel.data import augment
from jaxmodel.data.augment import pixels as values
from jaxmodel.data.augment.affine import affine, linear_map
from jaxmodel.data.augment.policies import MIXED, OPERATIONS, layer

B = 8
PIXELS = np.random.default_rng(0).beta(2, 3, (B, 18, 20, 3)).astype(np.float32)


def alone(name: str, level: float, sign: int) -> jax.Array:
    """The operation by itself, with the settings that the papers' code has."""
    x = jnp.asarray(PIXELS)
    rows = lambda value: jnp.full(B, value, jnp.float32)
    if name in ("brightness", "contrast", "saturation", "sharpness"):
        return getattr(values, name)(x, rows(1 + 0.9 * level * sign))
    if name in ("autocontrast", "equalize"):
        return getattr(values, name)(x)
    if name == "posterize":
        return values.posterize(x, rows(8 - round(4 * level)))
    if name == "solarize":
        return values.solarize(x, rows((1 - level) * 256 / 255))
    part = lambda wanted, value: rows(value * level * sign if name == wanted else 0)
    matrix = linear_map(part("rotate", 30), rows(1), part("shear_y", 0.3), part("shear_x", 0.3))
    shift = jnp.stack([part("translate_y", 0.25 * 18), part("translate_x", 0.25 * 20)], axis=-1)
    return affine(x, matrix, shift, 0.5)


def test_each_operation_is_what_it_is_named_after() -> None:
    run = jax.jit(lambda *args: layer(*args, 0.25, 0.5), static_argnums=1)
    wanted = jax.jit(alone, static_argnums=(0, 1, 2))
    for level, sign in ((0.0, 1), (0.6, 1), (0.6, -1)):
        for i, name in enumerate(OPERATIONS):
            out = run(PIXELS, OPERATIONS, *(jnp.full(B, v) for v in (i, float(sign), level)))
            if level == 0 and name not in ("autocontrast", "equalize"):
                assert np.array_equal(out, PIXELS), name
            else:
                np.testing.assert_allclose(
                    out, wanted(name, level, sign), atol=1e-6, err_msg=f"{name} {sign}"
                )


def test_operations_and_signs_are_drawn_evenly_for_each_row() -> None:
    rows = 1200
    pixels = np.tile(PIXELS[:1, :6, :6], (rows, 1, 1, 1))
    names = ("identity", "rotate", "brightness", "translate_x")
    made = augment.RandAugment(1, 10, names)
    out = np.asarray(jax.jit(made)(jax.random.key(0), {"pixels": pixels})["pixels"])
    _, counts = np.unique(out.reshape(rows, -1), axis=0, return_counts=True)
    assert sorted(counts / rows) == pytest.approx([1 / 8] * 6 + [1 / 4], abs=0.04)


def test_count_and_channels() -> None:
    grey = PIXELS[..., :1]
    colour_only = augment.RandAugment(2, 10, ("saturation",))
    assert np.array_equal(colour_only(jax.random.key(0), {"pixels": grey})["pixels"], grey)
    twice = augment.RandAugment(2, 10, ("solarize",))  # all is inverted twice
    np.testing.assert_allclose(
        twice(jax.random.key(0), {"pixels": PIXELS})["pixels"], PIXELS, atol=1e-6
    )
    assert "saturation" not in MIXED and set(MIXED) < set(OPERATIONS)


def test_augmix_is_a_mixture() -> None:
    rows = 400
    pixels = np.tile(PIXELS[:1, :5, :5] * np.float32(0.5), (rows, 1, 1, 1))
    # stretching twice is stretching once, so each chain ends there, and the weights add up to one
    made = augment.AugMix(operations=("autocontrast",), width=2, depth=2)
    out = np.asarray(jax.jit(made)(jax.random.key(0), {"pixels": pixels})["pixels"], np.float64)
    goal = np.asarray(values.autocontrast(jnp.asarray(pixels[:1])), np.float64)[0]
    share = ((out - pixels) * (goal - pixels[0])).sum((1, 2, 3)) / ((goal - pixels[0]) ** 2).sum()
    np.testing.assert_allclose(
        out, pixels + share[:, None, None, None] * (goal - pixels), atol=1e-5
    )
    assert stats.kstest(share, stats.uniform.cdf).pvalue > 0.01


def test_chains_of_augmix_have_every_length() -> None:
    rows = 600
    pixels = np.tile(PIXELS[:1, :5, :5] * np.float32(0.5), (rows, 1, 1, 1))
    for width, depth in ((1, 1), (1, 3), (3, 3)):
        made = augment.AugMix(3, width, depth, operations=("autocontrast", "identity"))
        out = np.asarray(jax.jit(made)(jax.random.key(0), {"pixels": pixels})["pixels"])
        # a chain of n changes nothing with probability 2^-n, and n is drawn evenly
        same = np.mean([0.5**n for n in range(1, depth + 1)])
        found = (abs(out - pixels) < 1e-7).all((1, 2, 3)).mean()
        assert abs(found - same**width) < 4 * (same**width / rows) ** 0.5, (width, depth)
        # each chain has the same share on average
        stretched = np.asarray(values.autocontrast(jnp.asarray(pixels[:1])))
        share = (out - pixels).sum() / rows / (stretched - pixels[:1]).sum()
        assert abs(share - 0.5 * (1 - same)) < 4 * 0.35 / rows**0.5, (width, depth)


def test_augmix_draws_magnitudes_up_to_its_severity() -> None:
    pixels = np.full((800, 1, 1, 1), 0.8, np.float32)  # solarized, to 0.2, by magnitudes above 2
    made = augment.AugMix(4, 1, 1, operations=("solarize",))
    out = np.asarray(jax.jit(made)(jax.random.key(0), {"pixels": pixels})["pixels"])
    wanted = (4 - 10 * (1 - 0.8 * 255 / 256)) / 3.9
    assert abs((out < 0.7999).mean() - wanted) < 4 * 0.5 / 800**0.5
