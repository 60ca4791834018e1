"""The product of two arrays in a lower precision, forward and backward.

The dtypes of operands and results are decided only here.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

WITHOUT_BATCH = "product without batch axes"
"""The name of products in bfloat16 for `jax.checkpoint_policies`.

These cannot see the `dot_general` inside a custom derivative.
"""


def product(
    equation: str,
    x: Float[Array, "..."],
    y: Float[Array, "..."],
    compute: Any,
    out: Any = jnp.float32,
) -> Array:
    """Compute `einsum(equation, x, y)` with operands rounded to `compute` and float32 sums.

    The gradients are such products too: the incoming gradient is rounded to `compute` first. The
    transpose that JAX derives multiplies a float32 operand with a rounded one, which no matrix unit
    supports, so two thirds of a training step would run in float32. (float16 keeps JAX's transpose,
    since its gradients may be too small without loss scaling.) As a consequence, products in
    bfloat16 have no forward-mode derivative, and on a CPU their gradients are rounded to bfloat16
    (see `_narrow`).

    Args:
      equation: two terms of single letters; a letter of only one operand must be in the result.
      x: the first operand.
      y: the second operand.
      compute: the dtype of the operands.
      out: the dtype of the result.

    >>> x, y = jnp.ones((2, 3)), jnp.full((4, 3), 1.001)
    >>> product("bi,oi->bo", x, y, jnp.bfloat16)[0, 0].item()  # 1.001 is 1 in bfloat16
    3.0
    """
    if jnp.dtype(compute) == jnp.bfloat16:
        found = _bfloat16(equation, x, y, jnp.dtype(out))
        terms = equation.replace("->", ",").split(",")
        return (
            found if set.intersection(*map(set, terms)) else checkpoint_name(found, WITHOUT_BATCH)
        )
    x = x.astype(compute)
    y = y.astype(compute)
    return jnp.einsum(
        equation, x, y, precision=precision(compute), preferred_element_type=jnp.float32
    ).astype(out)


def precision(compute: Any) -> jax.lax.Precision | None:
    """Return the precision of XLA's products.

    float32 means float32 also on accelerators, whose default is one bfloat16 pass.
    """
    return jax.lax.Precision.HIGHEST if jnp.dtype(compute) == jnp.float32 else None


def compiler_options(compute: Any) -> dict[str, Any]:
    """Return options of `jax.jit` for a program with many products in `compute`.

    On x86 processors with bfloat16 units they select oneDNN's kernels, since XLA's own have no fast
    kernel on a CPU for the gradient of a weight in bfloat16. For float32, oneDNN is left out: XLA
    lets it add up products whose layouts differ, for which it has only a reference loop, 40 times
    slower.
    """
    if jnp.dtype(compute) != jnp.bfloat16 or jax.default_backend() != "cpu" or not _has_bfloat16():
        return {}
    return {
        "xla_cpu_experimental_onednn_custom_call": True,
        "xla_cpu_experimental_ynn_fusion_type": "",
    }


@functools.cache
def _has_bfloat16() -> bool:
    known = Path("/proc/cpuinfo")
    flags = known.read_text() if platform.machine() == "x86_64" and known.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _bfloat16(equation: str, x: Array, y: Array, out: Any) -> Array:
    return (_narrow if out == jnp.bfloat16 else _run)(equation, x, y, out)


def _save(equation: str, x: Array, y: Array, out: Any) -> tuple[Array, Any]:
    # empty arrays that carry the dtypes of the gradients
    likes = (
        jnp.zeros(0, x.dtype),
        jnp.zeros(0, y.dtype),
    )
    x = x.astype(jnp.bfloat16)
    y = y.astype(jnp.bfloat16)
    return _bfloat16(equation, x, y, out), (x, y, likes)


def _pull(equation: str, out: Any, saved: Any, g: Array) -> tuple[Array, Array]:
    x, y, (x_like, y_like) = saved
    inputs, result = equation.split("->")
    left, right = inputs.split(",")
    dx = _narrow(f"{result},{right}->{left}", g, y, x_like.dtype)
    return dx, _narrow(f"{result},{left}->{right}", g, x, y_like.dtype)


_bfloat16.defvjp(_save, _pull)


def _run(equation: str, x: Array, y: Array, out: Any) -> Array:
    return jnp.einsum(
        equation, x.astype(jnp.bfloat16), y.astype(jnp.bfloat16), preferred_element_type=out
    )


def _narrow(equation: str, x: Array, y: Array, out: Any) -> Array:
    """Run the product where a result in bfloat16 is exact enough; on a CPU the result is bfloat16.

    On a CPU only products with a result in bfloat16 have kernels for operands of every layout. If
    the result were widened in the usual way, XLA would turn it into a float32 product again and
    fuse additions into it, so it is widened in a way that XLA does not see through.
    """

    def on_cpu(x: Array, y: Array) -> Array:
        bits = jax.lax.bitcast_convert_type(_run(equation, x, y, jnp.bfloat16), jnp.uint16)
        return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32).astype(out)

    return jax.lax.platform_dependent(
        x, y, cpu=on_cpu, default=functools.partial(_run, equation, out=out)
    )
