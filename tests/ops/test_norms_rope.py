"""Norms against float64, rotary positions against complex numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import ops


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6)])
def test_rms_norm(shape):
    x, weight = normal(*shape), normal(6, seed=1)
    wide = np.asarray(x, np.float64)
    want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-2) * np.asarray(weight)
    np.testing.assert_allclose(ops.rms_norm(x, weight, 1e-2), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6)])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm(shape, bias):
    x, weight = normal(*shape) + 3, normal(6, seed=1)
    shift = normal(6, seed=2) if bias else None
    wide = np.asarray(x, np.float64)
    want = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-2) * np.asarray(weight)
    want = want + np.asarray(shift) if bias else want
    np.testing.assert_allclose(ops.layer_norm(x, weight, shift, 1e-2), want, rtol=1e-5, atol=1e-5)


def test_norms_compute_in_float32_and_keep_the_dtype_of_the_stream():
    x = (normal(4, 256) + 300).astype(jnp.bfloat16)  # squares that a bfloat16 sum would lose
    wide, ones = np.asarray(x.astype(jnp.float32), np.float64), jnp.ones(256)
    for got, want in (
        (ops.rms_norm(x, ones, 1e-6), wide / np.sqrt((wide**2).mean(-1, keepdims=True))),
        (ops.layer_norm(x, ones, None, 1e-6), (wide - wide.mean(-1, keepdims=True)) / wide.std(-1, keepdims=True)),
    ):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=2**-8, atol=1e-3)


def test_layer_norm_of_a_large_constant_does_not_cancel():
    x = jnp.full((1, 8), 1e6) + jnp.asarray([[0.0, 1, 0, 1, 0, 1, 0, 1]])
    got = ops.layer_norm(x, jnp.ones(8), None, 0.0)
    np.testing.assert_allclose(np.abs(got), 1.0, rtol=1e-4)


def test_rotation_is_a_complex_product():
    width, base = 8, 100.0
    x, positions = normal(2, 5, 3, width), jnp.asarray([[0, 1, 2, 3, 4], [7, 0, 100, 3, 50]])
    tables = ops.rope_tables(positions, width, base)
    assert tables[0].shape == tables[1].shape == (2, 5, width // 2)
    pairs = np.asarray(x[..., : width // 2]) + 1j * np.asarray(x[..., width // 2 :])
    frequency = np.array([base ** (-2 * i / width) for i in range(width // 2)])
    turned = pairs * np.exp(1j * np.asarray(positions)[:, :, None, None] * frequency)
    got = ops.rotate(x, tables)
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), rtol=1e-4, atol=1e-4)


def test_scores_depend_on_the_distance_of_positions_only():
    q, k = normal(1, 1, 1, 8), normal(1, 1, 1, 8, seed=1)

    def score(a: int, b: int) -> float:
        turn = lambda x, p: ops.rotate(x, ops.rope_tables(jnp.asarray([[p]]), 8, 10000.0))
        return float(jnp.sum(turn(q, a) * turn(k, b)))

    assert score(3, 1) == pytest.approx(score(12, 10), abs=1e-5)
    assert score(3, 1) != pytest.approx(score(1, 3), abs=1e-3)
    assert score(5, 5) == pytest.approx(float(jnp.sum(q * k)), abs=1e-5)


def test_rotate_keeps_the_dtype():
    tables = ops.rope_tables(jnp.asarray([[3]]), 4, 10.0)
    assert ops.rotate(normal(1, 1, 2, 4).astype(jnp.bfloat16), tables).dtype == jnp.bfloat16
