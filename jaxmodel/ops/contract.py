"""`einsum`, `take` and `conv`: the one place where activations meet weights.

They dispatch on the type of the leaf. Weights are stored `[..., out, in]`. Letters of an equation
are logical axes; letters in parentheses share one stored axis, so
`einsum("BTD,(Hh)D->BTHh", x, w, h=64)` contracts with a weight `[H*h, D]` and returns separate
heads.

On a CPU a single row is slow in bfloat16 and int8 (XLA does not use its matrix kernels), so one row
is computed as two.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from jaxmodel.errors import InputError
from jaxmodel.leaves import (
    Adapted,
    BlockSparse,
    Compressed,
    QTensor,
    RowPacked,
    Sparse,
    Turned,
    decode,
)
from jaxmodel.leaves.qtensor import FLOATS
from jaxmodel.ops import kernels
from jaxmodel.ops.block_sparse import beside, block_product
from jaxmodel.ops.norms import on_last
from jaxmodel.ops.policy import Policy
from jaxmodel.ops.probe import GRADIENT, OF_TAKE, Probe, tap
from jaxmodel.ops.product import precision, product
from jaxmodel.sharding import auto_axes, constrain

DEFAULT = Policy()


class _Plan(NamedTuple):
    batch: int  # number of leading axes that x, w and the result share
    x_letters: tuple[str, ...]
    w_in: tuple[str, ...]
    w_out: tuple[str, ...]
    result: tuple[str, ...]


def einsum(
    equation: str, x: Float[Array, "..."], w: Any, policy: Policy = DEFAULT, **sizes: int
) -> Float[Array, "..."]:
    """Contract an activation with a weight leaf.

    Args:
      equation: `x,w->y`. The weight's last axis is contracted and the axis before it is the output;
        letters in front of both are batch letters, which x and y share (`"ETD,EFD->ETF"`). Several
        letters in parentheses stand for one stored axis of the weight.
      x: the activation.
      w: an array, a compressed leaf or a `Probe`.
      policy: dtypes and placement.
      **sizes: the lengths of letters that do not follow from the shapes (all but one of a group of
        output letters).

    Returns:
      y, in `policy.activation_dtype`; sums are float32.

    Raises:
      InputError: the equation has another form, or the shapes do not fit.
    """
    plan = _parse(equation)
    known = dict(sizes)
    fits = x.ndim == len(plan.x_letters) and len(w.shape) == plan.batch + 2
    if not fits or x.shape[: plan.batch] != w.shape[: plan.batch]:
        raise InputError(
            f"einsum {equation!r}: x {x.shape} and the weight {w.shape} do not have these axes"
        )
    for letter, length in zip(plan.x_letters, x.shape, strict=True):
        known.setdefault(letter, length)
    lead = x.shape[plan.batch : x.ndim - len(plan.w_in)]
    flat = x.reshape(*x.shape[: plan.batch], *lead, -1)
    if flat.shape[-1] != w.shape[-1]:
        raise InputError(
            f"einsum {equation!r}: x {x.shape} has {flat.shape[-1]} features, the weight "
            f"{w.shape} takes {w.shape[-1]}"
        )
    run = functools.partial(_matmul, policy=policy)
    for _ in range(plan.batch):
        run = jax.vmap(run)
    y = run(flat, w)
    y = y.reshape(*y.shape[:-1], *_out_shape(equation, plan.w_out, y.shape[-1], known))
    return constrain(y.astype(policy.activation_dtype), "".join(plan.result), policy.axes)


def embed(
    table: Any, ids: Int[Array, "B T"], policy: Policy = DEFAULT, letters: str = "VD"
) -> Float[Array, "B T D"]:
    """Look up rows of a table `[V, D]`: an embedding.

    An id outside the table gives a row of NaN, so that wrong input does not look like right input.

    Args:
      table: an array, a compressed leaf or a `Probe`.
      ids: the rows to look up.
      policy: dtypes and placement.
      letters: the letters of the table's axes. For the lookup the table is placed like activations
        with these letters. So if its width is split over the same devices as the batch, the table
        is gathered, as every weight is, and not the activations.
    """
    if isinstance(table, Probe):
        rows = embed(table.weight, ids, policy, letters)
        return tap(
            rows,
            ids,
            {name: zero for name, zero in table.zeros.items() if name in (*OF_TAKE, GRADIENT)},
            rows=table.rows,
        )
    if not isinstance(table, Compressed):
        table = constrain(table, letters, policy.axes)
    inside = (ids >= 0) & (ids < table.shape[-2])
    rows = jnp.where(
        inside[..., None],
        _rows(table, ids).astype(policy.activation_dtype),
        jnp.asarray(jnp.nan, policy.activation_dtype),
    )
    return constrain(rows, "BTD", policy.axes)


def conv(
    x: Float[Array, "B Y X I"],
    w: Any,
    policy: Policy = DEFAULT,
    *,
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: str = "SAME",
) -> Float[Array, "B P Q O"]:
    """Convolve images with a weight `[O, I * kernel_y * kernel_x]`.

    The kernel is flattened like `[O, I, ky, kx]`. The weight has two axes so that every compression
    method sees the matrix that the patches are multiplied with.
    """
    if isinstance(w, Probe) or (isinstance(w, Compressed) and _dynamic(w)):
        patches = jax.lax.conv_general_dilated_patches(
            x, kernel, stride, padding, dimension_numbers=("NHWC", "OIHW", "NHWC")
        )
        return einsum("BYXI,OI->BYXO", patches, w, policy)
    if len(w.shape) != 2 or w.shape[1] != x.shape[-1] * kernel[0] * kernel[1]:
        raise InputError(
            f"conv: the weight {w.shape} does not fit {x.shape[-1]} channels and a kernel of "
            f"{kernel}"
        )
    if isinstance(w, Adapted) and w.key is not None:  # the adapter has another input than the base
        settings = {"kernel": kernel, "stride": stride, "padding": padding}
        wide = dataclasses.replace(policy, activation_dtype="float32")
        alone = dataclasses.replace(w, base=jnp.zeros(w.shape, jnp.float32), dropout=None, key=None)
        y = conv(x, w.base, wide, **settings) + conv(w.dropped(x), alone, wide, **settings)
        return y.astype(policy.activation_dtype)
    compute = jnp.dtype(policy.compute_dtype)
    weight = decode(w, compute)
    y = jax.lax.conv_general_dilated(
        x.astype(compute),
        weight.reshape(weight.shape[0], x.shape[-1], *kernel),
        stride,
        padding,
        dimension_numbers=("NHWC", "OIHW", "NHWC"),
        precision=precision(compute),
        preferred_element_type=jnp.float32,
    )
    return y.astype(policy.activation_dtype)


def block_sparse_matmul(
    x: Float[Array, "... in"], w: Any, columns: Int[Array, "rows n"], policy: Policy = DEFAULT
) -> Float[Array, "... out"]:
    """Contract with a block-sparse weight whose block positions are given separately.

    Args:
      x: the activation.
      w: a leaf `[rows, height, n * width]`: the kept blocks of each block row, side by side.
      columns: the block of x that each kept block is multiplied with.
      policy: dtypes and placement.

    Returns:
      y, with `rows * height` features, in `policy.activation_dtype`.

    Raises:
      InputError: the shapes do not fit.
    """
    n = columns.shape[1]
    width = w.shape[-1] // max(columns.shape[1], 1)
    if (
        len(w.shape) != 3
        or w.shape[0] != columns.shape[0]
        or w.shape[-1] != n * width
        or x.shape[-1] % max(width, 1)
    ):
        raise InputError(
            f"blocks: x {x.shape}, the weight {w.shape} and columns {columns.shape} do not fit "
            f"each other"
        )
    if isinstance(w, Compressed | Probe):
        y = block_product(x, w, columns, width, lambda x, row: _matmul(x.T, row, policy).T)
    else:
        compute = jnp.dtype(policy.compute_dtype)
        y = block_product(x.astype(compute), w.astype(compute), columns, width, _turned_dot)
    return y.astype(policy.activation_dtype)


# ----------------------------------------------------------------------------- dispatch on the leaf


def _matmul(x: Float[Array, "... in"], w: Any, policy: Policy) -> Float[Array, "... out"]:
    """Compute `x @ w.T` for a leaf `[out, in]`.

    The result is float32, or `policy.activation_dtype` if nothing else is done with it.
    """
    if isinstance(w, Probe):
        y = _matmul(x, w.weight, policy)
        zeros = {name: zero for name, zero in w.zeros.items() if name not in OF_TAKE}
        return tap(y, x, zeros, w.cap, w.rows)
    if isinstance(w, Sparse | QTensor | RowPacked):
        return _of_codes(x, w, policy)
    if isinstance(w, Turned):
        return _matmul(w.turned(x.astype(jnp.float32)), w.base, policy)
    if isinstance(w, Adapted):
        wide = dataclasses.replace(policy, activation_dtype="float32")
        y = _matmul(_matmul(w.dropped(x), w.down, wide), w.up, wide)
        return _matmul(x, w.base, wide) + on_last(w.scale.astype(jnp.float32)[None], y.ndim) * y
    compute = jnp.dtype(policy.compute_dtype)
    if isinstance(w, BlockSparse):
        return block_product(
            x.astype(compute),
            beside(w.values.astype(compute)),
            w.columns(),
            w.block[1],
            _turned_dot,
        )
    # a plain leaf is not cast, so that its gradient is not rounded
    return _dot(
        x, decode(w, compute) if isinstance(w, Compressed) else w, compute, policy.activation_dtype
    )


@functools.partial(
    jax.checkpoint, static_argnums=(2,)
)  # the backward pass decodes again instead of keeping each layer's plain weight
def _of_codes(
    x: Float[Array, "... in"], w: Sparse | QTensor | RowPacked, policy: Policy
) -> Float[Array, "... out"]:
    if isinstance(w, Sparse):
        dense = w.expand()
        return _matmul(
            x if isinstance(dense, QTensor) or not _dynamic(w) else _rounded(x, w.values),
            dense,
            policy,
        )
    if w.activations is not None and not kernels.of_int8(w):
        x = _rounded(x, w)
    return kernels.product(x, w, functools.partial(_plain, policy=policy))


def _plain(x: Float[Array, "... in"], w: QTensor | RowPacked, policy: Policy) -> Array:
    """Compute the product of rounded activations with codes in XLA."""
    compute = jnp.dtype(policy.compute_dtype)
    if isinstance(w, RowPacked):
        # A single row does not pay for rounding each weight to 16 bits (0.8x of float32 on a CPU
        # with bfloat16 units, where float32 is 2.1x): it is computed more exactly than asked for.
        wide = _one_row_on_cpu(x) and compute == jnp.bfloat16
        compute = jnp.dtype(jnp.float32) if wide else compute
        return _dot(x, decode(w, compute), compute)
    if kernels.of_int8(w):
        return _int8_matmul(x, w)
    if w.groups == 1 and w.minimum is None:
        return _dot(x, w.codes().astype(compute), compute) * _row_scale(w, x.ndim)
    return _dot(x, decode(w, compute), compute)


def _dot(x: Array, w: Array, compute: Any, out: Any = jnp.float32) -> Array:
    """Compute `x @ w.T` as a `product` (of int8 with an int32 result).

    A single row is computed as two where a CPU would not use its matrix kernels.
    """
    codes = x.dtype == jnp.int8
    # On a mesh the axes are not merged: rows and positions that are both split would have to be
    # gathered to become one axis.
    rows = x if auto_axes() else x.reshape(-1, x.shape[-1])
    single = (codes or compute != jnp.float32) and _one_row_on_cpu(x)
    if single:
        rows = jnp.broadcast_to(x.reshape(1, -1), (2, x.shape[-1]))
    if codes:
        y = jax.lax.dot_general(
            rows, w, (((rows.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.int32
        )
    else:
        lead = "abcdefgh"[: rows.ndim - 1]
        y = product(f"{lead}i,oi->{lead}o", rows, w, compute, out)
    return (y[:1] if single else y).reshape(*x.shape[:-1], w.shape[0])


def _one_row_on_cpu(x: Array) -> bool:
    return x.size == x.shape[-1] and jax.default_backend() == "cpu"


def _turned_dot(x: Float[Array, "n B"], w: Float[Array, "m n"]) -> Float[Array, "m B"]:
    """Compute `w @ x` with a float32 result: the transposed form of `_dot`."""
    return _dot(x.T, w, x.dtype).T if x.shape[1] == 1 else product("mn,nb->mb", w, x, x.dtype)


def quantize_rows(
    x: Float[Array, "... n"], limit: Float[Array, "1 1"] | None = None, kind: str = "int8"
) -> tuple[Shaped[Array, "... n"], Float[Array, "... _"]]:
    """Round each row with its own scale: `x ~ q * scale`.

    Args:
      x: the rows.
      limit: None, or where all rows are clipped, which gives them one scale.
      kind: "int8" for q in [-127, 127], "e4m3" or "e5m2" for numbers of 8 bits.
    """
    x = x.astype(jnp.float32)
    top = float(jnp.finfo(FLOATS[kind]).max) if kind in FLOATS else 127.0
    if limit is None:
        scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 1e-12) / top
        q = x / scale
    else:
        scale = jnp.maximum(limit.astype(jnp.float32).reshape((1,) * x.ndim), 1e-12) / top
        q = jnp.clip(x / scale, -top, top)
    return q.astype(FLOATS[kind]) if kind in FLOATS else jnp.round(q).astype(jnp.int8), scale


def _rounded(x: Float[Array, "... n"], w: QTensor | RowPacked) -> Float[Array, "... n"]:
    """Round the input as `w` says, and back; its gradient is that of the identity."""
    q, scale = quantize_rows(x, w.limit, w.activations or "int8")
    x = x.astype(jnp.float32)
    return x + jax.lax.stop_gradient(q.astype(jnp.float32) * scale - x)


@jax.custom_jvp
def _int8_matmul(x: Float[Array, "... in"], w: QTensor) -> Float[Array, "... out"]:
    """Compute int8 x int8 -> int32, and scale the result back."""
    q, scale = quantize_rows(x, w.limit)
    return _dot(q, w.codes(), jnp.int8).astype(jnp.float32) * scale * _row_scale(w, x.ndim)


@_int8_matmul.defjvp
def _int8_matmul_jvp(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Array, Array]:
    # The rounding is differentiated as the identity, so that gradients and the statistics of probes
    # pass; codes and scales get none.
    x, w = primals
    return _int8_matmul(x, w), _dot(tangents[0], w.decode(jnp.float32), jnp.float32)


def _row_scale(w: QTensor, ndim: int) -> Array:
    """Return the scale of each row, along the last axis of a product with `ndim` axes."""
    return on_last(w.scale.astype(jnp.float32)[..., 0], ndim)


def _dynamic(w: Any) -> bool:
    if isinstance(w, Turned):
        return w.limit is not None or _dynamic(w.base)
    return (
        w.activations is not None
        if isinstance(w, QTensor | RowPacked)
        else isinstance(w, Sparse) and _dynamic(w.values)
    )


def _rows(leaf: Any, ids: Array) -> Array:
    """Decode only the rows that are looked up."""

    def rows_of(a: Array) -> Array:
        return jnp.take(a, ids if a.shape[-2] > 1 else jnp.zeros_like(ids), axis=-2, mode="clip")

    if isinstance(leaf, BlockSparse | RowPacked):
        return leaf.rows(ids)
    if isinstance(leaf, Turned):
        scale = None if leaf.scale is None else rows_of(leaf.scale)
        return decode(dataclasses.replace(leaf, base=_rows(leaf.base, ids), scale=scale))
    if isinstance(leaf, Adapted):
        return decode(Adapted(_rows(leaf.base, ids), leaf.down, _rows(leaf.up, ids), leaf.scale))
    if isinstance(leaf, Compressed):
        return decode(jax.tree.map(rows_of, leaf))
    return rows_of(leaf)


# ---------------------------------------------------------------------------------------- equations


@functools.cache
def _parse(equation: str) -> _Plan:
    problem = InputError(
        f"einsum: {equation!r} is not of the form 'batch rows in, batch out in -> batch rows out' "
        f"with weights stored "
        "[..., out, in], such as 'BTD,FD->BTF' or 'BTHh,D(Hh)->BTD'"
    )
    try:
        inputs, output = equation.replace(" ", "").split("->")
        x_term, w_term = inputs.split(",")
        x_letters = tuple(x_term)
        y_letters = tuple(output)
        w_axes = _axes(w_term)
        *lead, w_out, w_in = w_axes
        batch = tuple(letter for (letter,) in lead)
        n = len(batch)
        rows = x_letters[len(batch) : len(x_letters) - len(w_in)]
        ok = x_letters == (*batch, *rows, *w_in) and y_letters == (*batch, *rows, *w_out)
        ok = ok and len({*x_letters, *w_out}) == len(x_letters) + len(w_out)
    except ValueError:
        raise problem from None
    if not ok:
        raise problem
    return _Plan(n, x_letters, w_in, w_out, y_letters)


def _axes(term: str) -> list[tuple[str, ...]]:
    axes: list[tuple[str, ...]] = []
    while term:
        if term[0] == "(":
            group, term = term[1:].split(")", 1)
            axes.append(tuple(group))
        else:
            axes.append((term[0],))
            term = term[1:]
    return axes


def _out_shape(
    equation: str, letters: tuple[str, ...], length: int, known: dict[str, int]
) -> list[int]:
    shape = [known.get(letter, -1) for letter in letters] if len(letters) > 1 else [length]
    product = 1
    for n in shape:
        product *= abs(n)
    if (
        shape.count(-1) > 1
        or not product
        or length % product
        or (-1 not in shape and product != length)
    ):
        raise InputError(
            f"einsum {equation!r}: cannot split an axis of {length} into "
            f"{dict(zip(letters, shape, strict=True))}"
        )
    return shape
