"""`Adapted`: a weight plus the product of two thin matrices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxmodel import tree
from jaxmodel.leaves.leaf import AxisSizes, Compressed, decode, expect, full_spec, register
from jaxmodel.rng import fold

SUFFIX = "_lora"
"""Suffix of an adapter's branch: `q_lora` (`down`, `up`, `scale`) stands beside the leaf `q`."""

PARTS = {"down", "up", "scale"}


@register
class Adapted(Compressed):
    """`w = base + scale up @ down`: a low-rank adapter (LoRA: Hu et al., 2021).

    A contraction runs the base and the adapter separately and adds the results. So the base may be
    compressed in any way, and the sum of the weights is never stored. In training, dropout may be
    applied to the input of the adapter (not of the base); the value of the leaf does not depend on
    it.

    Invariants (`check`):
      base: an array `[..., out, in]`, or a compressed leaf that stands for one.
      down: floating `[..., rank, in]`.
      up: floating `[..., out, rank]`.
      scale: floating, `[]` or as many as there are layers.
      dropout: the probability, `[]`, of dropping an element of the adapter's input in training;
        else None.
      key: the random key of one layer in one step, when there is `dropout`; else None.
    """

    base: Any
    down: Any
    up: Any
    scale: Any
    dropout: Any = None
    key: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the base."""
        return tuple(self.base.shape)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the base."""
        return self.base.dtype

    @property
    def rank(self) -> int:
        """The number of rows of `down`."""
        return self.down.shape[-2]

    def decode(self, dtype: Any = None) -> jax.Array:
        """Return `base + scale up @ down` as a plain array."""
        up = self.up.astype(jnp.float32)
        down = self.down.astype(jnp.float32)
        product = jnp.matmul(up, down, precision=jax.lax.Precision.HIGHEST)
        scale = self.scale.astype(jnp.float32).reshape(
            *self.scale.shape, *(1,) * (product.ndim - self.scale.ndim)
        )
        return (decode(self.base, jnp.float32) + scale * product).astype(
            self.dtype if dtype is None else dtype
        )

    def dropped(self, x: jax.Array) -> jax.Array:
        """Return the adapter's input after dropout, or unchanged where there is no key.

        Each element is zero with probability `dropout`; the others are divided by `1 - dropout`.
        """
        if self.key is None:
            return x
        kept = 1 - jax.lax.stop_gradient(self.dropout).astype(jnp.float32)
        keep = jax.random.bernoulli(self.key, kept, x.shape)
        return jnp.where(keep, x / kept.astype(x.dtype), jnp.zeros((), x.dtype))

    def specs(self, spec: PartitionSpec, sizes: AxisSizes) -> Adapted:
        """Return the leaf with a `PartitionSpec` in place of each array."""
        *lead, out, last = full_spec(spec, self.ndim)
        inner = PartitionSpec(*lead, out, last)
        base = self.base.specs(inner, sizes) if isinstance(self.base, Compressed) else inner
        return type(
            self
        )(
            base,
            PartitionSpec(*lead, None, last),  # pyright: ignore[reportArgumentType]
            PartitionSpec(*lead, out, None),  # pyright: ignore[reportArgumentType]
            PartitionSpec(*lead[: self.scale.ndim]),  # pyright: ignore[reportArgumentType]
        )

    def check(self) -> None:
        """Check the invariants of the class."""
        b = self.base.shape
        d = self.down
        u = self.up
        s = self.scale
        fits = (
            len(b) >= 2
            and len(d.shape) >= 2
            and d.shape == (*b[:-2], d.shape[-2], b[-1])
            and u.shape == (*b[:-1], d.shape[-2])
        )
        expect(
            fits,
            self,
            f"down {d.shape} and up {u.shape} do not fit a weight {b}; allowed: [..., rank, in] "
            "and [..., out, rank]",
        )
        expect(
            s.shape == b[: s.ndim] and s.ndim <= len(b) - 2,
            self,
            f"scale has shape {s.shape}; allowed: one number for each layer",
        )
        for name, a in (("down", d), ("up", u), ("scale", s)):
            expect(
                jnp.issubdtype(a.dtype, jnp.floating),
                self,
                f"{name} has dtype {a.dtype}; allowed: a floating-point dtype",
            )
        if isinstance(self.base, Compressed):
            self.base.check()


def read_adapters(params: tree.Params, key: jax.Array | None = None) -> tree.Params:
    """Replace weights that have adapters by `Adapted` leaves, in a tree or in that of one layer.

    Args:
      params: parameters with adapters.
      key: the random key of the layer in this training step, for dropout; None for no dropout.
    """
    out: tree.Params = {}
    for name, node in params.items():
        below = None if key is None else fold(key, name)
        out[name] = read_adapters(node, below) if isinstance(node, dict) else node
    for name in [name for name in out if name.endswith(SUFFIX)]:
        base = name.removesuffix(SUFFIX)
        if base in out and set(out[name]) - {"dropout"} == PARTS:  # else the name is the user's own
            adapter = dict(out.pop(name))
            rate = adapter.pop("dropout", None)
            if key is not None and rate is not None:
                adapter |= {
                    "dropout": rate,
                    "key": fold(key, name),
                }
            out[base] = Adapted(out[base], **adapter)
    return out
