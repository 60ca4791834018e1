"""Round to nearest: codes of 1 to 8 bits, with the range of the weights alone."""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp

from jaxmodel.compress.method import Method
from jaxmodel.errors import InputError
from jaxmodel.leaves import Compressed, QTensor, Sparse
from jaxmodel.leaves.leaf import check_weights
from jaxmodel.leaves.packing import codes_per_unit
from jaxmodel.schema import Count, Range


@dataclasses.dataclass(frozen=True)
class Rtn(Method):
    """Rounding of each weight to the nearest of `2^bits` levels.

    Symmetric: `scale = max|w| / (2^(bits-1) - 1)`; at one bit it is the mean of |w|, the least
    squares choice. Affine: levels from the smallest to the largest weight. The codes are computed
    with the scale as it is stored.

    Attributes:
      bits: 1 to 8.
      group: number of neighbouring weights of a row that share a scale, whole bytes of codes; None
        for one scale per row.
      symmetric: True for a range symmetric around zero, with zero as a level; False for affine.
      activations: None, or "int8" to round the input of the contraction too, row by row at run
        time.
      scale_dtype: None for float32 with one scale per row and float16 with groups.
    """

    bits: Annotated[int, Range(1, 8)] = 8
    group: Count | None = None
    symmetric: bool = True
    activations: Literal["int8"] | None = None
    scale_dtype: Literal["float32", "float16", "bfloat16"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        unit = codes_per_unit(self.bits)
        if self.group is not None and self.group % unit:
            self.refuse("group", f"at {self.bits} bits a multiple of {unit}, which fills bytes")

    def __call__(self, leaf: Any, stats: dict[str, Any] | None = None) -> Any:
        """Quantise a leaf; see `Method`."""
        if isinstance(leaf, Sparse):
            if isinstance(leaf.values, Compressed) or not self.symmetric:
                raise InputError(
                    "rtn: a sparse leaf takes one symmetric rounding, so that zeros stay zero; "
                    "prune the plain weights again"
                )
            return dataclasses.replace(leaf, values=self(leaf.values))
        if isinstance(leaf, Compressed):
            raise InputError(f"rtn: takes a plain or sparse leaf, not {type(leaf).__name__}")
        check_weights(leaf, "rtn")
        return _rtn(leaf, self)


@functools.partial(jax.jit, static_argnums=1)
def _rtn(weight: jax.Array, method: Rtn) -> QTensor:
    bits = method.bits
    group = method.group
    weight = weight.astype(jnp.float32)
    *lead, n = weight.shape
    extra = -n % group if group else 0
    # the padding repeats the last weight, so that it does not widen a range
    padded = (
        jnp.concatenate([weight, jnp.repeat(weight[..., -1:], extra, axis=-1)], axis=-1)
        if extra
        else weight
    )
    grouped = padded.reshape(*lead, -1, group or n)
    dtype = jnp.dtype(method.scale_dtype or ("float16" if group else "float32"))
    if method.symmetric:
        size = (
            jnp.mean(jnp.abs(grouped), axis=-1) if bits == 1 else jnp.max(jnp.abs(grouped), axis=-1)
        )
        scale = size / max(2 ** (bits - 1) - 1, 1)
        minimum = None
    else:
        low = jnp.min(grouped, axis=-1)
        minimum = low.astype(dtype)
        scale = (jnp.max(grouped, axis=-1) - minimum.astype(jnp.float32)) / (2**bits - 1)
    scale = jnp.maximum(scale, float(jnp.finfo(dtype).tiny)).astype(dtype)
    wide = scale.astype(jnp.float32)[..., None]
    if minimum is not None:
        codes = jnp.clip(
            jnp.round((grouped - minimum.astype(jnp.float32)[..., None]) / wide), 0, 2**bits - 1
        )
    elif bits == 1:
        codes = jnp.where(grouped < 0, -1.0, 1.0)
    else:
        codes = jnp.clip(jnp.round(grouped / wide), -(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1)
    codes = codes.reshape(padded.shape)[..., :n].astype(jnp.int32)
    return QTensor.from_codes(
        codes, scale, minimum, bits=bits, group=group, activations=method.activations
    )
