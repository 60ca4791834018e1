"""`Sparse`: what goes in comes out, bytes counted by hand, broken leaves refused."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import PartitionSpec as P

from jaxmodel.errors import InputError
from jaxmodel.leaves import QTensor, Sparse
from jaxmodel.leaves.sparse import expand

READ = jax.jit(lambda leaf: (leaf.decode(), leaf.expand(), leaf.keep()))


def weights(shape: tuple[int, ...], density: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < density, rng.normal(size=shape), 0).astype(np.float32)


def two_of_four(shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight and the mask of two places in each four neighbours."""
    rng = np.random.default_rng(seed)
    places = np.argsort(rng.random((*shape[:-1], shape[-1] // 4, 4)), axis=-1) < 2
    keep = places.reshape(shape)
    return np.where(keep, rng.normal(size=shape), 0).astype(np.float32), keep


def quantised(
    leaf: Sparse, bits: int, group: int | None = None, activations: str | None = None
) -> Sparse:
    """The same leaf with symmetric codes for values."""
    values = np.asarray(leaf.values, np.float64)
    *lead, n = values.shape
    grouped = values.reshape(*lead, -1, group or n)
    if bits == 1:
        scale = np.abs(grouped).mean(-1).astype(np.float32)
        codes = np.where(values < 0, -1, 1)
    else:
        scale = np.maximum(np.abs(grouped).max(-1) / (2 ** (bits - 1) - 1), 1e-6).astype(np.float32)
        codes = np.round(grouped / scale[..., None]).reshape(values.shape)
    kwargs = {"bits": bits, "group": group, "activations": activations}
    return dataclasses.replace(
        leaf, values=QTensor.from_codes(jnp.asarray(codes, jnp.int32), jnp.asarray(scale), **kwargs)
    )


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([(3, 8), (2, 13), (2, 3, 9), (4, 1)]),
    st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    st.integers(0, 1000),
    st.sets(st.integers(0, 3)),
)
def test_round_trip(shape, density, seed, empty_rows):
    weight = weights(shape, density, seed)
    for row in empty_rows:
        weight[..., row % shape[-2], :] = 0
    leaf = Sparse.from_dense(jnp.asarray(weight))
    leaf.check_values()
    assert leaf.shape == shape
    assert leaf.dtype == jnp.float32
    decoded, expanded, kept = READ(leaf)
    np.testing.assert_array_equal(decoded, weight)
    np.testing.assert_array_equal(expanded, weight)
    np.testing.assert_array_equal(kept, weight != 0)


def test_the_layout_is_a_bitmask_and_the_kept_values_of_each_row():
    weight = np.float32([[0, 5, 0, 0, 6, 0, 0, 0, 7, 0], [0] * 10, [0, 0, 0, 0, 0, 0, 0, 0, 0, 8]])
    leaf = Sparse.from_dense(jnp.asarray(weight))
    np.testing.assert_array_equal(leaf.mask, np.packbits(weight != 0, axis=-1, bitorder="little"))
    np.testing.assert_array_equal(leaf.values, [[5, 6, 7], [0, 0, 0], [8, 0, 0]])
    assert leaf.pad == 6
    assert leaf.nbytes == 3 * 2 + 3 * 3 * 4
    assert leaf.bits_per_weight == pytest.approx(8 * leaf.nbytes / 30)


def test_a_zero_may_be_kept():
    keep = np.array([[True, True, False], [False, True, True]])
    leaf = Sparse.from_dense(jnp.asarray([[0.0, 1, 0], [0, 2, 0]]), jnp.asarray(keep))
    np.testing.assert_array_equal(leaf.values, [[0, 1], [2, 0]])
    np.testing.assert_array_equal(leaf.keep(), keep)
    np.testing.assert_array_equal(leaf.decode(), [[0, 1, 0], [0, 2, 0]])


def test_n_of_m_has_no_slack_and_jits():
    weight, keep = two_of_four((2, 3, 16), 0)
    leaf = Sparse.from_dense(jnp.asarray(weight), jnp.asarray(keep), pattern=(2, 4))
    leaf.check_values()
    assert leaf.values.shape == (2, 3, 8)
    assert leaf.bits_per_weight == 1 + 32 / 2
    np.testing.assert_array_equal(leaf.decode(), weight)
    jitted = jax.jit(lambda w, k: Sparse.from_dense(w, k, pattern=(2, 4)))(
        jnp.asarray(weight), jnp.asarray(keep)
    )
    assert jax.tree.structure(jitted) == jax.tree.structure(leaf)
    np.testing.assert_array_equal(jitted.values, leaf.values)


@pytest.mark.parametrize(
    ("bits", "group"), [(1, None), (2, None), (4, None), (8, None), (4, 8), (8, 4)]
)
def test_values_may_be_codes(bits, group):
    weight, keep = two_of_four((3, 32), bits)
    leaf = quantised(
        Sparse.from_dense(jnp.asarray(weight), jnp.asarray(keep), pattern=(2, 4)), bits, group
    )
    leaf.check()
    leaf.check_values()
    decoded = np.asarray(leaf.decode())
    want = np.zeros_like(weight)
    want[keep] = np.asarray(leaf.values.decode()).reshape(-1)  # both in the order of rows
    np.testing.assert_array_equal(decoded, want)
    assert np.all(decoded[~keep] == 0)
    dense = leaf.expand()
    assert isinstance(dense, QTensor) == (group is None)
    np.testing.assert_array_equal(dense.decode() if isinstance(dense, QTensor) else dense, decoded)


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_codes_in_rows_of_unequal_counts(bits):
    weight = weights((4, 21), 0.4, 3)
    weight[1] = 0
    leaf = quantised(Sparse.from_dense(jnp.asarray(weight)), bits, activations="int8")
    dense = leaf.expand()
    assert isinstance(dense, QTensor)
    assert dense.activations == "int8"
    np.testing.assert_array_equal(dense.decode(), leaf.decode())
    assert np.all(np.asarray(leaf.decode())[weight == 0] == 0)


def test_bytes_of_half_the_weights_in_int8():
    weight, keep = two_of_four((16, 64), 1)
    leaf = quantised(Sparse.from_dense(jnp.asarray(weight), jnp.asarray(keep), pattern=(2, 4)), 8)
    assert leaf.nbytes == 16 * 64 // 8 + 16 * 32 + 16 * 4


def test_expand_of_a_tree():
    sparse = Sparse.from_dense(jnp.asarray(weights((3, 8), 0.5, 0)))
    other = QTensor(jnp.zeros((2, 4), jnp.int8), jnp.ones((2, 1)))
    params = {"a": sparse, "blocks": {"0": {"b": quantised(sparse, 8)}}, "c": other}
    expanded = expand(params)
    assert isinstance(expanded["a"], jax.Array)
    assert isinstance(expanded["blocks"]["0"]["b"], QTensor)
    assert expanded["c"] is other
    np.testing.assert_array_equal(expanded["a"], sparse.decode())


# -------------------------------------------------------------------------------- broken invariants

GOOD = Sparse.from_dense(jnp.asarray(weights((3, 12), 0.5, 0)))
PATTERN = Sparse.from_dense(*map(jnp.asarray, two_of_four((3, 32), 0)), pattern=(2, 4))
AFFINE = QTensor(jnp.zeros((3, 4), jnp.uint8), jnp.ones((3, 1)), jnp.ones((3, 1)), bits=8)


@pytest.mark.parametrize(
    ("leaf", "change", "message"),
    [
        (GOOD, {"mask": GOOD.mask.astype(jnp.int32)}, "mask is int32"),
        (GOOD, {"mask": GOOD.mask[0]}, "mask is uint8"),
        (GOOD, {"values": GOOD.values[:2]}, "values has shape"),
        (GOOD, {"values": GOOD.values[None]}, "values has shape"),
        (GOOD, {"pad": 8}, "pad is 8"),
        (GOOD, {"scale": jnp.ones((3, 4))}, "scale and group go together"),
        (GOOD, {"values": GOOD}, "values must be an array, a QTensor or a Codebook"),
        (GOOD, {"values": dataclasses.replace(AFFINE, bits=9)}, "bits is 9"),
        (PATTERN, {"pattern": (2, 5)}, "2:5 does not divide 32"),
        (PATTERN, {"pattern": (3, 4)}, "16 values a row; 3:4 needs 24"),
        (PATTERN, {"pattern": (5, 4)}, "5:4 does not divide"),
    ],
)
def test_check_refuses_a_broken_leaf(leaf, change, message):
    leaf.check()
    with pytest.raises(InputError, match=message):
        dataclasses.replace(leaf, **change).check()


@pytest.mark.parametrize(
    ("leaf", "change", "message"),
    [
        (
            GOOD,
            {"mask": GOOD.mask.at[1].set(255)},
            "keeps 12 elements but has|keeps an element of the padding",
        ),
        (
            GOOD,
            {"mask": GOOD.mask.at[:, 1].set(GOOD.mask[:, 1] | 16)},
            "element of the padding|elements but has",
        ),
        (GOOD, {"mask": GOOD.mask & 0}, "there is a value after the last kept"),
        (PATTERN, {"mask": (PATTERN.mask & 0) | 15}, "a group does not keep 2"),
    ],
)
def test_check_values_refuses_broken_data(leaf, change, message):
    leaf.check_values()
    broken = dataclasses.replace(leaf, **change)
    broken.check()
    with pytest.raises(InputError, match=message):
        broken.check_values()


def test_from_dense_does_not_lose_weights_to_a_pattern():
    with pytest.raises(InputError, match="keeps 4 elements but has 2 values|does not keep 2"):
        Sparse.from_dense(jnp.ones((1, 4)), pattern=(2, 4))


# ---------------------------------------------------------------------------------------- on a mesh


def test_specs():
    rows = GOOD.specs(P("a"), {"a": 3})
    assert (rows.mask, rows.values) == (P("a", None), P("a", None))
    with pytest.raises(InputError, match="only an N:M pattern"):
        GOOD.specs(P(None, "a"), {"a": 2})
    cut = PATTERN.specs(P(None, "a"), {"a": 1})
    assert (cut.mask, cut.values) == (P(None, "a"), P(None, "a"))
    wide = Sparse.from_dense(*map(jnp.asarray, two_of_four((2, 64), 0)), pattern=(2, 4))
    assert wide.specs(P(None, "a"), {"a": 2}).values == P(None, "a")
    with pytest.raises(InputError, match="into 4 parts"):
        wide.specs(P(None, "a"), {"a": 4})
    nested = quantised(wide, 4, group=16).specs(P(None, "a"), {"a": 2})
    assert (nested.values.packed, nested.values.scale) == (P(None, "a"), P(None, "a"))
