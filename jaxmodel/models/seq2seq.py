"""What models that read a source and write a target share: their inputs, and what their decoder
needs of the source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodel.errors import InputError
from jaxmodel.models.model import decoder_context


def source_inputs(batch: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The inputs of an encoder and its decoder:

    `source` and `tokens` `[B, T]`; `source_mask` and `mask` are optional.
    """
    return {name: jax.ShapeDtypeStruct((batch, length), jnp.int32) for name in ("source", "tokens")}


def source_context(
    inputs: Mapping[str, jax.Array],
    cache: Any,
    encode: Callable[[jax.Array, jax.Array], dict[str, jax.Array]],
) -> tuple[jax.Array, dict[str, Any]]:
    """Positions `[B, T]` of the target and the decoder's context.

    Where there is a source, the context has what the encoder made of it, `memory` `[B, S, D]` with
    `memory_mask`, and the cache with room for it. Else the cache has read one.

    Args:
      inputs: of the model.
      cache: one with a method `reading` (see `ops.memory.MemoryCache`), or None.
      encode: (source, its mask) -> `memory`, and what else `reading` takes.

    Raises:
      InputError: no source, neither here nor in the cache, or packed documents.
    """
    if "segments" in inputs:
        raise InputError(
            "segments: given to a model that reads a source; a row is one source and one target, "
            "so leave them out"
        )
    positions, context = decoder_context(inputs, cache)
    source = inputs.get("source")
    if source is None:
        if cache is None or cache.valid.shape[1] == 0:
            raise InputError(
                "source: none given; allowed: token ids [B, S], and none only with a cache that "
                "has read one"
            )
        return positions, context
    mask = inputs.get("source_mask")
    mask = jnp.ones(source.shape, jnp.bool_) if mask is None else mask.astype(jnp.bool_)
    made = encode(source, mask)
    context |= {**made, "memory_mask": mask}
    if cache is not None:
        context["cache"] = cache.reading(mask, **made)
    return positions, context
