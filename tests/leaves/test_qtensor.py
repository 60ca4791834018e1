"""`QTensor` against the formula in plain numpy, bytes counted by hand, and broken leaves
refused.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import PartitionSpec as P

from jaxmodel.errors import InputError
from jaxmodel.leaves import QTensor
from jaxmodel.leaves.packing import codes_per_unit

OUT = 3
ENCODE = jax.jit(QTensor.from_codes, static_argnames=("bits", "group"))
READ = jax.jit(lambda leaf: (leaf.codes(), leaf.decode()))


def groups_of(n: int, group: int | None) -> int:
    return 1 if group is None else -(-n // group)


def random_codes(bits: int, affine: bool, shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if affine:
        return rng.integers(0, 2**bits, shape)
    return (
        rng.choice([-1, 1], shape)
        if bits == 1
        else rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape)
    )


def make(
    bits: int,
    affine: bool,
    n: int,
    scales: str,
    group: int | None,
    lead: tuple[int, ...] = (),
    seed: int = 0,
):
    """A leaf and, in float64, the weight that it stands for."""
    rng = np.random.default_rng(seed + 1)
    shape = (*lead, 1 if scales == "tensor" else OUT, groups_of(n, group))
    codes = random_codes(bits, affine, (*lead, OUT, n), seed)
    scale = rng.uniform(0.5, 2, shape).astype(np.float32)
    minimum = rng.normal(size=shape).astype(np.float32) if affine else None
    weight = np.zeros((*lead, OUT, n))
    for index in np.ndindex(weight.shape):
        *first, row, i = index
        place = (*first, 0 if scales == "tensor" else row, 0 if group is None else i // group)
        weight[index] = float(scale[place]) * codes[index] + (
            float(minimum[place]) if affine else 0.0
        )
    arrays = (
        jnp.asarray(codes, jnp.int32),
        jnp.asarray(scale),
        None if minimum is None else jnp.asarray(minimum),
    )
    return ENCODE(*arrays, bits=bits, group=group), codes, weight


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, bool, int, str, int | None, tuple[int, ...]]:
    bits = draw(st.integers(1, 8))
    affine = draw(st.booleans())
    scales = draw(st.sampled_from(["tensor", "row", "group"]))
    group = draw(st.sampled_from([8, 16])) if scales == "group" else None
    return (
        bits,
        affine,
        draw(st.sampled_from([13, 16])),
        scales,
        group,
        draw(st.sampled_from([(), (2,)])),
    )


@settings(max_examples=30, deadline=None)
@given(cases(), st.integers(0, 1000))
def test_decode_is_the_formula(case, seed):
    leaf, codes, weight = make(*case, seed=seed)
    assert leaf.shape == weight.shape
    assert leaf.size == weight.size
    found, decoded = READ(leaf)
    assert leaf.dtype == decoded.dtype == jnp.float32
    np.testing.assert_array_equal(found, codes)
    np.testing.assert_allclose(decoded, weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", range(1, 9))
def test_bytes_are_counted_exactly(bits):
    for n, group, affine in (
        (64, None, False),
        (64, 16, False),
        (64, 16, True),
        (13, None, False),
        (13, 8, True),
    ):
        leaf, _, _ = make(bits, affine, n, "row", group)
        unit = 1 if bits == 8 else codes_per_unit(bits)
        padded = -(-n // (group or unit)) * (group or unit)
        want = OUT * (padded * bits // 8 + groups_of(n, group) * 4 * (1 + affine))
        assert leaf.nbytes == want
        assert leaf.bits_per_weight == pytest.approx(8 * want / (OUT * n))


def test_int4_in_groups_of_64_with_16_bit_scales_is_four_and_a_quarter_bits():
    codes = jnp.zeros((8, 256), jnp.int32)
    scale = jnp.ones((8, 4), jnp.float16)
    leaf = QTensor.from_codes(codes, scale, bits=4, group=64)
    assert leaf.bits_per_weight == 4.25
    affine = QTensor.from_codes(codes, scale, scale, bits=4, group=64)
    assert affine.bits_per_weight == 4.5


def test_eight_bit_symmetric_codes_are_stored_as_they_are():
    leaf, codes, _ = make(8, False, 13, "row", None)
    assert leaf.packed.dtype == jnp.int8
    assert leaf.pad == 0
    np.testing.assert_array_equal(leaf.packed, codes)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_decode_in_a_narrow_dtype(dtype):
    leaf, _, weight = make(4, True, 16, "group", 8)
    narrow = leaf.decode(dtype)
    assert narrow.dtype == dtype
    np.testing.assert_allclose(narrow.astype(jnp.float32), weight, rtol=0.02, atol=0.1)


def test_one_group_longer_than_the_row():
    leaf, codes, weight = make(4, False, 5, "row", 64)
    assert leaf.shape == (OUT, 5)
    assert leaf.pad == 59
    found, decoded = READ(leaf)
    np.testing.assert_array_equal(found, codes)
    np.testing.assert_allclose(decoded, weight, rtol=1e-6)


# -------------------------------------------------------------------------------- broken invariants

GOOD, _, _ = make(4, True, 16, "group", 8)
WHOLE, _, _ = make(8, False, 16, "row", None)


@pytest.mark.parametrize(
    ("leaf", "change", "message"),
    [
        (GOOD, {"bits": 0}, "bits is 0; allowed: 1 to 8"),
        (GOOD, {"bits": 9}, "bits is 9; allowed: 1 to 8"),
        (GOOD, {"packed": GOOD.packed.astype(jnp.int8)}, "packed has dtype int8; uint8 is needed"),
        (
            WHOLE,
            {"packed": WHOLE.packed.astype(jnp.uint8)},
            "packed has dtype uint8; int8 is needed",
        ),
        (WHOLE, {"minimum": WHOLE.scale}, "packed has dtype int8; uint8 is needed"),
        (GOOD, {"packed": GOOD.packed[0]}, "at least"),
        (GOOD, {"bits": 3}, "not whole bytes"),
        (GOOD, {"scale": GOOD.scale.astype(jnp.int32)}, "scale has dtype int32"),
        (GOOD, {"scale": GOOD.scale[0]}, "scale has shape"),
        (GOOD, {"scale": GOOD.scale[:2]}, "scale has shape"),
        (GOOD, {"scale": GOOD.scale[:, :0]}, "0 groups do not divide"),
        (
            GOOD,
            {"scale": jnp.ones((OUT, 3)), "minimum": jnp.ones((OUT, 3))},
            "3 groups do not divide 16 codes",
        ),
        (
            GOOD,
            {"scale": GOOD.scale[:1], "minimum": GOOD.minimum[:1]},
            "groups need a scale for every row",
        ),
        (GOOD, {"minimum": GOOD.minimum[:, :1]}, "minimum differs from scale"),
        (GOOD, {"minimum": GOOD.minimum.astype(jnp.float16)}, "minimum differs from scale"),
        (GOOD, {"pad": 8}, "pad is 8"),
        (GOOD, {"pad": -1}, "pad is -1"),
        (WHOLE, {"pad": 16}, "pad is 16"),
        (GOOD, {"activations": "int4"}, "activations is 'int4'; allowed: None, 'int8'"),
    ],
)
def test_check_refuses_a_broken_leaf(leaf, change, message):
    leaf.check()
    with pytest.raises(InputError, match=f"QTensor: .*{message}"):
        dataclasses.replace(leaf, **change).check()


def test_from_codes_refuses_scales_that_do_not_fit_the_groups():
    codes = jnp.zeros((2, 64), jnp.int32)
    for groups in (1, 2, 8):
        with pytest.raises(InputError, match=f"{groups} scales per row do not fit groups of 16"):
            QTensor.from_codes(codes, jnp.ones((2, groups)), bits=4, group=16)
    with pytest.raises(
        InputError, match="whole bytes"
    ):  # three groups of 12 codes of 3 bits end within a byte
        QTensor.from_codes(codes[:, :36], jnp.ones((2, 3)), bits=3, group=12)


# ---------------------------------------------------------------------------------------- on a mesh


def test_specs_of_the_parts():
    sizes = {"a": 2, "b": 2}
    specs = GOOD.specs(P("a", "b"), sizes)
    assert (specs.packed, specs.scale, specs.minimum) == (P("a", "b"), P("a", "b"), P("a", "b"))
    assert (specs.bits, specs.pad, specs.activations) == (GOOD.bits, GOOD.pad, GOOD.activations)
    row, _, _ = make(8, False, 16, "row", None, lead=(2,))
    assert row.specs(P(None, "a", "b"), sizes).scale == P(None, "a", None)
    tensor, _, _ = make(8, False, 16, "tensor", None)
    assert tensor.specs(P("a", ("b",)), sizes).scale == P(None, None)
    assert tensor.specs(P(), sizes).packed == P(None, None)


def test_specs_refuses_to_split_a_group_or_a_byte():
    with pytest.raises(
        InputError, match="cuts the last axis of 16 codes into 4 parts, which splits a group of 8"
    ):
        GOOD.specs(P(None, "a"), {"a": 4})
    nibbles, _, _ = make(4, False, 2, "row", None)
    with pytest.raises(InputError, match="splits a byte of 2"):
        nibbles.specs(P(None, "a"), {"a": 2})
    padded, _, _ = make(4, False, 14, "group", 8)
    with pytest.raises(InputError, match="last axis of 14"):
        padded.specs(P(None, "a"), {"a": 2})


def test_arithmetic_stays_in_the_requested_dtype_under_jit():
    leaf, _, weight = make(3, False, 16, "row", None, lead=(2,))
    decoded = jax.jit(lambda leaf: leaf.decode(jnp.float32))(leaf)
    np.testing.assert_allclose(decoded, weight, rtol=1e-6)
    with pytest.raises(dataclasses.FrozenInstanceError):
        leaf.bits = 4
