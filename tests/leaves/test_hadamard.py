"""Hadamard matrices, and products with them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel.errors import InputError
from jaxmodel.leaves.hadamard import hadamard, largest_block, turn

SIZES = [1, 2, 4, 12, 20, 36, 48, 64, 144, 576]


@pytest.mark.parametrize("size", SIZES)
def test_rows_are_orthogonal_signs(size):
    matrix = hadamard(size)
    wide = matrix.astype(np.float64)
    np.testing.assert_allclose(wide @ wide.T, np.eye(size), atol=1e-6)
    np.testing.assert_allclose(np.abs(matrix) * np.sqrt(size), 1, rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 32])
@pytest.mark.parametrize("size", [12, 36, 64, 576])
def test_turning_is_a_product_with_the_matrix_and_back(rows, size):
    x = np.random.default_rng(0).normal(size=(rows, 2 * size)).astype(np.float32)
    turned, back = jax.jit(lambda x: (y := turn(x, size), turn(y, size, back=True)))(jnp.asarray(x))
    want = (x.reshape(rows, 2, size) @ hadamard(size)).reshape(x.shape)
    np.testing.assert_allclose(turned, want, atol=1e-5)
    np.testing.assert_allclose(back, x, atol=1e-5)


def test_sizes_without_a_matrix_name_the_nearest_block():
    with pytest.raises(InputError, match="no matrix of size 100 is known; nearest: 20"):
        hadamard(100)
    assert [largest_block(n) for n in (7, 40, 256)] == [1, 40, 256]
