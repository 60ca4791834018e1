"""What others compute: qwix (stored, see goldens/make_qwix.py), the gguf package and scipy, where
their definitions and ours are the same.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from jaxmodel import compress, leaves, ops
from jaxmodel.axes import Axes
from jaxmodel.compress.draft import Grid
from jaxmodel.leaves import Sparse
from jaxmodel.models import mlp

QWIX = np.load(Path(__file__).parent / "goldens" / "qwix.npz")
GRAM = QWIX["inputs"].T @ QWIX["inputs"]
CODES = jax.jit(lambda leaf: leaf.codes())
DECODE = jax.jit(leaves.decode)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("int8/codes", "rtn(8)"),
        ("int4/codes", "rtn(4, group=16, scale_dtype='float32')"),
        ("nf4/codes", "nf4(group=16)"),
        ("gptq/codes", "gptq(4, range='absmax', act_order=False)"),
        (
            "gptq/grouped",
            "gptq(4, group=16, range='absmax', act_order=False, scale_dtype='float32')",
        ),
    ],
)
def test_codes_are_those_of_qwix(name, text):
    weight = QWIX["nf4/weight" if name == "nf4/codes" else "weight"]
    stats = {"gram": jnp.asarray(GRAM), "count": jnp.float32(len(QWIX["inputs"]))}
    leaf = compress.parse(text)[0](jnp.asarray(weight), stats)
    np.testing.assert_array_equal(CODES(leaf), QWIX[name])
    if name.startswith("gptq"):  # else nothing would have been made up for
        assert np.mean(QWIX[name] != QWIX["int4/codes"]) > 0.1


def test_factors_of_awq_are_those_of_qwix():
    """Of inputs of one size in each channel, of which no two go together."""
    weight, size = QWIX["weight"], QWIX["awq/inputs"]
    axes = Axes((("up", "FD"), ("down", "DF")), feeds=(("up", "down"),))
    model = dataclasses.replace(mlp.model(mlp.SIZES["tiny"]), axes=axes)
    up = np.ones((len(size), len(weight)), np.float32)
    stats = {
        "down": {
            "gram": jnp.asarray(np.diag(100 * size**2)),
            "square": jnp.asarray(100 * size**2),
            "count": jnp.float32(100),
        }
    }
    params = {"up": jnp.asarray(up), "down": jnp.asarray(weight)}
    awq = compress.transforms.Awq(4)
    _, changed = awq.change(model, params, stats, jax.random.key(0))
    factor = QWIX["awq/factor"]
    assert np.ptp(np.log(factor)) > 0.1  # an alpha above 0 was the best
    np.testing.assert_allclose(changed["down"], weight * factor, rtol=1e-4)
    np.testing.assert_allclose(changed["up"], up / factor[:, None], rtol=1e-4)


def test_codes_are_those_of_gguf():
    """Q8_0 and Q4_1 are roundings to nearest, of groups of 32; of Q4_0, which puts the largest
    weight at -8, the grid is taken, and the codes are the same.

    Groups whose scales 16 bits hold exactly: gguf computes the codes before it rounds the scale.
    """
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(4, 3, 32)).astype(np.float32)

    def scaled(low, high, to_low, to_high):
        """The weights moved so that each group begins and ends there."""
        low, high = (of(weight, axis=-1, keepdims=True) for of in (low, high))
        return ((weight - low) / (high - low) * (to_high - to_low) + to_low).astype(np.float32)

    largest = np.abs(weight).max(-1, keepdims=True)
    eight = (weight / largest * 127 / 64).astype(np.float32)
    affine = scaled(np.min, np.max, -7 / 8, 8 / 8)
    four = (weight / largest).astype(np.float32)

    kinds = gguf.GGMLQuantizationType
    flat = lambda a: a.reshape(4, 96)
    packed = lambda a, kind: gguf.quantize(flat(a), kind)
    wanted = lambda a, kind: gguf.dequantize(packed(a, kind), kind)
    for a, kind, text in (
        (eight, kinds.Q8_0, "rtn(8, group=32)"),
        (affine, kinds.Q4_1, "rtn(4, group=32, symmetric=False)"),
    ):
        leaf = compress.parse(text)[0](jnp.asarray(flat(a)))
        np.testing.assert_array_equal(DECODE(leaf), wanted(a, kind))
    blocks = packed(four, kinds.Q4_0).reshape(4, 3, -1)
    scale = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
    assert np.any(scale < 0) and np.any(scale > 0)
    grid = Grid(jnp.asarray(scale), bits=4, group=32)
    found = jax.jit(lambda grid, weight: grid.round(weight))(grid, jnp.asarray(flat(four)))
    np.testing.assert_array_equal(found, wanted(four, kinds.Q4_0))


def test_a_sparse_leaf_is_the_csr_matrix_of_scipy():
    rng = np.random.default_rng(0)
    weight = np.where(rng.random((6, 21)) < 0.4, rng.normal(size=(6, 21)), 0).astype(np.float32)
    weight[2] = 0
    x = rng.normal(size=(5, 21)).astype(np.float32)
    csr = scipy.sparse.csr_matrix(weight)
    leaf = Sparse.from_dense(jnp.asarray(weight))
    counts = np.diff(csr.indptr)
    kept = np.unpackbits(np.asarray(leaf.mask), axis=-1, bitorder="little")[:, :21]
    np.testing.assert_array_equal(kept.sum(-1), counts)
    np.testing.assert_array_equal(np.nonzero(kept)[1], csr.indices)
    first = np.arange(leaf.values.shape[-1]) < counts[:, None]
    np.testing.assert_array_equal(np.asarray(leaf.values)[first], csr.data)
    dense, product = jax.jit(lambda leaf, x: (leaf.decode(), ops.einsum("BI,OI->BO", x, leaf)))(
        leaf, jnp.asarray(x)
    )
    np.testing.assert_array_equal(dense, csr.toarray())
    np.testing.assert_allclose(product, (csr @ x.T).T, rtol=1e-5, atol=1e-5)
