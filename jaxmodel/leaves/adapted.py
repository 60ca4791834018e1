"""`Adapted`: a weight and a product of two thin matrices that is added to it."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxmodel import tree
from jaxmodel.leaves.leaf import AxisSizes, Compressed, decode, expect, full_spec, register

SUFFIX = "_lora"
"""The adapter of the leaf `q` lies beside it in the tree, in the branch `q_lora`:

`down`, `up`, `scale`.
"""

PARTS = {"down", "up", "scale"}


@register
class Adapted(Compressed):
    """`w = base + scale up @ down`: a low-rank adapter (LoRA: Hu et al., 2021).

    A contraction runs the base as it is and the adapter beside it, so that the base may be
    compressed in any way and the sum need not be there. In training the adapter, not the base, may
    see its input with some elements dropped; what a leaf stands for does not depend on it.

    Invariants (`check`):
      base: an array `[..., out, in]`, or a compressed leaf that stands for one.
      down: floating `[..., rank, in]`.
      up: floating `[..., out, rank]`.
      scale: floating, `[]` or as many as there are layers.
      dropout: the probability with which an element of the input is dropped for the adapter, `[]`,
        in training; else None.
      key: of one layer in a step, with `dropout`; else None.
    """

    base: Any
    down: Any
    up: Any
    scale: Any
    dropout: Any = None
    key: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def dtype(self) -> jnp.dtype:
        return self.base.dtype

    @property
    def rank(self) -> int:
        """Rows of `down`."""
        return self.down.shape[-2]

    def decode(self, dtype: Any = None) -> jax.Array:
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
        """What the adapter reads of an input: in training each element as zero with a probability,
        else divided by the rest.
        """
        if self.key is None:
            return x
        kept = 1 - jax.lax.stop_gradient(self.dropout).astype(jnp.float32)
        keep = jax.random.bernoulli(self.key, kept, x.shape)
        return jnp.where(keep, x / kept.astype(x.dtype), jnp.zeros((), x.dtype))

    def specs(self, spec: PartitionSpec, sizes: AxisSizes) -> Adapted:
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
            f"down {d.shape} and up {u.shape} do not fit a weight {b}; [..., rank, in] and [..., "
            f"out, rank] do",
        )
        expect(
            s.shape == b[: s.ndim] and s.ndim <= len(b) - 2,
            self,
            f"scale has shape {s.shape}; one number a layer is needed",
        )
        for name, a in (("down", d), ("up", u), ("scale", s)):
            expect(
                jnp.issubdtype(a.dtype, jnp.floating),
                self,
                f"{name} has dtype {a.dtype}; a floating one is needed",
            )
        if isinstance(self.base, Compressed):
            self.base.check()


def read_adapters(params: tree.Params, key: jax.Array | None = None) -> tree.Params:
    """A tree, or that of one layer, with `Adapted` leaves in place of weights and adapters.

    Args:
      params: with adapters.
      key: of the layer in a step of training, for dropout; None for none.
    """
    out: tree.Params = {}
    for name, node in params.items():
        below = None if key is None else jax.random.fold_in(key, zlib.crc32(name.encode()))
        out[name] = read_adapters(node, below) if isinstance(node, dict) else node
    for name in [name for name in out if name.endswith(SUFFIX)]:
        base = name.removesuffix(SUFFIX)
        if base in out and set(out[name]) - {"dropout"} == PARTS:  # else it is somebody's own name
            adapter = dict(out.pop(name))
            rate = adapter.pop("dropout", None)
            if key is not None and rate is not None:
                adapter |= {
                    "dropout": rate,
                    "key": jax.random.fold_in(key, zlib.crc32(name.encode())),
                }
            out[base] = Adapted(out[base], **adapter)
    return out
