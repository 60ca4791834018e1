"""Packed codes against bit arithmetic on Python's own integers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jaxmodel.leaves.packing import (
    codes_per_unit,
    pack,
    pack_trits,
    packed_length,
    pad_last,
    unpack,
    unpack_trits,
    unpacked_length,
)

BITS = range(1, 9)
PACK = jax.jit(pack, static_argnums=1)
UNPACK = jax.jit(unpack, static_argnums=1)


def pack_row(codes: list[int], bits: int) -> bytes:
    """The documented layout, a unit of codes at a time: as one big integer, or as one integer for
    each bit.
    """
    unit = codes_per_unit(bits)
    out = b""
    for start in range(0, len(codes), unit):
        part = codes[start : start + unit]
        if bits in (1, 2, 4, 8):
            out += bytes([sum(code << (i * bits) for i, code in enumerate(part))])
        else:
            out += bytes(
                sum((code >> bit & 1) << i for i, code in enumerate(part)) for bit in range(bits)
            )
    return out


@st.composite
def arrays(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    bits = draw(st.sampled_from(BITS))
    lead = draw(st.sampled_from([(), (2, 3)]))
    n = codes_per_unit(bits) * draw(st.sampled_from([1, 3]))
    seed = draw(st.integers(0, 2**31))
    return np.random.default_rng(seed).integers(0, 2**bits, (*lead, n)), bits


@settings(max_examples=40, deadline=None)
@given(arrays())
def test_pack_has_the_documented_layout_and_unpack_inverts_it(case):
    codes, bits = case
    packed = PACK(jnp.asarray(codes, jnp.uint8), bits)
    assert packed.dtype == jnp.uint8
    assert packed.shape == (*codes.shape[:-1], packed_length(codes.shape[-1], bits))
    rows = codes.reshape(-1, codes.shape[-1])
    packed_rows = np.asarray(packed).reshape(-1, packed.shape[-1])
    for row, packed_row in zip(rows.tolist(), packed_rows, strict=True):
        assert packed_row.tobytes() == pack_row(row, bits)
    back = UNPACK(packed, bits)
    assert back.dtype == jnp.uint8
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("bits", BITS)
def test_every_byte_is_used(bits):
    """All combinations of bytes are codes: nothing is wasted."""
    unit = codes_per_unit(bits)
    rng = np.random.default_rng(bits)
    packed = rng.integers(0, 256, (50, unit * bits // 8), dtype=np.uint8)
    codes = UNPACK(jnp.asarray(packed), bits)
    assert codes.shape == (50, unit)
    assert int(codes.max()) < 2**bits
    np.testing.assert_array_equal(PACK(codes, bits), packed)


@pytest.mark.parametrize("bits", BITS)
def test_a_unit_is_whole_bytes(bits):
    unit = codes_per_unit(bits)
    assert unit * bits % 8 == 0
    assert packed_length(3 * unit, bits) * 8 == 3 * unit * bits
    assert unpacked_length(packed_length(3 * unit, bits), bits) == 3 * unit


@pytest.mark.parametrize("bits", BITS)
def test_any_integer_dtype_packs_eagerly_and_under_vmap(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (2, 3 * codes_per_unit(bits)))
    packed = pack(jnp.asarray(codes, jnp.int32), bits)
    assert np.asarray(packed)[1].tobytes() == pack_row(codes[1].tolist(), bits)
    mapped = jax.jit(jax.vmap(lambda c: unpack(pack(c, bits), bits)))(
        jnp.asarray(codes, jnp.int8 if bits < 8 else jnp.uint8)
    )
    np.testing.assert_array_equal(mapped, codes)


@pytest.mark.parametrize(("n", "multiple", "extra"), [(5, 4, 3), (8, 4, 0), (1, 7, 6), (3, 1, 0)])
def test_pad_last(n, multiple, extra):
    array, added = pad_last(jnp.ones((2, n), jnp.int8), multiple)
    assert added == extra
    assert array.dtype == jnp.int8
    np.testing.assert_array_equal(array, np.pad(np.ones((2, n)), ((0, 0), (0, extra))))


def test_five_trits_are_the_digits_of_a_byte_to_base_three():
    codes = np.stack(np.meshgrid(*[np.arange(3)] * 5, indexing="ij"), axis=-1).reshape(1, -1)
    packed = np.asarray(jax.jit(pack_trits)(jnp.asarray(codes)))
    want = codes.reshape(-1, 5) @ 3 ** np.arange(5)
    np.testing.assert_array_equal(packed[0], want)
    np.testing.assert_array_equal(jax.jit(unpack_trits)(packed), codes)
