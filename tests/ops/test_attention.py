"""Attention against softmax written out, and the cache; models that decode with it:
contracts/test_decoders.py.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import ops
from jaxmodel.errors import InputError


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def naive(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """One query at a time, float64."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.zeros(q.shape)
    share = q.shape[2] // k.shape[1]
    for b, t, head in np.ndindex(q.shape[:3]):
        seen = np.flatnonzero(np.asarray(mask)[b, t])
        scores = k[b, head // share, seen] @ q[b, t, head] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, t, head] = weights / weights.sum() @ v[b, head // share, seen]
    return out


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_attention_is_softmax_written_out(heads, kv_heads):
    q = normal(2, 5, heads, 8)
    k = normal(2, kv_heads, 7, 8, seed=1)
    v = normal(2, kv_heads, 7, 8, seed=2)
    mask = np.random.default_rng(3).random((2, 5, 7)) < 0.6
    mask[:, :, 0] = True
    got = jax.jit(ops.attention, static_argnums=4)(
        q, k, v, ops.AttentionMask(mask=jnp.asarray(mask), causal=False), ops.Policy()
    )
    np.testing.assert_allclose(got, naive(q, k, v, mask), rtol=1e-5, atol=1e-5)


def test_what_is_masked_has_no_influence():
    q = normal(1, 3, 2, 8)
    k = normal(1, 2, 3, 8, seed=1)
    v = normal(1, 2, 3, 8, seed=2)
    seen = ops.AttentionMask()
    before = ops.attention(q, k, v, seen, ops.Policy())
    after = ops.attention(q, k.at[:, :, 2].set(1e4), v.at[:, :, 2].set(-1e4), seen, ops.Policy())
    np.testing.assert_array_equal(before[:, :2], after[:, :2])
    assert not np.allclose(before[:, 2], after[:, 2])


def test_attention_in_bfloat16():
    q = normal(2, 5, 4, 8)
    k = normal(2, 2, 5, 8, seed=1)
    v = normal(2, 2, 5, 8, seed=2)
    mask = np.broadcast_to(ops.AttentionMask().square(5, 5), (2, 5, 5))
    got = ops.attention(
        q,
        k,
        v,
        ops.AttentionMask(),
        ops.Policy(compute_dtype="bfloat16", activation_dtype="bfloat16"),
    )
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), naive(q, k, v, mask), atol=0.05)


def test_a_query_that_sees_nothing_is_finite():
    seen = ops.AttentionMask(mask=jnp.zeros((1, 1, 2), bool))
    for how in ("plain", "blockwise"):
        got = ops.attention(
            normal(1, 1, 1, 4),
            normal(1, 1, 2, 4),
            normal(1, 1, 2, 4),
            seen,
            ops.Policy(attention=how),
        )
        assert np.all(np.isfinite(got))


def test_what_is_seen():
    segments = np.array([[1, 1, 2, 2, 0], [1, 2, 2, 2, 2]])
    valid = np.array([[1, 1, 1, 1, 0], [1, 1, 0, 1, 1]], bool)
    pair = jnp.asarray(segments), jnp.asarray(segments)
    plain = ops.AttentionMask().square(5, 5)
    both = ops.AttentionMask(segments=pair, valid=jnp.asarray(valid)).square(5, 5)
    assert plain.shape == (1, 5, 5)
    for b, t, s in np.ndindex(2, 5, 5):
        assert bool(plain[0, t, s]) == (s <= t)
        assert bool(both[b, t, s]) == (s <= t and segments[b, t] == segments[b, s] and valid[b, s])
    query = jnp.asarray([[3, 4], [0, 1]], jnp.int32)
    moved = ops.AttentionMask(query=query, window=jnp.int32(3)).square(2, 5)
    near = ops.AttentionMask(window=2, causal=False).square(5, 5)
    part = ops.AttentionMask(segments=pair, window=3).square(2, 3, jnp.int32(3), 1)
    for b, t, s in np.ndindex(2, 2, 5):
        assert bool(moved[b, t, s]) == (0 <= int(query[b, t]) - s < 3)
    for t, s in np.ndindex(5, 5):
        assert bool(near[0, t, s]) == (abs(t - s) < 2)
    for b, t, s in np.ndindex(2, 2, 3):
        assert bool(part[b, t, s]) == (
            0 <= t + 3 - (s + 1) < 3 and segments[b, t + 3] == segments[b, s + 1]
        )


# ---------------------------------------------------------------------------------------- the cache


