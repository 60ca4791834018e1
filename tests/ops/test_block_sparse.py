"""Products with weights of blocks against the dense ones, forward and backward."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import ops
from jaxmodel.errors import InputError
from jaxmodel.leaves import BlockSparse, QTensor, Sparse, decode, largest_blocks
from jaxmodel.ops.probe import zeros_for

OUT = 24
IN = 64
BLOCK = (8, 16)
KEPT = 2


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def leaf() -> BlockSparse:
    weight = normal(OUT, IN)
    return BlockSparse.from_dense(weight, largest_blocks(weight, BLOCK, KEPT), block=BLOCK)


def close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3)])
def test_einsum_equals_that_of_the_masked_dense_weight(leaf, lead):
    x = normal(*lead, IN, seed=1)
    letters = "BT"[: len(lead)]
    got = jax.jit(lambda x, w: ops.einsum(f"{letters}D,FD->{letters}F", x, w))(x, leaf)
    close(got, x @ leaf.decode().T)


@pytest.mark.parametrize("rows", [1, 4])
def test_bfloat16_operands(leaf, rows):
    x = normal(rows, IN, seed=1)
    got = ops.einsum("BD,FD->BF", x, leaf, ops.Policy(compute_dtype="bfloat16"))
    want = jnp.dot(
        x.astype(jnp.bfloat16), leaf.decode(jnp.bfloat16).T, preferred_element_type=jnp.float32
    )
    assert got.dtype == jnp.float32
    close(got, want, 1e-4)


def test_gradients_equal_those_of_the_masked_dense_weight(leaf):
    x = normal(7, IN, seed=1)
    target = normal(7, OUT, seed=2)

    def loss(x, values):
        y = ops.einsum("BD,FD->BF", x, dataclasses.replace(leaf, values=values))
        return jnp.sum((y - target) ** 2)

    def dense(x, weight):
        return jnp.sum((x @ weight.T - target) ** 2)

    by_x, by_values = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, leaf.values)
    want_x, want_weight = jax.grad(dense, argnums=(0, 1))(x, leaf.decode())
    close(by_x, want_x, 1e-4)
    of_values = BlockSparse.from_dense(want_weight, leaf.keep(), block=BLOCK)
    close(by_values, of_values.values, 1e-4)


def test_stacked_leaves_run_by_scan_and_by_batch_letters(leaf):
    leaves = [leaf, jax.tree.map(lambda a: a[::-1], leaf)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *leaves)
    x = normal(2, 5, IN, seed=1)
    want = jnp.stack([x[i] @ one.decode().T for i, one in enumerate(leaves)])
    close(ops.einsum("EBD,EFD->EBF", x, stacked), want)
    scanned = jax.lax.scan(lambda _, xs: (None, ops.einsum("BD,FD->BF", *xs)), None, (x, stacked))[
        1
    ]
    close(scanned, want)


def test_take_decodes_the_rows(leaf):
    ids = jnp.asarray([[0, 23], [9, 30]])
    got = np.asarray(ops.embed(leaf, ids))
    np.testing.assert_array_equal(got[0], np.asarray(leaf.decode())[[0, 23]])
    assert np.isnan(got[1, 1]).all() and np.isfinite(got[1, 0]).all()


def test_conv_runs_it(leaf):
    x = normal(2, 6, 6, 16, seed=1)
    close(ops.conv(x, leaf, kernel=(2, 2)), ops.conv(x, leaf.decode(), kernel=(2, 2)))


def test_statistics_of_its_input_are_measured(leaf):
    x = normal(5, IN, seed=1)
    zeros = zeros_for(leaf.shape, ("gram",))
    found = jax.grad(lambda zeros: jnp.sum(ops.einsum("BD,FD->BF", x, ops.Probe(leaf, zeros))))(
        zeros
    )
    close(found["gram"], x.T @ x, 1e-4)
    assert float(found["count"]) == 5


# ---------------------------------------------------- blocks whose places are known apart from them


def kept_weight(kind):
    weight = normal(3, 8, KEPT * 16)
    if kind == "int8":
        scale = jnp.max(jnp.abs(weight), axis=-1, keepdims=True) / 127
        return QTensor.from_codes(jnp.round(weight / scale).astype(jnp.int32), scale, bits=8)
    return (
        Sparse.from_dense(jnp.where(jnp.abs(weight) > 0.5, weight, 0))
        if kind == "sparse"
        else weight
    )


@pytest.mark.parametrize("kind", ["array", "int8", "sparse"])
def test_blocks_of_any_leaf(kind):
    w = kept_weight(kind)
    x = normal(5, IN, seed=1)
    columns = jnp.asarray([[0, 2], [3, 1], [1, 1]])
    got = jax.jit(ops.block_sparse_matmul)(x, w, columns)
    tiles = np.asarray(x).reshape(5, 4, 16)
    want = [
        np.concatenate([tiles[:, c] for c in row], axis=-1) @ np.asarray(decode(w)[i]).T
        for i, row in enumerate(columns)
    ]
    close(got, np.concatenate(want, axis=-1), 1e-4)


def test_blocks_are_measured_too():
    w = kept_weight("array")
    x = normal(5, IN, seed=1)
    columns = jnp.asarray([[0, 2], [3, 1], [1, 1]])
    probe = lambda zeros: jnp.sum(ops.block_sparse_matmul(x, ops.Probe(w, zeros), columns))
    found = jax.grad(probe)(zeros_for(w.shape, ("square",)))
    tiles = np.asarray(x).reshape(5, 4, 16)
    want = [np.concatenate([np.square(tiles[:, c]).sum(0) for c in row]) for row in columns]
    close(found["square"], np.stack(want), 1e-4)
    np.testing.assert_array_equal(found["count"], [5, 5, 5])


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="blocks: x .* do not fit each other"):
        ops.block_sparse_matmul(normal(2, 60), kept_weight("array"), jnp.zeros((3, 2), jnp.int32))
    with pytest.raises(InputError, match="do not fit each other"):
        ops.block_sparse_matmul(normal(2, IN), kept_weight("array"), jnp.zeros((2, 2), jnp.int32))
