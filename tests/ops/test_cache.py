"""The cache: what many rows write in a loop is what few write one by one, and codes for numbers."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import tree
from jaxmodel.errors import InputError
from jaxmodel.models import llama
from jaxmodel.ops import KVCache, Policy
from jaxmodel.ops.cache import UNROLLED, Rounded
from jaxmodel.ops.memory import CrossAttentionCache

L = 2
B = UNROLLED + 3
K = 2
S = 6
h = 4
T = 2


def test_many_rows_are_written_as_few_are():
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.normal(size=(B, T, K, h)), jnp.float32) for _ in range(2))
    lengths = jnp.asarray(rng.integers(0, S - T + 1, B), jnp.int32)
    empty = KVCache.zeros(L, B, K, S, h, Policy())
    assert isinstance(empty.k, jax.Array) and isinstance(empty.v, jax.Array)
    cache = KVCache(empty.k, empty.v - 1, lengths)
    keys, values, _, after = cache.update(1, k, v)
    want_k = np.zeros((L, B, K, S, h), np.float32)
    want_v = np.full((L, B, K, S, h), -1, np.float32)
    for b, n in enumerate(lengths.tolist()):
        want_k[1, b, :, n : n + T], want_v[1, b, :, n : n + T] = (
            np.swapaxes(a[b], 0, 1) for a in (k, v)
        )
        few = KVCache(empty.k[:, b : b + 1], empty.v[:, b : b + 1] - 1, lengths[b : b + 1]).update(
            1, k[b : b + 1], v[b : b + 1]
        )[3]
        np.testing.assert_array_equal(
            jax.tree.leaves(few.k)[0][:, 0], jax.tree.leaves(after.k)[0][:, b]
        )
    np.testing.assert_array_equal(after.k, want_k)
    np.testing.assert_array_equal(after.v, want_v)
    np.testing.assert_array_equal(keys, want_k[1])
    np.testing.assert_array_equal(values, want_v[1])
    assert len(set(lengths.tolist())) > 2


def by_hand(x: np.ndarray, bits: int) -> np.ndarray:
    """What a cache of codes holds of x: scale and minimum in float16, four bits of a turned x."""

    def up(top: np.ndarray) -> np.ndarray:
        step = top.astype(np.float16)
        step = np.where(step < top, np.nextafter(step, np.float16(np.inf)), step)
        return step.astype(np.float64)

    wide = x.astype(np.float64)
    if bits == 8:
        step = up(np.abs(wide).max(-1, keepdims=True) / 127)
        return np.round(wide / np.where(step > 0, step, 1)) * step
    turned = np.ones((1, 1))
    while len(turned) < x.shape[-1]:
        turned = np.kron(turned, [[1, 1], [1, -1]]) / 2**0.5
    wide = wide @ turned
    first, span = wide.min(-1, keepdims=True), np.ptp(wide, axis=-1, keepdims=True)
    best = np.full(wide.shape, np.inf)
    for share in (1.0, 0.92, 0.84, 0.76):
        low = (first + span * (1 - share) / 2).astype(np.float16).astype(np.float64)
        step = up(span * share / 15)
        near = np.clip(np.round((wide - low) / np.where(step > 0, step, 1)), 0, 15) * step + low
        less = ((near - wide) ** 2).sum(-1) < ((best - wide) ** 2).sum(-1)
        best = np.where(less[..., None], near, best)
    return best @ turned.T


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_near_the_numbers(bits):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(5, 7, 16)) * rng.lognormal(sigma=3, size=(5, 7, 1)) + 3).astype("f4")
    x[0, 0] = 0  # no scale
    x[0, 1] = 1e-7  # below what float16 can hold
    rounded = jax.jit(Rounded.of, static_argnums=1)(jnp.asarray(x), bits)
    got = np.asarray(rounded.decode())
    scale = np.abs(x).max(-1, keepdims=True) + 1e-3
    np.testing.assert_allclose(got / scale, by_hand(x, bits) / scale, atol=1e-3)
    error = np.abs(got - x)
    assert np.all(error <= scale * (0.6 / 127 if bits == 8 else 4 / 15))
    assert rounded.shape == x.shape
    assert tree.nbytes(rounded) * 8 == x.size * {8: 8 + 1, 4: 4 + 2}[bits]


@pytest.mark.parametrize("bits", [8, 4])
def test_a_cache_of_codes_gives_rounded_keys_and_values(bits):
    rng = np.random.default_rng(bits)
    k, v = (jnp.asarray(rng.normal(size=(B, T, K, h)), jnp.float32) for _ in range(2))
    policy = Policy(cache_dtype=f"int{bits}")
    cache = KVCache.zeros(L, B, K, S, h, policy).advance(jnp.arange(B, dtype=jnp.int32) % 4)
    keys, values, _, cache = jax.jit(lambda c, k, v: c.update(1, k, v))(cache, k, v)
    few = jax.tree.map(lambda a: a[:, :2], KVCache(cache.k, cache.v, cache.length[None]))
    few = dataclasses.replace(few, length=few.length[0])
    keys_of_few = jax.jit(lambda c, k, v: c.update(1, k, v))(few, k[:2], v[:2])[0]
    np.testing.assert_array_equal(keys_of_few, keys[:2])
    for got, x in ((keys, k), (values, v)):
        want = by_hand(np.asarray(x), bits)
        for b in range(B):
            rows = np.asarray(got[b, :, b % 4 : b % 4 + T]).swapaxes(0, 1)
            np.testing.assert_allclose(rows, want[b], atol=1e-6)
    read = CrossAttentionCache.zeros(L, B, K, S, h, policy).reading(
        jnp.ones((B, T), jnp.bool_), jnp.zeros((B, T, 1))
    )
    source, *_ = read.remember(1, k.swapaxes(1, 2), v.swapaxes(1, 2)).recall(1, K)
    np.testing.assert_allclose(
        np.asarray(source).swapaxes(1, 2), by_hand(np.asarray(k), bits), atol=1e-6
    )


def test_logits_with_a_cache_of_codes():
    model = llama.model(llama.SIZES["tiny"])
    coded = {f"int{n}": model.with_policy(Policy(cache_dtype=f"int{n}")) for n in (8, 4)}

    @jax.jit
    def run(key):
        assert model.init_cache is not None
        params = model.init(key)
        tokens = jax.random.randint(key, (2, 12), 0, model.config.vocab)
        found = {"whole": (model.apply(params, tokens).logits, model.init_cache(2, 16))}
        for name, other in coded.items():
            assert other.init_cache is not None
            first = other.apply(params, tokens[:, :8], other.init_cache(2, 16))
            second = other.apply(params, tokens[:, 8:], first.cache)
            both = jnp.concatenate([first.logits, second.logits], axis=1)
            found[name] = both, second.cache
        return found

    found = run(jax.random.key(0))
    whole, floats = found["whole"]
    width = model.config.head_width
    for name, rest, low, high in (
        ("int8", width + 2, 1e-4, 0.03),
        ("int4", width / 2 + 4, 0.03, 0.5),
    ):
        logits, cache = found[name]
        assert tree.nbytes(cache.k) * 4 * width == tree.nbytes(floats.k) * rest
        assert low < float(jnp.max(jnp.abs(logits - whole)) / jnp.std(whole)) < high


def test_four_bits_need_an_even_width():
    with pytest.raises(InputError, match="cache_dtype: 'int4' with heads of width 3; allowed: an"):
        KVCache.zeros(1, 1, 1, 4, 3, Policy(cache_dtype="int4"))
    with pytest.raises(InputError, match=r"cache_dtype: 'int5' is not known.*nearest: int8, int4"):
        Policy(cache_dtype="int5")