def test_the_cache_writes_each_row_behind_its_own_length():
    cache = ops.KVCache.zeros(2, 2, 1, 6, 4, ops.Policy())
    assert cache.capacity == 6
    cache = cache.advance(jnp.asarray([3, 1]))
    np.testing.assert_array_equal(cache.positions(2), [[3, 4], [1, 2]])
    k = normal(2, 2, 1, 4)
    v = normal(2, 2, 1, 4, seed=1)
    keys, values, seen, cache = jax.jit(lambda c: c.update(1, k, v))(cache)
    for b, start in enumerate((3, 1)):
        np.testing.assert_array_equal(keys[b, 0, start : start + 2], k[b, :, 0])
        np.testing.assert_array_equal(values[b, 0, start : start + 2], v[b, :, 0])
        for t in range(2):
            np.testing.assert_array_equal(seen.square(2, 6)[b, t], np.arange(6) <= start + t)
    assert not np.any(cache.k[0])  # the other layer
    np.testing.assert_array_equal(cache.k[1], keys)
    np.testing.assert_array_equal(cache.length, [3, 1])
    np.testing.assert_array_equal(cache.advance(2).length, [5, 3])


def test_a_layer_with_fewer_heads_uses_the_first_of_the_cache():
    cache = ops.KVCache.zeros(1, 1, 3, 4, 2, ops.Policy())
    k = normal(1, 1, 2, 2)
    keys, values, _, cache = cache.update(0, k, k)
    assert keys.shape == values.shape == (1, 2, 4, 2)
    np.testing.assert_array_equal(keys[0, :, 0], k[0, 0])
    assert not np.any(cache.k[:, :, 2])


@pytest.mark.parametrize(
    ("policy", "dtype"),
    [({"cache_dtype": "bfloat16"}, "bfloat16"), ({"compute_dtype": "bfloat16"}, "bfloat16")],
)
def test_dtype_of_the_cache(policy, dtype):
    cache = ops.KVCache.zeros(1, 1, 1, 2, 4, ops.Policy(**policy))
    assert cache.k.dtype == cache.v.dtype == dtype
    assert cache.update(0, normal(1, 1, 1, 4), normal(1, 1, 1, 4))[3].k.dtype == dtype


@pytest.mark.parametrize("heads", [1, 2])
def test_a_causal_square_in_parts_is_the_whole(heads):
    """Long prompts leave out what the mask would hide."""
    q = normal(2, 256, 2, 8)
    k = normal(2, heads, 256, 8, seed=1)
    v = normal(2, heads, 256, 8, seed=2)
    segments = jnp.asarray(np.repeat([[1, 2], [1, 1]], 128, axis=1), jnp.int32)
    seen = ops.AttentionMask(segments=(segments, segments))
    square = dataclasses.replace(
        seen, mask=seen.square(256, 256), causal=False
    )  # not known to be causal: no parts
    run = jax.jit(ops.attention, static_argnums=4)
    whole, parts = (run(q, k, v, how, ops.Policy()) for how in (square, seen))
    np.testing.assert_allclose(parts, whole, atol=1e-6)


# ---------------------------------------------------------------------------------------- blockwise

