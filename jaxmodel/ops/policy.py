"""`Policy`: how a model computes.

Dtypes, rematerialisation, and where activations lie on a mesh.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jaxmodel.errors import at_least, unknown
from jaxmodel.sharding import BATCH_AXES

_DTYPES = ("float32", "bfloat16", "float16")
_REMAT = ("none", "full", "dots")
_ATTENTION = ("auto", "plain", "blockwise")


@dataclasses.dataclass(frozen=True)
class Policy:
    """Frozen and hashable, so that equal policies give the same compiled functions.

    Attributes:
      compute: dtype of the operands of every contraction; sums, norms and softmax are float32
        whatever it is.
      stream: dtype of the activations between operations.
      cache: dtype of keys and values in the cache; None for `compute`.
      remat: what the backward pass computes again: "none", "full" (each block), "dots" (all but the
        contractions).
      attention: how attention runs: "plain" (all scores at once), "blockwise" (memory linear in
        length), "auto" (by length).
      axes: letter of an activation's axis -> mesh axes, `(("B", ("data", "fsdp")), ("H", "tensor"),
        ("F", "tensor"))`.
      microbatches: parts of a batch that follow each other through the stages of a mesh with
        `pipeline`; 0 for as many as there are stages. With S stages and M parts a stage has nothing
        to do for (S - 1) / (M + S - 1) of the time.
      unroll: layers that stand in the program one after the other, in a loop over the rest. More
        compile longer; on a CPU a small model trains by a third faster without the loop, which
        keeps what the backward pass needs in one array of all layers.
    """

    compute: str = "float32"
    stream: str = "float32"
    cache: str | None = None
    remat: str = "none"
    attention: str = "auto"
    axes: tuple[tuple[str, str | tuple[str, ...]], ...] = ()
    microbatches: int = 0
    unroll: int = 1

    def __post_init__(self) -> None:
        for name in ("compute", "stream", "cache"):
            value = getattr(self, name)
            if value not in _DTYPES and not (name == "cache" and value is None):
                raise unknown(f"policy.{name}", value, _DTYPES)
        if self.remat not in _REMAT:
            raise unknown("policy.remat", self.remat, _REMAT)
        if self.attention not in _ATTENTION:
            raise unknown("policy.attention", self.attention, _ATTENTION)
        at_least("policy.microbatches", self.microbatches, 0)
        at_least("policy.unroll", self.unroll)

    @property
    def cache_dtype(self) -> jnp.dtype:
        """The dtype of the cache."""
        return jnp.dtype(self.cache or self.compute)


MESH_AXES = (
    ("B", BATCH_AXES),
    ("T", "sequence"),
    ("H", "tensor"),
    ("K", "tensor"),
    ("F", "tensor"),
    ("V", "tensor"),
)
"""The usual placement of activations: rows over the axes of the batch, positions over `sequence`
(whose attention is a ring), heads, feed-forward and vocabulary over `tensor`.
"""
