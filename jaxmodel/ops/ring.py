"""Ring attention: queries stay; keys and values travel around the devices that hold the positions.

Each of n devices has T/n queries and S/n keys. In n steps the keys, with their segments and
validity, visit all devices. The softmax over all keys is combined from the results for the parts
and the logarithms of their sums (Liu, Zaharia & Abbeel, 2023). The backward pass sends keys and
values around again, together with their gradients, which return home with the last step. So a
device never holds more than its own part of the positions and one visiting part.

Blocks of keys that no query of a device can see (later keys, or outside the window) are skipped. A
causal ring still takes as long as its last device, which sees all keys. While a device works on
keys, these are already on their way to the next device, and so are the gradients of the keys
before.

Bytes that each device sends, where `k` and `v` are its part `B K S/n h` in `policy.compute_dtype`:
forward `(n - 1) (k + v)`; backward `(n - 1) (k + v)`, one less where XLA sees that the first step
repeats the forward pass, and as many elements in float32 for the gradients. Segments (4 bytes) and
validity (1 byte) of the keys go along both times, `(n - 1) B S/n` of each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodel.ops import blockwise
from jaxmodel.ops.policy import Policy
from jaxmodel.ops.seen import AttentionMask
from jaxmodel.sharding import auto_axes, axes_of

P = jax.P


def ring_axis(t: int, s: int, seen: AttentionMask, policy: Policy) -> str | None:
    """Return the mesh axis around which attention runs.

    It is None if positions are not split, or not in a way that the ring supports.

    Args:
      t: the number of queries.
      s: the number of keys.
      seen: which keys each query sees; an explicit mask rules the ring out.
      policy: `axes` puts `T` on a mesh axis.
    """
    names = axes_of("T", policy.axes)
    if len(names) != 1 or seen.mask is not None:
        return None
    n = auto_axes()[names[0]]
    return names[0] if n > 1 and t > 1 and t % n == 0 and s % n == 0 else None


def ring(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B K S h"],
    v: Float[Array, "B K S h"],
    seen: AttentionMask,
    policy: Policy,
    scale: float,
    softcap: float | None,
    axis: str,
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "B T H h"]:
    """Compute attention where T and S are split along the mesh axis `axis`; see `ops.attention`."""
    compute = jnp.dtype(policy.compute_dtype)
    sinks = None if sinks is None else blockwise.sinks_grouped(sinks, k.shape[1])
    grouped = blockwise.heads_grouped(q, k.shape[1]).astype(compute)
    out = _ring(grouped, k.astype(compute), v.astype(compute), seen, sinks, scale, softcap, axis)
    return blockwise.heads_joined(out).astype(policy.activation_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _ring(
    q: Array,
    k: Array,
    v: Array,
    seen: AttentionMask,
    sinks: Array | None,
    scale: float,
    softcap: float | None,
    axis: str,
) -> Float[Array, "B K G T h"]:
    return _save(q, k, v, seen, sinks, scale, softcap, axis)[0]


def _save(
    q: Array,
    k: Array,
    v: Array,
    seen: AttentionMask,
    sinks: Array | None,
    scale: float,
    softcap: float | None,
    axis: str,
) -> tuple[Array, Any]:
    rows = P(None, None, None, axis)
    keys = P(None, None, axis)
    run = functools.partial(_forward, scale=scale, softcap=softcap, axis=axis)
    out, log_total = _on(axis, run, (rows, keys, keys, _places(seen, axis)), (rows, rows))(
        q, k, v, seen
    )
    out, log_total = blockwise.with_sinks(out, log_total, sinks)
    return out, (q, k, v, seen, sinks, out, log_total)


def _pull(scale: float, softcap: float | None, axis: str, saved: Any, g: Array) -> tuple[Any, ...]:
    q, k, v, seen, sinks, out, log_total = saved
    rows = P(None, None, None, axis)
    keys = P(None, None, axis)
    run = functools.partial(_backward, scale=scale, softcap=softcap, axis=axis)
    specs = (rows, keys, keys, _places(seen, axis), rows, rows, rows)
    of_all = _on(axis, run, specs, (rows, keys, keys))(q, k, v, seen, out, log_total, g)
    return *of_all, None, blockwise.of_sinks(sinks, out, log_total, g)


_ring.defvjp(_save, _pull)


def _on(axis: str, run: Callable[..., Any], given: Any, returned: Any) -> Callable[..., Any]:
    return jax.shard_map(
        run, in_specs=given, out_specs=returned, axis_names={axis}, check_vma=False
    )


def _places(seen: AttentionMask, axis: str) -> AttentionMask:
    """Return how the arrays of `seen` are split."""
    row = lambda a: None if a is None else P(None, axis)
    segments = None if seen.segments is None else (P(None, axis), P(None, axis))
    window = None if seen.window is None else P()
    return AttentionMask(row(seen.query), segments, row(seen.valid), window, None, seen.causal)


# ----------------------------------------------------------------------------------- on each device


class _Own:
    """A device's own queries, and what they see of the keys that visit the device."""

    def __init__(self, q: Array, k: Array, v: Array, seen: AttentionMask, axis: str) -> None:
        self.axis = axis
        self.n = jax.lax.axis_size(axis)
        self.place = jax.lax.axis_index(axis)
        self.t = q.shape[3]
        self.s = k.shape[2]
        start = (self.place * self.t).astype(jnp.int32)
        here = start + jnp.arange(self.t, dtype=jnp.int32)[None]
        self.query = here if seen.query is None else seen.query
        extra, extra_keys = blockwise.missing(self.t, self.s)
        if extra or extra_keys:
            filled = AttentionMask(
                self.query, seen.segments, seen.valid, seen.window, None, seen.causal
            )
            seen = blockwise.padded(filled, q.shape[0], self.t, self.s)
        self.seen = seen
        keys, values = (blockwise.longer(a, extra_keys, 2) for a in (k, v))
        self.visitor = keys, values, None if seen.segments is None else seen.segments[1], seen.valid

    def rows(self, a: Array) -> Array:
        """Pad the queries, or arrays that belong to them, to whole blocks."""
        return blockwise.longer(a, blockwise.missing(self.t, self.s)[0], 3)

    def step(self, tree: Any) -> Any:
        """Send a tree to the next device."""
        return jax.tree.map(
            lambda a: jax.lax.ppermute(
                a, self.axis, [(i, (i + 1) % self.n) for i in range(self.n)]
            ),
            tree,
        )

    def of(self, visitor: Any, steps: Any) -> AttentionMask:
        """Return which keys the queries see, of keys that come from `steps` devices back."""
        first = (self.place - steps) % self.n * self.s
        query = blockwise.longer(
            self.query, blockwise.missing(self.t, self.s)[0], 1
        ) - first.astype(jnp.int32)
        segments = None if self.seen.segments is None else (self.seen.segments[0], visitor[2])
        return AttentionMask(query, segments, visitor[3], self.seen.window, None, self.seen.causal)

    def sees(self, seen: AttentionMask) -> Array:
        """Return whether any query can see any of these keys, by their distance."""
        query = seen.query[:, : self.t]
        low = jnp.min(query)
        high = jnp.max(query)
        any_key = jnp.ones((), jnp.bool_)
        if seen.causal:
            any_key &= high >= 0
        if seen.window is not None:
            any_key &= (low - (self.s - 1) < seen.window) & (-high < seen.window)
        return any_key


