"""Blockwise attention: the same function as plain attention, with memory linear in length.

Queries and keys are taken a block at a time, and the softmax is kept as a running maximum, sum and
weighted mean (Rabe & Staats, 2021; Dao et al., 2022). The backward pass computes the scores of each
block again from the saved logarithm of each row's sum. Blocks that no query can see (later keys, or
keys outside the window) are skipped.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodel.ops.policy import Policy
from jaxmodel.ops.product import product
from jaxmodel.ops.seen import HIDDEN, AttentionMask, masked

QUERIES, KEYS = 256, 512  # lengths of a block


def blockwise(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B K S h"],
    v: Float[Array, "B K S h"],
    seen: AttentionMask,
    policy: Policy,
    scale: float,
    softcap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "B T H h"]:
    """Compute attention a block at a time; see `ops.attention`."""
    b = q.shape[0]
    t = q.shape[1]
    s = k.shape[2]
    compute = jnp.dtype(policy.compute_dtype)
    grouped = heads_grouped(q, k.shape[1])
    # Pad to whole blocks. Padded keys are hidden from all queries; results of padded queries are
    # dropped.
    extra, extra_keys = missing(t, s)
    grouped = longer(grouped, extra, 3)
    k = longer(k, extra_keys, 2)
    v = longer(v, extra_keys, 2)
    if extra or extra_keys:
        seen = padded(seen, b, t, s)
    sinks = None if sinks is None else sinks_grouped(sinks, k.shape[1])
    out = _blockwise(
        grouped.astype(compute), k.astype(compute), v.astype(compute), seen, sinks, scale, softcap
    )
    return heads_joined(out[:, :, :, :t]).astype(policy.activation_dtype)


def heads_grouped(q: Float[Array, "B T H h"], k_heads: int) -> Float[Array, "B K G T h"]:
    """Group the query heads that share a key head."""
    b, t, heads, width = q.shape
    return q.reshape(b, t, k_heads, heads // k_heads, width).transpose(0, 2, 3, 1, 4)


def heads_joined(out: Float[Array, "B K G T h"]) -> Float[Array, "B T H h"]:
    """Join the groups of `heads_grouped` again."""
    b, _, _, t, width = out.shape
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, -1, width)


def sinks_grouped(sinks: Float[Array, " H"], k_heads: int) -> Float[Array, "1 K G 1"]:
    """Group the sinks like the query heads."""
    return sinks.astype(jnp.float32).reshape(1, k_heads, -1, 1)


def missing(t: int, s: int) -> tuple[int, int]:
    """Return how many queries and keys must be added to have whole blocks."""
    return -t % min(QUERIES, t), -s % min(KEYS, s)


def longer(a: Array, extra: int, axis: int) -> Array:
    """Pad an array with `extra` zeros at the end of one axis."""
    return jnp.pad(a, [(0, extra if i == axis else 0) for i in range(a.ndim)])


def padded(seen: AttentionMask, b: int, t: int, s: int) -> AttentionMask:
    """Pad the conditions to whole blocks; no query sees the padded keys."""
    extra, extra_keys = missing(t, s)
    valid = jnp.ones((b, s), jnp.bool_) if seen.valid is None else seen.valid
    segments = seen.segments
    if segments is not None:
        segments = (longer(segments[0], extra, 1), longer(segments[1], extra_keys, 1))
    query = None if seen.query is None else longer(seen.query, extra, 1)
    mask = None if seen.mask is None else longer(longer(seen.mask, extra, 1), extra_keys, 2)
    return AttentionMask(
        query, segments, longer(valid, extra_keys, 1), seen.window, mask, seen.causal
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _blockwise(
    q: Array,
    k: Array,
    v: Array,
    seen: AttentionMask,
    sinks: Array | None,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B K G T h"]:
    return _save(q, k, v, seen, sinks, scale, softcap)[0]


def forward(
    q: Float[Array, "B K G T h"],
    k: Float[Array, "B K S h"],
    v: Float[Array, "B K S h"],
    seen: AttentionMask,
    scale: float,
    softcap: float | None,
) -> tuple[Float[Array, "B K G T h"], Float[Array, "B K G T"]]:
    """Compute attention over whole blocks, and the logarithm of each row's sum of weights.

    Both are float32. With the logarithms, results for parts of the keys can be combined. T is at
    most `QUERIES` or a multiple of it; likewise S and `KEYS`.
    """
    bq = min(QUERIES, q.shape[3])
    bk = min(KEYS, k.shape[2])

    def rows(i: Array) -> tuple[Array, Array]:
        block = jax.lax.dynamic_slice_in_dim(q, i * bq, bq, axis=3)

        def column(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, mean = carry
            scores, _ = _scores(block, _keys(k, j, bk), seen, i * bq, j * bk, scale, softcap)
            higher = jnp.maximum(top, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - higher[..., None])
            shrink = jnp.exp(top - higher)
            total = total * shrink + jnp.sum(weights, axis=-1)
            mean = mean * shrink[..., None] + product(
                "bkgts,bksh->bkgth", weights, _keys(v, j, bk), v.dtype
            )
            return higher, total, mean

        start = (
            jnp.full(block.shape[:-1], -jnp.inf),
            jnp.zeros(block.shape[:-1]),
            jnp.zeros(block.shape, jnp.float32),
        )
        top, total, mean = jax.lax.fori_loop(*_reach(seen, i, bq, bk, k.shape[2]), column, start)
        return mean / total[..., None], top + jnp.log(total)

    out, log_total = jax.lax.map(rows, jnp.arange(q.shape[3] // bq, dtype=jnp.int32))
    return _joined(out), _joined(log_total)


def backward(
    q: Float[Array, "B K G T h"],
    k: Float[Array, "B K S h"],
    v: Float[Array, "B K S h"],
    seen: AttentionMask,
    out: Float[Array, "B K G T h"],
    log_total: Float[Array, "B K G T"],
    g: Float[Array, "B K G T h"],
    scale: float,
    softcap: float | None,
) -> tuple[Float[Array, "B K G T h"], Float[Array, "B K S h"], Float[Array, "B K S h"]]:
    """Compute what these keys contribute to the gradients of q, k and v, in float32.

    `out` and `log_total` are the results over all keys.
    """
    bq = min(QUERIES, q.shape[3])
    bk = min(KEYS, k.shape[2])
    through = jnp.sum(g * out, axis=-1)  # the gradient through the normalisation of each row

    def rows(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], Array]:
        block, g_block, top, passed = (
            jax.lax.dynamic_slice_in_dim(a, i * bq, bq, axis=3) for a in (q, g, log_total, through)
        )

        def column(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dk, dv = carry
            keys = _keys(k, j, bk)
            values = _keys(v, j, bk)
            scores, slope = _scores(block, keys, seen, i * bq, j * bk, scale, softcap)
            weights = jnp.exp(scores - top[..., None])
            # a row that sees no key has no gradient
            weights = jnp.where(top[..., None] < HIDDEN / 2, 0.0, weights)
            dv = _add(dv, product("bkgts,bkgth->bksh", weights, g_block, v.dtype), j, bk)
            d_weights = product("bkgth,bksh->bkgts", g_block, values, v.dtype)
            d_scores = weights * (d_weights - passed[..., None]) * slope * scale
            dk = _add(dk, product("bkgts,bkgth->bksh", d_scores, block, q.dtype), j, bk)
            return dq + product("bkgts,bksh->bkgth", d_scores, keys, q.dtype), dk, dv

        start = jnp.zeros(block.shape, jnp.float32), *carry
        dq, dk, dv = jax.lax.fori_loop(*_reach(seen, i, bq, bk, k.shape[2]), column, start)
        return (dk, dv), dq

    zero = jnp.zeros(k.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(rows, (zero, zero), jnp.arange(q.shape[3] // bq, dtype=jnp.int32))
    return _joined(dq), dk, dv


def with_sinks(
    out: Float[Array, "B K G T h"],
    log_total: Float[Array, "B K G T"],
    sinks: Float[Array, "1 K G 1"] | None,
) -> tuple[Float[Array, "B K G T h"], Float[Array, "B K G T"]]:
    """Include the sinks in a result and in the logarithms of its sums.

    Sinks take a share of the weights and add no value.
    """
    if sinks is None:
        return out, log_total
    total = jnp.logaddexp(log_total, sinks)
    return out * jnp.exp(log_total - total)[..., None], total


def of_sinks(
    sinks: Float[Array, "1 K G 1"] | None,
    out: Float[Array, "B K G T h"],
    log_total: Float[Array, "B K G T"],
    g: Array,
) -> Float[Array, "1 K G 1"] | None:
    """Return the gradient of the sinks (keys with value zero), from the result of `with_sinks`."""
    if sinks is None:
        return None
    return -jnp.sum(
        jnp.exp(sinks - log_total) * jnp.sum(g * out, axis=-1), axis=(0, 3), keepdims=True
    )


def _save(
    q: Array,
    k: Array,
    v: Array,
    seen: AttentionMask,
    sinks: Array | None,
    scale: float,
    softcap: float | None,
) -> tuple[Array, Any]:
    out, log_total = with_sinks(*forward(q, k, v, seen, scale, softcap), sinks)
    return out, (q, k, v, seen, sinks, out, log_total)


def _pull(scale: float, softcap: float | None, saved: Any, g: Array) -> tuple[Any, ...]:
    q, k, v, seen, sinks, out, log_total = saved
    dq, dk, dv = backward(q, k, v, seen, out, log_total, g, scale, softcap)
    return (
        dq.astype(q.dtype),
        dk.astype(k.dtype),
        dv.astype(v.dtype),
        None,
        of_sinks(sinks, out, log_total, g),
    )


_blockwise.defvjp(_save, _pull)


def _scores(
    q: Array,
    k: Array,
    seen: AttentionMask,
    first: Array,
    first_key: Array,
    scale: float,
    softcap: float | None,
) -> tuple[Array, Array]:
    """Compute the scores of a block, and their derivative with respect to the uncapped scores."""
    scores = product("bkgth,bksh->bkgts", q, k, q.dtype) * scale
    slope = jnp.ones(())
    if softcap is not None:
        bent = jnp.tanh(scores / softcap)
        scores = softcap * bent
        slope = 1 - bent * bent
    return masked(scores, seen.square(q.shape[3], k.shape[2], first, first_key)), slope


def _reach(seen: AttentionMask, i: Array, bq: int, bk: int, s: int) -> tuple[Any, Any]:
    """Return the range of key blocks that the queries of block `i` can see.

    At least the first block is included, so that a row that sees no key is finite, as in plain
    attention.
    """
    first = jnp.zeros((), jnp.int32)
    stop = jnp.asarray(s // bk, jnp.int32)
    if seen.query is not None:
        low, high = (
            f(jax.lax.dynamic_slice_in_dim(seen.query, i * bq, bq, axis=1))
            for f in (jnp.min, jnp.max)
        )
    else:
        low = i * bq
        high = i * bq + bq - 1
    if seen.causal:
        stop = jnp.clip(high // bk + 1, 1, s // bk)
        if seen.window is not None:
            first = jnp.clip((low - seen.window + 1) // bk, 0, stop - 1)
    return first.astype(jnp.int32), stop.astype(jnp.int32)


def _keys(a: Array, j: Array, length: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(a, j * length, length, axis=2)


def _add(total: Array, part: Array, j: Array, length: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(
        total, _keys(total, j, length) + part, j * length, axis=2
    )


def _joined(blocks: Array) -> Array:
    """Reshape `[N, B, K, G, t, ...]` to `[B, K, G, N * t, ...]`."""
    moved = jnp.moveaxis(blocks, 0, 3)
    return moved.reshape(*moved.shape[:3], -1, *moved.shape[5:])
