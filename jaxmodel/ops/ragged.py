"""`ragged`: rows sorted by group, each contracted with its group's matrix (mixture of experts).

On an accelerator a plain array uses XLA's own ragged product. On a CPU that product computes every
row with every group (six times slower for 1,024 rows and 8 groups, thirty times for 4 rows), and no
accelerator knows our compressed leaves. In these cases the rows are cut into blocks of one group
each, and each block is an `einsum` with that group's slice of the leaf, so all leaf types work. It
has first derivatives in reverse mode, which `vmap` may map.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmodel.errors import InputError
from jaxmodel.leaves import Compressed
from jaxmodel.ops.contract import DEFAULT, einsum
from jaxmodel.ops.policy import Policy
from jaxmodel.ops.probe import GRADIENT, OF_TAKE, Probe, capped, histogram, norms
from jaxmodel.ops.product import precision

# the most rows of a block; larger blocks waste rows at the end of each group, smaller ones read the
# matrices more often
BLOCK = 64


def ragged(
    x: Float[Array, "N in"], w: Any, sizes: Int[Array, " E"], policy: Policy = DEFAULT
) -> Float[Array, "N out"]:
    """Compute `y[n] = w[group of n] x[n]` for rows sorted by group.

    The first `sizes[0]` rows belong to group 0, the next `sizes[1]` to group 1, and so on.

    Args:
      x: rows, sorted by group.
      w: `[E, out, in]`: an array, a compressed leaf or a `Probe`, which then measures each group's
        own rows.
      sizes: the number of rows of each group, together at most N; the results of later rows are
        zero.
      policy: the dtypes.

    Returns:
      y, in `policy.activation_dtype`; sums are float32.

    Raises:
      InputError: the shapes do not fit.
    """
    if len(w.shape) != 3 or sizes.shape != w.shape[:1] or x.shape[1] != w.shape[2]:
        raise InputError(
            f"ragged: x {x.shape}, w {w.shape}, sizes {sizes.shape} given; allowed: [N, in], [E, "
            "out, in], [E]"
        )
    return _of_leaf(x, w, sizes, policy).astype(policy.activation_dtype)


def _of_leaf(x: Array, w: Any, sizes: Array, policy: Policy) -> Array:
    if isinstance(w, Probe):
        y = _of_leaf(x, w.weight, sizes, policy)
        return _tap(
            y,
            jax.lax.stop_gradient(x),
            sizes,
            {name: zero for name, zero in w.zeros.items() if name not in OF_TAKE},
            w.cap,
        )
    y = _product(x, w, sizes, dataclasses.replace(policy, activation_dtype="float32", axes=()))
    row = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
    return jnp.where(row < jnp.sum(sizes, dtype=jnp.int32), y, jnp.float32(0))


# -------------------------------------------------------------------------------------- the product


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(x: Array, w: Any, sizes: Array, policy: Policy) -> Array:
    """Compute the product in float32; rows after the last group are undefined."""
    by_blocks = functools.partial(_by_blocks, policy=policy)
    by_group = functools.partial(_by_group, policy=policy)
    if isinstance(w, Compressed):
        return by_blocks(x, w, sizes)
    return jax.lax.platform_dependent(x, w, sizes, cpu=by_blocks, default=by_group)


def _forward(
    x: Array, w: Any, sizes: Array, policy: Policy
) -> tuple[Array, tuple[Array, Any, Array]]:
    return _product(x, w, sizes, policy), (x, w, sizes)


def _backward(policy: Policy, saved: tuple[Array, Any, Array], g: Array) -> tuple[Array, Any, None]:
    by_blocks = functools.partial(_by_blocks_backward, policy=policy)
    if isinstance(saved[1], Compressed):
        dx, dw = by_blocks(*saved, g)
    else:
        by_group = functools.partial(_by_group_backward, policy=policy)
        dx, dw = jax.lax.platform_dependent(*saved, g, cpu=by_blocks, default=by_group)
    return dx, dw, None


# JAX's own transpose of the loop would add a gradient of the whole leaf for every block
_product.defvjp(_forward, _backward)


def _by_group(x: Array, w: Array, sizes: Array, policy: Policy) -> Array:
    return _dot(x, w, sizes, ((1,), (2,)), policy)


def _by_group_backward(
    x: Array, w: Array, sizes: Array, g: Array, policy: Policy
) -> tuple[Array, Array]:
    dx = _dot(g, w, sizes, ((1,), (1,)), policy)
    dw = _dot(g, x, sizes, ((0,), (0,)), policy)
    return dx.astype(x.dtype), dw.astype(w.dtype)


def _dot(
    a: Array, b: Array, sizes: Array, contracted: tuple[tuple[int], tuple[int]], policy: Policy
) -> Array:
    """Run XLA's ragged product of a, whose first axis is cut into groups, with b.

    b is `[E, ., .]`, or it is cut like a, for a result `[E, ., .]`.
    """
    compute = jnp.dtype(policy.compute_dtype)
    dims = jax.lax.RaggedDotDimensionNumbers(
        (contracted, ((), ())), [0], [0] if b.ndim == 3 else []
    )
    run = functools.partial(
        jax.lax.ragged_dot_general,
        ragged_dot_dimension_numbers=dims,
        precision=precision(compute),
        preferred_element_type=jnp.float32,
    )
    # the batching rule of the ragged product needs b to be mapped too
    return jax.custom_batching.sequential_vmap(run)(a.astype(compute), b.astype(compute), sizes)


# ------------------------------------------------------------------------------------------- blocks


def _blocks(sizes: Array, rows: int) -> tuple[int, tuple[Array, Array, Array]]:
    """Return the rows of a block, and each block's group, first row, and end of its group's rows.

    There are as many blocks as any sizes may need; those that these sizes do not need begin after
    the last row.
    """
    groups = sizes.shape[0]
    size = max(2, min(BLOCK, 1 << max(rows // groups, 1).bit_length() - 1))
    sizes = sizes.astype(jnp.int32)
    needed = -(-sizes // size)
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    last = jnp.cumsum(needed, dtype=jnp.int32)
    block = jnp.arange(min(rows, rows // size + groups), dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(last, block, side="right").astype(jnp.int32), groups - 1)
    start = (ends - sizes)[group] + (block - (last - needed)[group]) * size
    return size, (group, jnp.where(block < last[-1], start, rows), ends[group])


def _pad(a: Array, size: int) -> Array:
    return jnp.pad(a, ((0, size), (0, 0)))


def _slice(w: Any, group: Array) -> Any:
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, group, keepdims=False), w)


def _by_blocks(x: Array, w: Any, sizes: Array, policy: Policy) -> Array:
    rows = x.shape[0]
    size, blocks = _blocks(sizes, rows)
    padded = _pad(x, size)

    def run(y: Array, group: Array, start: Array) -> Array:
        part = einsum(
            "ND,FD->NF", jax.lax.dynamic_slice_in_dim(padded, start, size), _slice(w, group), policy
        )
        # rows beyond the group are overwritten by the next block
        return jax.lax.dynamic_update_slice_in_dim(y, part, start, axis=0)

    def body(y: Array, block: tuple[Array, Array, Array]) -> tuple[Array, None]:
        group, start, _ = block
        return jax.lax.cond(start < rows, run, lambda y, *_: y, y, group, start), None

    return jax.lax.scan(body, jnp.zeros((rows + size, w.shape[1]), jnp.float32), blocks)[0][:rows]


def _by_blocks_backward(
    x: Array, w: Any, sizes: Array, g: Array, policy: Policy
) -> tuple[Array, Any]:
    rows = x.shape[0]
    size, blocks = _blocks(sizes, rows)
    padded = _pad(x, size)
    g = _pad(g, size)
    parts, structure = jax.tree.flatten(w)
    floats = [i for i, part in enumerate(parts) if jnp.issubdtype(part.dtype, jnp.floating)]

    def run(
        dx: Array, dw: list[Array], group: Array, start: Array, end: Array
    ) -> tuple[Array, list[Array]]:
        own = (start + jnp.arange(size, dtype=jnp.int32) < end)[:, None]
        upward = jnp.where(own, jax.lax.dynamic_slice_in_dim(g, start, size), jnp.float32(0))
        product = functools.partial(einsum, "ND,FD->NF", policy=policy)
        _, pull = jax.vjp(
            product, jax.lax.dynamic_slice_in_dim(padded, start, size), _slice(w, group)
        )
        dx_part, dw_part = pull(upward)
        found = [jax.tree.leaves(dw_part)[i].astype(jnp.float32) for i in floats]
        dw = [total.at[group].add(part) for total, part in zip(dw, found, strict=True)]
        return jax.lax.dynamic_update_slice_in_dim(dx, dx_part, start, axis=0), dw

    def body(
        carry: tuple[Array, list[Array]], block: tuple[Array, Array, Array]
    ) -> tuple[tuple[Array, list[Array]], None]:
        return jax.lax.cond(block[1] < rows, run, lambda dx, dw, *_: (dx, dw), *carry, *block), None

    zeros = [jnp.zeros(parts[i].shape, jnp.float32) for i in floats]
    (dx, dw), _ = jax.lax.scan(body, (jnp.zeros(padded.shape, x.dtype), zeros), blocks)
    cotangents: list[Any] = [np.zeros(part.shape, jax.dtypes.float0) for part in parts]
    for i, total in zip(floats, dw, strict=True):
        cotangents[i] = total.astype(parts[i].dtype)
    return dx[:rows], jax.tree.unflatten(structure, cotangents)


# --------------------------------------------------------------------------------------- statistics


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _tap(y: Array, x: Array, sizes: Array, zeros: dict[str, Array], cap: float | None) -> Array:
    """Return `y`, whose gradient for the zeros is the statistics of each group's rows.

    See `jaxmodel.ops.probe`.
    """
    return y


def _tap_forward(
    y: Array, x: Array, sizes: Array, zeros: dict[str, Array], cap: float | None
) -> tuple[Array, tuple[Array, Array, Any]]:
    return y, (x, sizes, zeros)


def _tap_backward(
    cap: float | None, saved: tuple[Array, Array, dict[str, Array]], g: Array
) -> tuple[Array, None, None, dict[str, Array]]:
    x, sizes, zeros = saved
    return (
        g,
        None,
        None,
        {name: _statistic(name, x, g, sizes, zero, cap) for name, zero in zeros.items()},
    )


_tap.defvjp(_tap_forward, _tap_backward)


def _statistic(
    name: str, x: Array, g: Array, sizes: Array, zero: Array, cap: float | None
) -> Array:
    wide = x.astype(jnp.float32)
    if cap is not None and name in ("gram", "square"):
        row = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]  # later rows are padding
        wide = capped(jnp.where(row < jnp.sum(sizes, dtype=jnp.int32), wide, 0.0), cap)
    groups = sizes.shape[0]
    if name == "count":
        return sizes.astype(jnp.float32)
    if name == "gram":  # X^T X of each group is the gradient of its matrix if y's gradient is x
        return _backward(DEFAULT, (wide, zero, sizes), wide)[1]
    if name == GRADIENT:
        return _backward(DEFAULT, (wide, zero, sizes), g)[1]
    ends = jnp.cumsum(sizes.astype(jnp.int32), dtype=jnp.int32)
    # later rows get the group E, which is dropped
    group = jnp.searchsorted(ends, jnp.arange(x.shape[0], dtype=jnp.int32), side="right")
    each = {"square": jnp.square, "norms": norms}.get(name, jax.vmap(histogram))(wide)
    return jax.ops.segment_sum(each, group, groups)