def _forward(
    q: Array,
    k: Array,
    v: Array,
    seen: AttentionMask,
    scale: float,
    softcap: float | None,
    axis: str,
) -> tuple[Array, Array]:
    own = _Own(q, k, v, seen, axis)
    queries = own.rows(q)

    def part(visitor: Any, seen: AttentionMask) -> tuple[Array, Array]:
        return blockwise.forward(queries, visitor[0], visitor[1], seen, scale, softcap)

    def with_these(found: tuple[Array, Array], visitor: Any, steps: Any) -> tuple[Array, Array]:
        seen = own.of(visitor, steps)
        return jax.lax.cond(
            own.sees(seen),
            lambda found: _together(found, part(visitor, seen)),
            lambda found: found,
            found,
        )

    def visit(
        carry: tuple[Any, tuple[Array, Array]], steps: Array
    ) -> tuple[tuple[Any, tuple[Array, Array]], None]:
        visitor, found = carry
        # the visitor travels on while it is worked on
        return (
            own.step(visitor),
            with_these(found, visitor, steps),
        ), None

    start = own.step(own.visitor), part(own.visitor, own.of(own.visitor, 0))
    (last, found), _ = jax.lax.scan(visit, start, jnp.arange(1, own.n - 1, dtype=jnp.int32))
    out, log_total = with_these(found, last, jnp.int32(own.n - 1))
    return out[:, :, :, : own.t], log_total[:, :, :, : own.t]