SEEN = {
    "causal": lambda b, t: ops.AttentionMask(),
    "both ways": lambda b, t: ops.AttentionMask(causal=False),
    "window": lambda b, t: ops.AttentionMask(window=jnp.int32(300)),
    "window both ways": lambda b, t: ops.AttentionMask(window=jnp.int32(100), causal=False),
    "segments": lambda b, t: ops.AttentionMask(
        segments=(jnp.sort(jnp.arange(b * t).reshape(b, t) % 5),) * 2
    ),
    "padding": lambda b, t: ops.AttentionMask(
        valid=jnp.arange(t)[None] < jnp.asarray([t, t // 3])[:, None], causal=False
    ),
    "places": lambda b, t: ops.AttentionMask(
        query=jnp.asarray([[0], [37]], jnp.int32) + jnp.arange(t, dtype=jnp.int32)[None] // 2
    ),
    "a mask": lambda b, t: ops.AttentionMask(
        mask=jnp.asarray((np.random.default_rng(5).random((1, t, t)) < 0.5) | np.eye(t, dtype=bool))
    ),
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def with_gradients(
    how: str,
    softcap: float | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    weight: jax.Array,
    seen: ops.AttentionMask,
):
    def total(q, k, v):
        out = ops.attention(q, k, v, seen, ops.Policy(attention=how), scale=0.5, softcap=softcap)
        return jnp.sum(out * weight), out

    return jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)


@pytest.mark.parametrize("name", SEEN)
@pytest.mark.parametrize("t", [700, 1024])  # whole blocks, and not
def test_blockwise_equals_plain_with_its_gradients(name, t):
    """Plain attention is told what is seen by its square, so that one program of it serves them
    all.
    """
    arrays = [
        normal(2, *shape, seed=i)
        for i, shape in enumerate([(t, 4, 8), (2, t, 8), (2, t, 8), (t, 4, 8)])
    ]
    seen = SEEN[name](2, t)
    softcap = 2.0 if name == "window" else None
    square = ops.AttentionMask(
        mask=jnp.asarray(np.broadcast_to(jax.jit(lambda: seen.square(t, t))(), (2, t, t))),
        causal=False,
    )
    (_, want), grads = with_gradients("plain", softcap, *arrays, square)
    (_, got), got_grads = with_gradients("blockwise", softcap, *arrays, seen)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    for a, b in zip(got_grads, grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("name", ["causal", "window", "padding"])
def test_sinks_take_of_every_weight(name):
    """As a key more whose value is zero, in each way of computing; with their gradients."""
    t = 300
    heads = 4
    q, k, v, weight = (
        normal(2, *shape, seed=i)
        for i, shape in enumerate([(t, 4, 8), (2, t, 8), (2, t, 8), (t, 4, 8)])
    )
    sinks = 2 * normal(heads, seed=5)
    seen = SEEN[name](2, t)
    see = np.broadcast_to(seen.square(t, t), (2, t, t))
    scores = np.einsum(
        "bthd,bhsd->bhts", np.asarray(q, np.float64), np.repeat(k, 2, axis=1)
    ) / np.sqrt(8)
    sums = np.where(see[:, None], np.exp(scores), 0)
    share = sums / (
        sums.sum(-1, keepdims=True) + np.exp(np.asarray(sinks, np.float64))[:, None, None]
    )
    want = np.einsum("bhts,bhsd->bthd", share, np.repeat(v, 2, axis=1))
    of_value = np.einsum("bthd,bthd->bht", want, np.asarray(weight, np.float64))
    of_sinks = -np.einsum(
        "bht,bht->h", 1 - share.sum(-1), of_value
    )  # that of a score whose value is zero

    @functools.partial(jax.jit, static_argnums=0)
    def run(how, *arrays):
        def total(q, k, v, sinks):
            out = ops.attention(q, k, v, seen, ops.Policy(attention=how), sinks=sinks)
            return jnp.sum(out * weight), out

        return jax.value_and_grad(total, argnums=(0, 1, 2, 3), has_aux=True)(*arrays)

    ((_, plain), grads), ((_, got), got_grads) = (
        run(how, q, k, v, sinks) for how in ("plain", "blockwise")
    )
    for out in (plain, got):
        np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)
    for a, b in zip(got_grads, grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)
    np.testing.assert_allclose(got_grads[3], of_sinks, rtol=1e-3, atol=1e-3)


def test_a_query_that_sees_its_sink_alone_gets_nothing():
    seen = ops.AttentionMask(mask=jnp.zeros((1, 1, 2), bool))
    for how in ("plain", "blockwise"):
        arrays = normal(1, 1, 1, 4), normal(1, 1, 2, 4), normal(1, 1, 2, 4)
        got = ops.attention(*arrays, seen, ops.Policy(attention=how), sinks=jnp.zeros(1))
        np.testing.assert_array_equal(got, np.zeros((1, 1, 1, 4)))


def test_blockwise_holds_no_square():
    """32k positions, which plain attention would need tens of gigabytes for: the compiler's own
    account.
    """
    t = 32768
    heads = 8
    q, k = (
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, t, heads, 64), (1, heads, t, 64))
    )

    def loss(how, q, k, v):
        return jnp.sum(ops.attention(q, k, v, ops.AttentionMask(), ops.Policy(attention=how)))

    def needs(how):
        memory = (
            jax.jit(jax.grad(functools.partial(loss, how), argnums=(0, 1, 2)))
            .lower(q, k, k)
            .compile()
            .memory_analysis()
        )
        return (
            memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
        )

    assert needs("auto") < 2e9 < 30e9 < needs("plain")


def test_scale_softcap_and_bias():
    q = normal(1, 3, 4, 8)
    k = normal(1, 2, 5, 8, seed=1)
    v = normal(1, 2, 5, 8, seed=2)
    bias = normal(1, 4, 3, 5, seed=3)
    got = ops.attention(
        q, k, v, ops.AttentionMask(causal=False), ops.Policy(), scale=0.7, softcap=1.5, bias=bias
    )
    scores = np.einsum("bthd,bhsd->bhts", np.asarray(q), np.repeat(k, 2, axis=1)) * 0.7
    scores = 1.5 * np.tanh(scores / 1.5) + np.asarray(bias)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    want = np.einsum("bhts,bhsd->bthd", weights, np.repeat(v, 2, axis=1))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="does not support relative position biases"):
        ops.attention(
            q, k, v, ops.AttentionMask(causal=False), ops.Policy(attention="blockwise"), bias=bias
        )
