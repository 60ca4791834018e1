"""Attention: softmax in float32, heads in groups, and visibility described by `AttentionMask`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodel.errors import InputError
from jaxmodel.ops.blockwise import blockwise, heads_grouped, heads_joined
from jaxmodel.ops.policy import Policy
from jaxmodel.ops.product import product
from jaxmodel.ops.ring import ring, ring_axis
from jaxmodel.ops.seen import AttentionMask, masked

# Causal attention runs its queries in up to this many parts, each with only the keys it can see ...
CAUSAL_PARTS = 8
CAUSAL_ROWS = 128  # ... and at least this many queries: smaller parts cost more than they save
BLOCKWISE_FROM = 4096**2  # number of query-key pairs from which "auto" is blockwise


def attention(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B K S h"],
    v: Float[Array, "B K S h"],
    seen: AttentionMask,
    policy: Policy,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Float[Array, "#B H T S"] | None = None,
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "B T H h"]:
    """Compute `softmax(softcap(scale q k^T) + bias) v`.

    Groups of query heads share a key head (Ainslie et al., 2023). Where the mesh splits positions
    (`T` in `policy.axes`), keys and values are passed around a ring of devices (see
    `jaxmodel.ops.ring`). With a bias or a mask, or if the number of positions is not divisible, the
    devices gather them instead.

    Args:
      q: queries; H is a multiple of K.
      k: keys; the positions of a head are contiguous, so that a cache is read in order.
      v: values.
      seen: which keys each query sees.
      policy: `compute` is the dtype of the operands; `attention` chooses the algorithm: "plain"
        holds all scores at once, "blockwise" needs memory linear in length, "auto" chooses by
        length.
      scale: the factor of the scores; `1 / sqrt(h)` by default.
      softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2, 2024).
      bias: added to the scores (relative positions).
      sinks: an extra score for each head that takes part in the softmax but has no value (Xiao et
        al., 2023; gpt-oss, 2025).

    Raises:
      InputError: a bias is given with blockwise attention.
    """
    t = q.shape[1]
    s = k.shape[2]
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    axis = None if bias is not None else ring_axis(t, s, seen, policy)
    if axis is not None:
        return ring(q, k, v, seen, policy, factor, softcap, axis, sinks)
    long = policy.attention == "auto" and t * s >= BLOCKWISE_FROM and t > 1 and bias is None
    if policy.attention == "blockwise" or long:
        if bias is not None:
            raise InputError(
                "policy.attention: 'blockwise' does not support relative position biases; allowed: "
                "'plain', 'auto'"
            )
        return blockwise(q, k, v, seen, policy, factor, softcap, sinks)
    count = min(CAUSAL_PARTS, t // CAUSAL_ROWS)
    if not (seen.causal and t == s and count > 1 and t % count == 0):
        return _plain(q, k, v, seen.square(t, s), policy, factor, softcap, bias, sinks)
    # no query sees keys after the end of its part, which saves nearly half of the work
    size = t // count
    parts = []
    for start in range(0, t, size):
        stop = start + size
        square = seen.square(size, stop, start)
        near = None if bias is None else bias[:, :, start:stop, :stop]
        parts.append(
            _plain(
                q[:, start:stop],
                k[:, :, :stop],
                v[:, :, :stop],
                square,
                policy,
                factor,
                softcap,
                near,
                sinks,
            )
        )
    return jnp.concatenate(parts, axis=1)


def _plain(
    q: Array,
    k: Array,
    v: Array,
    square: Array,
    policy: Policy,
    scale: float,
    softcap: float | None,
    bias: Array | None,
    sinks: Array | None,
) -> Array:
    b, t, heads, width = q.shape
    groups = heads // k.shape[1]
    compute = jnp.dtype(policy.compute_dtype)
    # the query heads of one key head, at all positions, are the rows of one product
    q = heads_grouped(q, k.shape[1]).reshape(b, k.shape[1], groups * t, width)
    scores = product("bknh,bksh->bkns", q, k, compute) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = scores.reshape(b, k.shape[1], groups, t, -1)
    if bias is not None:
        scores = scores + bias.astype(jnp.float32).reshape(
            bias.shape[0], k.shape[1], groups, *bias.shape[2:]
        )
    scores = masked(scores, square)
    if sinks is not None:
        of_head = sinks.astype(jnp.float32).reshape(1, k.shape[1], groups, 1, 1)
        scores = jnp.concatenate(
            [scores, jnp.broadcast_to(of_head, (*scores.shape[:-1], 1))], axis=-1
        )
    weights = jax.nn.softmax(scores, axis=-1)
    weights = (weights if sinks is None else weights[..., :-1]).reshape(
        b, k.shape[1], groups * t, -1
    )
    out = product("bkns,bksh->bknh", weights, v, compute, policy.activation_dtype)
    return heads_joined(out.reshape(b, k.shape[1], groups, t, width)).astype(
        policy.activation_dtype
    )
