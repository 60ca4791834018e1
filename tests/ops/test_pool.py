"""Pooling against XLA's windowed reductions, and its gradients; group norm's and batch norm's
refusals.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import ops
from jaxmodel.errors import InputError

X = jnp.asarray(
    np.random.default_rng(0).normal(size=(2, 9, 8, 3)), jnp.float32
)  # all values differ


def windows(x, kernel, stride, pad, first, reduce):
    sides = ((0, 0), (pad, pad), (pad, pad), (0, 0))
    return jax.lax.reduce_window(x, first, reduce, (1, *kernel, 1), (1, *stride, 1), sides)


@pytest.mark.parametrize(
    ("kernel", "stride", "pad"),
    [((2, 2), None, 0), ((3, 3), (2, 2), 1), ((3, 2), (1, 3), 0), ((9, 8), None, 0)],
)
def test_max_pool_and_its_gradient(kernel, stride, pad):
    want = lambda x: windows(x, kernel, stride or kernel, pad, -jnp.inf, jax.lax.max)
    got = lambda x: ops.max_pool(x, kernel, stride, pad)
    chex.assert_trees_all_equal(jax.jit(got)(X), want(X), strict=True)
    g = jnp.asarray(np.random.default_rng(1).normal(size=want(X).shape), jnp.float32)
    chex.assert_trees_all_close(
        jax.jit(lambda: jax.vjp(got, X)[1](g))(), jax.vjp(want, X)[1](g), rtol=1e-6, atol=1e-6
    )


def test_max_pool_of_equal_values_parts_the_gradient():
    grad = jax.grad(lambda x: jnp.sum(ops.max_pool(x, (2, 2))))(jnp.ones((1, 2, 2, 1)))
    assert float(jnp.sum(grad)) == 1
    assert float(jnp.min(grad)) >= 0


def test_padding_is_never_the_largest():
    assert float(jnp.max(ops.max_pool(jnp.full((1, 3, 3, 1), -5.0), (3, 3), (2, 2), pad=1))) == -5


@pytest.mark.parametrize("kernel", [(2, 2), (4, 3), (9, 8)])
def test_avg_pool(kernel):
    want = windows(X, kernel, kernel, 0, 0.0, jax.lax.add) / (kernel[0] * kernel[1])
    chex.assert_trees_all_close(ops.avg_pool(X, kernel), want, rtol=1e-6, atol=1e-6)


def test_pools_keep_the_dtype_and_means_are_summed_wide():
    x = jnp.ones((1, 40, 40, 1), jnp.bfloat16)  # 1,600 ones do not add up in bfloat16
    assert ops.avg_pool(x, (40, 40)).dtype == jnp.bfloat16
    assert float(ops.avg_pool(x, (40, 40))[0, 0, 0, 0]) == 1
    assert ops.max_pool(x, (2, 2)).dtype == jnp.bfloat16


def test_what_is_refused():
    with pytest.raises(
        InputError,
        match=r"kernel: \(9, 9\) given for images of \(9, 8\); a window must fit into an image",
    ):
        ops.max_pool(X, (9, 9))
    with pytest.raises(InputError, match="groups: 2 given; allowed: a divisor of the 3 channels"):
        ops.group_norm(X, jnp.ones(3), jnp.ones(3), 2, 1e-5)


def test_group_norm_with_one_channel_in_a_group_and_with_all_in_one():
    """Instance norm and layer norm over the image, in numpy."""
    weight = jnp.asarray([1.0, 2.0, 3.0])
    bias = jnp.asarray([0.1, 0.2, 0.3])
    for groups, axes in ((3, (1, 2)), (1, (1, 2, 3))):
        wide = np.asarray(X, np.float64)
        normed = (wide - wide.mean(axes, keepdims=True)) / np.sqrt(
            wide.var(axes, keepdims=True) + 1e-5
        )
        got = ops.group_norm(X, weight, bias, groups, 1e-5)
        np.testing.assert_allclose(
            got, normed * np.asarray(weight) + np.asarray(bias), rtol=1e-5, atol=1e-5
        )


def test_batch_norm_of_rows_without_space():
    x = X.reshape(-1, 3)
    args = (jnp.ones(3), jnp.zeros(3), jnp.full(3, 2.0), jnp.full(3, 4.0), 0.0)
    chex.assert_trees_all_close(ops.batch_norm(x, *args), (x - 2) / 2, rtol=1e-6)
    got = np.asarray(ops.batch_norm(x, *args, train=True))
    np.testing.assert_allclose(got.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(got.var(0), 1, rtol=1e-5)
    to_statistics = jax.grad(
        lambda m, v: jnp.sum(ops.batch_norm(x, *args[:2], m, v, 0.0) ** 2), (0, 1)
    )(*args[2:4])
    chex.assert_trees_all_equal(to_statistics, (jnp.zeros(3), jnp.zeros(3)))
