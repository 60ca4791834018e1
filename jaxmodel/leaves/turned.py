"""`Turned`: a weight whose input is scaled and rotated before the contraction."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxmodel.leaves.hadamard import turn
from jaxmodel.leaves.leaf import (
    AxisSizes,
    Compressed,
    decode,
    expect,
    full_spec,
    later,
    register,
    static,
)


@register
class Turned(Compressed):
    """A weight `W` stored as a base `B` that meets another input: `W x = B H^T (x * scale)`.

    The scale takes outliers out of the input (SmoothQuant: Xiao et al., 2023; AWQ: Lin et al.,
    2024), and `H`, a Hadamard matrix in blocks, spreads those that are left over all elements
    (QuaRot: Ashkboos et al., 2024), so that both sides are easier to round.

    Invariants (`check`):
      base: `[..., out, in]`, an array or a compressed leaf.
      scale: None, or floating `[..., 1, in]`.
      hadamard: the size of a block of H, which divides `in`; 0 for no rotation.
      limit: None, or floating `[..., 1, 1]`: where the input is clipped at last, and rounded to
        255 values between. A gradient passes where nothing is clipped, and reaches the limit from
        where something is (PACT: Choi et al., 2018).
    """

    base: Any
    scale: Any = None
    hadamard: int = static(default=0)
    limit: Any = later(default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return tuple(self.base.shape)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the base."""
        return self.base.dtype

    def turned(self, x: Float[Array, "... in"]) -> Float[Array, "... in"]:
        """Return what the base is multiplied with, in the dtype of x."""
        if self.scale is not None:
            x = x * self.scale.reshape((1,) * (x.ndim - 1) + (-1,)).astype(x.dtype)
        x = turn(x, self.hadamard) if self.hadamard else x
        if self.limit is None:
            return x
        limit = jnp.maximum(self.limit.reshape((1,) * x.ndim).astype(x.dtype), 1e-6)
        x = jnp.clip(x, -limit, limit)
        rounded = jnp.round(x * (127 / limit)) * (limit / 127)
        return x + jax.lax.stop_gradient(rounded - x)

    def decode(self, dtype: Any = None) -> jax.Array:
        """Return the weight as a plain array."""
        weight = decode(self.base, jnp.float32)
        if self.hadamard:
            weight = turn(weight, self.hadamard, back=True)
        if self.scale is not None:
            weight = weight * self.scale.astype(jnp.float32)
        return weight.astype(self.dtype if dtype is None else dtype)

    def specs(self, spec: PartitionSpec, sizes: AxisSizes) -> Turned:
        """Return the leaf with a `PartitionSpec` in place of each array."""
        *lead, out, last = full_spec(spec, self.ndim)
        whole = PartitionSpec(*lead, out, last)
        base = self.base.specs(whole, sizes) if isinstance(self.base, Compressed) else whole
        scale = None if self.scale is None else PartitionSpec(*lead, None, last)
        limit = None if self.limit is None else PartitionSpec(*lead, None, None)
        made = type(self)(base, scale, hadamard=self.hadamard, limit=limit)  # pyright: ignore
        return made

    def check(self) -> None:
        """Check the invariants of the class."""
        expect(len(self.shape) >= 2, self, f"base has shape {self.shape}; [..., out, in] is needed")
        if isinstance(self.base, Compressed):
            expect(not isinstance(self.base, Turned), self, "base is a Turned leaf itself")
            self.base.check()
        n = self.shape[-1]
        if self.scale is not None:
            want = (*self.shape[:-2], 1, n)
            expect(
                tuple(self.scale.shape) == want and jnp.issubdtype(self.scale.dtype, jnp.floating),
                self,
                f"scale is {self.scale.dtype} {self.scale.shape}; floating {want} is needed",
            )
        expect(
            self.hadamard >= 0 and (not self.hadamard or n % self.hadamard == 0),
            self,
            f"hadamard is {self.hadamard}; a block of that size does not divide {n}",
        )
        if self.limit is not None:
            want = (*self.shape[:-2], 1, 1)
            expect(
                tuple(self.limit.shape) == want,
                self,
                f"limit has shape {self.limit.shape}; {want} is needed",
            )
        expect(
            self.scale is not None or self.hadamard > 0 or self.limit is not None,
            self,
            "neither a scale, nor a rotation, nor a limit",
        )
