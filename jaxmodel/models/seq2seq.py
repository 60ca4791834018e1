"""Parts that models with a source and a target share.

They are the inputs, and what the decoder needs of the source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodel import tree
from jaxmodel.errors import InputError
from jaxmodel.layers.repeat import Block
from jaxmodel.models.model import decoder_context


def source_inputs(batch: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the inputs of an encoder and its decoder.

    `source` and `tokens` are `[B, T]`; `source_mask` and `mask` are optional.
    """
    return {name: jax.ShapeDtypeStruct((batch, length), jnp.int32) for name in ("source", "tokens")}


def source_context(
    inputs: Mapping[str, jax.Array],
    cache: Any,
    encode: Callable[[jax.Array, jax.Array], dict[str, jax.Array]],
) -> tuple[jax.Array, dict[str, Any]]:
    """Return the positions `[B, T]` of the target, and the decoder's context.

    If there is a source, the context has the encoder's output, `memory` `[B, S, D]` with
    `memory_mask`, and the cache with room for it. Otherwise the cache has read a source already.

    Args:
      inputs: the inputs of the model.
      cache: a cache with a method `reading` (see `ops.memory.CrossAttentionCache`), or None.
      encode: (source, its mask) -> `memory`, and the other arguments of `reading`.

    Raises:
      InputError: there is no source, neither here nor in the cache, or documents are packed.
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
                "source: none given; allowed: token ids [B, S], or none with a cache that has "
                "read a source"
            )
        return positions, context
    mask = inputs.get("source_mask")
    mask = jnp.ones(source.shape, jnp.bool_) if mask is None else mask.astype(jnp.bool_)
    made = encode(source, mask)
    context |= {**made, "memory_mask": mask}
    if cache is not None:
        context["cache"] = cache.reading(mask, **made)
    return positions, context


def block_of(module: nn.Module) -> Block:
    """Return a layer that runs a module `(x, context, cache, layer, rng) -> (x, cache)`."""

    def block(
        params: tree.Params,
        x: jax.Array,
        context: dict[str, Any],
        cache: Any = None,
        layer: int | jax.Array = 0,
        rng: jax.Array | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
        drop = rng if train else None
        out: Any = module.apply({"params": params}, x, context, cache, layer, drop)
        return *out, {}

    return block