def _together(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
    """Combine the results over two sets of keys."""
    top = jnp.maximum(one[1], other[1])
    first = jnp.exp(one[1] - top)
    second = jnp.exp(other[1] - top)
    total = first + second
    return (one[0] * first[..., None] + other[0] * second[..., None]) / total[
        ..., None
    ], top + jnp.log(total)


def _backward(
    *arrays: Any, scale: float, softcap: float | None, axis: str
) -> tuple[Array, Array, Array]:
    q, k, v, seen, out, log_total, g = arrays
    own = _Own(q, k, v, seen, axis)
    queries, out, log_total, g = (own.rows(a) for a in (q, out, log_total, g))

    def part(visitor: Any, seen: AttentionMask) -> tuple[Array, Array, Array]:
        return blockwise.backward(
            queries, visitor[0], visitor[1], seen, out, log_total, g, scale, softcap
        )

    def of_these(dq: Array, visitor: Any, steps: Any) -> tuple[tuple[Array, Array], Array]:
        seen = own.of(visitor, steps)

        def some(dq: Array) -> tuple[tuple[Array, Array], Array]:
            dq_part, *of_keys = part(visitor, seen)
            return (of_keys[0], of_keys[1]), dq + dq_part

        return jax.lax.cond(own.sees(seen), some, lambda dq: (none, dq), dq)

    def visit(carry: tuple[Any, Any, Array], steps: Array) -> tuple[tuple[Any, Any, Array], None]:
        visitor, gradient, dq = carry
        # both travel while the visitor is worked on
        onward, arrived = (
            own.step(visitor),
            own.step(gradient),
        )
        here, dq = of_these(dq, visitor, steps)
        return (onward, jax.tree.map(jnp.add, arrived, here), dq), None

    visitor = own.step(own.visitor)
    dq, dk, dv = part(own.visitor, own.of(own.visitor, 0))
    none = jnp.zeros_like(dk), jnp.zeros_like(dv)
    onward = own.step(visitor) if own.n > 2 else visitor
    gradient, dq = of_these(dq, visitor, jnp.int32(1))
    # gradients follow one step behind their keys, so that the last step brings them home
    if own.n > 2:
        steps = jnp.arange(2, own.n - 1, dtype=jnp.int32)
        (visitor, gradient, dq), _ = jax.lax.scan(visit, (onward, gradient, dq), steps)
        arrived = own.step(gradient)
        here, dq = of_these(dq, visitor, jnp.int32(own.n - 1))
        gradient = jax.tree.map(jnp.add, arrived, here)
    home = own.step(gradient)
    dk = dk + home[0]
    dv = dv + home[1]
    return (
        dq[:, :, :, : own.t].astype(q.dtype),
        dk[:, :, : own.s].astype(k.dtype),
        dv[:, :, : own.s].astype(v.dtype),
    )
