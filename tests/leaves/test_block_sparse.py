"""`BlockSparse` against NumPy: what is stored, what is decoded, what is refused."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxmodel.errors import InputError
from jaxmodel.leaves import BlockSparse, largest_blocks
from jaxmodel.leaves.block_sparse import cut


def random(shape, rows, columns, seed=0):
    """A weight whose blocks are zero in nearly half of the places, and which are not."""
    rng = np.random.default_rng(seed)
    keep = rng.random((*shape[:-2], rows, columns)) < 0.55
    whole = np.repeat(np.repeat(keep, shape[-2] // rows, -2), shape[-1] // columns, -1)
    return (rng.normal(size=shape) * whole).astype(np.float32), keep


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((4, 24), (2, 4)),
        ((3, 6, 40), (3, 4)),
        ((2, 2, 4, 18), (1, 2)),
        ((4, 4), (4, 4)),
        ((8, 8), (1, 1)),
    ],
)
def test_round_trip(shape, block):
    rows = shape[-2] // block[0]
    columns = shape[-1] // block[1]
    weight, keep = random(shape, rows, columns)
    for leaf in (
        BlockSparse.from_dense(jnp.asarray(weight), block=block),
        BlockSparse.from_dense(jnp.asarray(weight), jnp.asarray(keep), block=block),
    ):
        leaf.check()
        leaf.check_values()
        assert leaf.shape == shape
        assert leaf.block == block
        np.testing.assert_array_equal(leaf.decode(), weight)
        np.testing.assert_array_equal(leaf.keep(), keep)
        np.testing.assert_array_equal(jax.jit(BlockSparse.decode)(leaf), weight)
        assert leaf.decode(jnp.bfloat16).dtype == jnp.bfloat16


def test_the_layout_is_a_bit_for_each_block_and_the_kept_blocks_of_each_row():
    weight = np.zeros((4, 6), np.float32)
    weight[0:2, 2:4], weight[2:4, 0:2], weight[2:4, 4:6] = 1, 2, 3
    leaf = BlockSparse.from_dense(jnp.asarray(weight), block=(2, 2))
    np.testing.assert_array_equal(leaf.mask, [[0b010], [0b101]])
    np.testing.assert_array_equal(leaf.values[:, :, 0, 0], [[1, 0], [2, 3]])
    np.testing.assert_array_equal(leaf.columns(), [[1, 0], [0, 2]])
    assert leaf.pad == 5
    assert leaf.nbytes == 2 + 2 * 2 * 4 * 4


def test_a_block_of_zeros_may_be_kept():
    keep = jnp.asarray([[True, False], [True, True]])
    leaf = BlockSparse.from_dense(jnp.zeros((2, 4)), keep, block=(1, 2))
    np.testing.assert_array_equal(leaf.keep(), keep)
    leaf.check_values()


def test_rows_are_those_of_the_decoded_weight():
    weight, _ = random((6, 12), 3, 4)
    leaf = BlockSparse.from_dense(jnp.asarray(weight), block=(2, 3))
    ids = jnp.asarray([[0, 5, 3], [3, 1, 4]])
    np.testing.assert_array_equal(leaf.rows(ids), weight[np.asarray(ids)])
    with pytest.raises(InputError, match=r"BlockSparse.rows: a leaf of shape \(2, 6, 12\)"):
        jax.tree.map(lambda a: jnp.stack([a, a]), leaf).rows(ids)


def test_the_largest_blocks_of_each_row_are_kept():
    weight, _ = random((3, 8, 12), 4, 3, seed=1)
    keep = largest_blocks(jnp.asarray(weight), (2, 4), 2)
    norms = np.square(weight).reshape(3, 4, 2, 3, 4).sum((2, 4))
    want = np.zeros((3, 4, 3), bool)
    np.put_along_axis(want, np.argsort(-norms, axis=-1, kind="stable")[..., :2], True, axis=-1)
    np.testing.assert_array_equal(keep, want)
    assert BlockSparse.from_dense(jnp.asarray(weight), keep, block=(2, 4)).values.shape == (
        3,
        4,
        2,
        2,
        4,
    )
    with pytest.raises(InputError, match="kept: 4 given; allowed: 1 to 3"):
        largest_blocks(jnp.asarray(weight), (2, 4), 4)


def test_specs_cut_rows_of_blocks_only():
    leaf = BlockSparse.from_dense(jnp.ones((8, 8)), block=(2, 2))
    specs = leaf.specs(P("tensor"), {"tensor": 4})
    assert (specs.mask, specs.values) == (P("tensor"), P("tensor"))
    with pytest.raises(InputError, match="8 parts, which splits a block"):
        leaf.specs(P("tensor"), {"tensor": 8})
    with pytest.raises(InputError, match="cuts the last axis"):
        leaf.specs(P(None, "tensor"), {"tensor": 2})


def test_what_is_refused():
    weight = jnp.ones((4, 6))
    leaf = BlockSparse.from_dense(jnp.ones((4, 6)), block=(2, 2))
    with pytest.raises(
        InputError,
        match=r"block: \(3, 2\) given; allowed: divisors of the weight's 4 rows and 6 columns",
    ):
        cut(weight, (3, 2))
    with pytest.raises(InputError, match=r"keep: shape \(2, 2\) given; allowed: \(2, 3\)"):
        BlockSparse.from_dense(weight, jnp.ones((2, 2), bool), block=(2, 2))
    with pytest.raises(InputError, match="keep: a traced mask"):
        jax.jit(lambda w: BlockSparse.from_dense(w, block=(2, 2)))(weight)
    with pytest.raises(InputError, match="values has shape"):
        dataclasses.replace(leaf, values=leaf.values[:1]).check()
    with pytest.raises(InputError, match="3 blocks are stored for rows of 1"):
        dataclasses.replace(leaf, pad=7).check()
    with pytest.raises(InputError, match="keeps 3 blocks but has 2"):
        dataclasses.replace(leaf, values=leaf.values[:, :2]).check_values()
    with pytest.raises(InputError, match="a block of the padding"):
        dataclasses.replace(leaf, mask=leaf.mask | jnp.uint8(128)).check_values()
    with pytest.raises(InputError, match="there is a value after"):
        dataclasses.replace(leaf, mask=leaf.mask & jnp.uint8(3)).check_values()
