"""Norms against float64, rotary positions against complex numbers, scaled ones against their
definitions, a wave at a time.

What transformers makes of whole models with them: tests/hub/test_goldens.py.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import ops
from jaxmodel.errors import InputError


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6)])
def test_rms_norm(shape):
    x = normal(*shape)
    weight = normal(6, seed=1)
    wide = np.asarray(x, np.float64)
    want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-2) * np.asarray(weight)
    np.testing.assert_allclose(ops.rms_norm(x, weight, 1e-2), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6)])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm(shape, bias):
    x = normal(*shape) + 3
    weight = normal(6, seed=1)
    shift = normal(6, seed=2) if bias else None
    wide = np.asarray(x, np.float64)
    want = (
        (wide - wide.mean(-1, keepdims=True))
        / np.sqrt(wide.var(-1, keepdims=True) + 1e-2)
        * np.asarray(weight)
    )
    want = want + np.asarray(shift) if bias else want
    np.testing.assert_allclose(ops.layer_norm(x, weight, shift, 1e-2), want, rtol=1e-5, atol=1e-5)


def test_norms_compute_in_float32_and_keep_the_dtype_of_the_stream():
    x = (normal(4, 256) + 300).astype(jnp.bfloat16)  # squares that a bfloat16 sum would lose
    wide = np.asarray(x.astype(jnp.float32), np.float64)
    ones = jnp.ones(256)
    for got, want in (
        (ops.rms_norm(x, ones, 1e-6), wide / np.sqrt((wide**2).mean(-1, keepdims=True))),
        (
            ops.layer_norm(x, ones, None, 1e-6),
            (wide - wide.mean(-1, keepdims=True)) / wide.std(-1, keepdims=True),
        ),
    ):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=2**-8, atol=1e-3)


def test_layer_norm_of_a_large_constant_does_not_cancel():
    x = jnp.full((1, 8), 1e6) + jnp.asarray([[0.0, 1, 0, 1, 0, 1, 0, 1]])
    got = ops.layer_norm(x, jnp.ones(8), None, 0.0)
    np.testing.assert_allclose(np.abs(got), 1.0, rtol=1e-4)


def test_rotation_is_a_complex_product():
    width = 8
    base = 100.0
    x = normal(2, 5, 3, width)
    positions = jnp.asarray([[0, 1, 2, 3, 4], [7, 0, 100, 3, 50]])
    tables = ops.rope_tables(positions, width, base)
    assert tables[0].shape == tables[1].shape == (2, 5, width // 2)
    pairs = np.asarray(x[..., : width // 2]) + 1j * np.asarray(x[..., width // 2 :])
    frequency = np.array([base ** (-2 * i / width) for i in range(width // 2)])
    turned = pairs * np.exp(1j * np.asarray(positions)[:, :, None, None] * frequency)
    got = ops.rotate(x, tables)
    np.testing.assert_allclose(
        got, np.concatenate([turned.real, turned.imag], -1), rtol=1e-4, atol=1e-4
    )


def test_scores_depend_on_the_distance_of_positions_only():
    q = normal(1, 1, 1, 8)
    k = normal(1, 1, 1, 8, seed=1)

    def score(a: int, b: int) -> float:
        turn = lambda x, p: ops.rotate(x, ops.rope_tables(jnp.asarray([[p]]), 8, 10000.0))
        return float(jnp.sum(turn(q, a) * turn(k, b)))

    assert score(3, 1) == pytest.approx(score(12, 10), abs=1e-5)
    assert score(3, 1) != pytest.approx(score(1, 3), abs=1e-3)
    assert score(5, 5) == pytest.approx(float(jnp.sum(q * k)), abs=1e-5)


def test_rotate_keeps_the_dtype():
    tables = ops.rope_tables(jnp.asarray([[3]]), 4, 10.0)
    assert ops.rotate(normal(1, 1, 2, 4).astype(jnp.bfloat16), tables).dtype == jnp.bfloat16


# ---------------------------------------------------------------------------------- longer contexts

WIDTH, BASE, CONTEXT = (
    16,
    100.0,
    64,
)  # waves of 6 to 353 positions: some fit the context often, some not once
PLAIN = [BASE ** (-2 * i / WIDTH) for i in range(WIDTH // 2)]


def scaled(scaling: ops.RopeScaling) -> np.ndarray:
    """The frequencies, read off the angles at position 1, where none has come round."""
    sin, cos = ops.rope_tables(jnp.asarray([[1]]), WIDTH, BASE, scaling)
    np.testing.assert_allclose(np.hypot(sin, cos), scaling.gain, rtol=1e-5)
    return np.arctan2(sin, cos)[0, 0]


def test_linear_scaling_puts_positions_closer():
    positions = jnp.asarray([[0, 3, 40, 200]])
    got = ops.rope_tables(4 * positions, WIDTH, BASE, ops.RopeScaling("linear", 4.0))
    for a, b in zip(got, ops.rope_tables(positions, WIDTH, BASE), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_dynamic_scaling_goes_by_the_length_of_each_row():
    """By the definition: with length n beyond the context c the base is that many times as large.

    A row that fits is turned as without a scaling, whatever stands beside it.
    """
    scaling = ops.RopeScaling("dynamic", 3.0, context=CONTEXT)
    positions = jnp.asarray([[0, 7, CONTEXT - 1], [0, 7, 2 * CONTEXT - 1]])
    sin, cos = ops.rope_tables(positions, WIDTH, BASE, scaling)
    base = BASE * (3.0 * 2 - (3.0 - 1)) ** (WIDTH / (WIDTH - 2))
    for row, b in enumerate((BASE, base)):
        angle = np.outer(positions[row], [b ** (-2 * i / WIDTH) for i in range(WIDTH // 2)])
        np.testing.assert_allclose(sin[row], np.sin(angle), atol=1e-4)
        np.testing.assert_allclose(cos[row], np.cos(angle), atol=1e-4)


def test_llama3_scaling_wave_by_wave():
    def wave(frequency: float) -> float:
        turns = CONTEXT * frequency / (2 * math.pi)
        if turns > 4:
            return frequency
        share = max((turns - 1) / (4 - 1), 0)
        return (1 - share) * frequency / 8 + share * frequency

    want = [wave(frequency) for frequency in PLAIN]
    changed = np.asarray(PLAIN) / want
    assert (
        changed[0] == 1
        and changed[-1] == pytest.approx(8)
        and np.any((changed > 1.01) & (changed < 7.99))
    )
    np.testing.assert_allclose(scaled(ops.RopeScaling("llama3", 8.0, CONTEXT)), want, rtol=1e-5)


@pytest.mark.parametrize(("fast", "slow"), [(32.0, 1.0), (4.0, 0.5), (1.0, 1.0)])
def test_yarn_scaling_wave_by_wave(fast, slow):
    def dimension(turns: float) -> float:
        """Where, among the waves, one turns so often in the context:

        CONTEXT * BASE^(-2 d / WIDTH) = 2 pi turns.
        """
        return WIDTH / 2 * math.log(CONTEXT / (2 * math.pi * turns)) / math.log(BASE)

    first = max(math.floor(dimension(fast)), 0)
    last = min(math.ceil(dimension(slow)), WIDTH - 1)
    share = [min(max((i - first) / (last - first), 0), 1) for i in range(WIDTH // 2)]
    want = [
        (1 - s) * frequency + s * frequency / 4 for s, frequency in zip(share, PLAIN, strict=True)
    ]
    assert want[0] == PLAIN[0] and any(0 < s < 1 for s in share) == (fast > slow)
    np.testing.assert_allclose(
        scaled(ops.RopeScaling("yarn", 4.0, CONTEXT, fast=fast, slow=slow)), want, rtol=1e-5
    )


def test_yarn_sharpens_the_scores():
    assert ops.RopeScaling("yarn", 4.0, CONTEXT).gain == pytest.approx(0.1 * math.log(4) + 1)
    assert ops.RopeScaling("yarn", 4.0, CONTEXT, sharpen=1.5).gain == 1.5
    assert (
        ops.RopeScaling("llama3", 4.0, CONTEXT).gain == ops.RopeScaling("linear", 4.0).gain == 1.0
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("yarm", 4.0, CONTEXT), "rope scaling: 'yarm' is not known; allowed: .*nearest: yarn"),
        (("linear", 0.5), "factor 0.5, context 0; allowed: at least 1"),
        (("yarn", 4.0), "factor 4.0, context 0; allowed: at least 1"),
        (("llama3", 4.0, CONTEXT, 4.0, 4.0), "low 4.0 must be below high 4.0"),
    ],
)
def test_scalings_that_make_no_sense(given, message):
    with pytest.raises(InputError, match=message):
        ops.RopeScaling(*given)
