"""`Policy`: how a model computes.

It sets dtypes, rematerialisation, and the placement of activations on a mesh.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jaxmodel import moved
from jaxmodel.errors import at_least, one_of, unknown
from jaxmodel.sharding import BATCH_AXES

_DTYPES = ("float32", "bfloat16", "float16")
_CODES = {"int8": 8, "int4": 4}  # the cache may hold integer codes
_REMAT = ("none", "full", "dots")
_ATTENTION = ("auto", "plain", "blockwise")


@moved.keywords(**moved.POLICY)
@dataclasses.dataclass(frozen=True)
class Policy:
    """The settings of a computation; frozen and hashable, so equal ones share compiled functions.

    Attributes:
      compute_dtype: dtype of the operands of every contraction; sums, norms and softmax are always
        float32.
      activation_dtype: dtype of the activations between operations.
      cache_dtype: dtype of keys and values in the cache; None for `compute_dtype`. "int8" and
        "int4" round each head of each token with its own scale (see `jaxmodel.ops.cache.Rounded`):
        8.25 and 4.5 bits a number with heads of 64.
      remat: what the backward pass computes again: "none", "full" (each block), "dots" (everything
        but the contractions).
      attention: how attention runs: "plain" (all scores at once), "blockwise" (memory linear in
        length), "auto" (by length).
      axes: letter of an activation's axis -> mesh axes, such as `(("B", ("data", "fsdp")),
        ("H", "tensor"), ("F", "tensor"))`.
      microbatches: the number of parts of a batch that pass one after another through the
        pipeline stages of a mesh; 0 for as many as there are stages. With S stages and M parts, a
        stage is idle for (S - 1) / (M + S - 1) of the time.
      unroll: the number of layers in one iteration of the loop over layers. More layers compile
        longer. On a CPU a small model trains a third faster when all are unrolled, because the
        loop keeps what the backward pass needs in one array of all layers.
    """

    compute_dtype: str = "float32"
    activation_dtype: str = "float32"
    cache_dtype: str | None = None
    remat: str = "none"
    attention: str = "auto"
    axes: tuple[tuple[str, str | tuple[str, ...]], ...] = ()
    microbatches: int = 0
    unroll: int = 1

    def __post_init__(self) -> None:
        for name in ("compute_dtype", "activation_dtype", "cache_dtype"):
            value = getattr(self, name)
            allowed = (*_DTYPES, *_CODES) if name == "cache_dtype" else _DTYPES
            if value not in allowed and not (name == "cache_dtype" and value is None):
                raise unknown(f"policy.{name}", value, allowed)
        one_of("policy.remat", self.remat, _REMAT)
        one_of("policy.attention", self.attention, _ATTENTION)
        at_least("policy.microbatches", self.microbatches, 0)
        at_least("policy.unroll", self.unroll)

    @property
    def dtype_of_cache(self) -> jnp.dtype:
        """The dtype of a cache that holds numbers: `cache_dtype`, else that of the contractions."""
        rounded = self.cache_dtype is None or self.cache_dtype in _CODES
        return jnp.dtype(self.compute_dtype if rounded else self.cache_dtype)

    @property
    def bits_of_cache(self) -> int | None:
        """The bits of a code in the cache; None if it holds numbers."""
        return _CODES.get(self.cache_dtype or "")


MESH_AXES = (
    ("B", BATCH_AXES),
    ("T", "sequence"),
    ("H", "tensor"),
    ("K", "tensor"),
    ("F", "tensor"),
    ("V", "tensor"),
)
"""The default placement of activations.

Rows are split over the batch axes, positions over `sequence` (with ring attention), heads,
feed-forward units and the vocabulary over `tensor`.
"""
