"""Depth: run a block over segments of stacked layers, and initialise them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodel import tree

type Block = Callable[..., tuple[jax.Array, Any, dict[str, jax.Array]]]
"""`block(params, x, context, cache, layer, rng, train) -> (x, cache, aux)`, params of one layer."""

_REMAT: dict[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def repeat(
    block: Block,
    params: tree.Params,
    x: jax.Array,
    context: dict[str, Any],
    cache: Any = None,
    rng: jax.Array | None = None,
    train: bool = False,
    remat: str = "none",
) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
    """Run all layers: each segment of several by one scan, a single layer as it is.

    Args:
      block: one layer.
      params: segment -> leaves (see `jaxmodel.tree`); segments may differ in everything.
      x: `[B, T, D]`.
      context: what a step computes once and each layer reads.
      cache: for all layers, or None; carried, so that XLA can write it in place.
      rng: layer `i` gets `fold_in(rng, i)`.
      train: passed to the block.
      remat: see `ops.Policy`.

    Returns:
      x, the cache, and the sum of each aux value over the layers.
    """

    def run(layer_params: Any, x: jax.Array, cache: Any, layer: Any) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
        key = None if rng is None else jax.random.fold_in(rng, layer)
        return block(layer_params, x, context, cache, layer, key, train)

    if remat != "none":
        run = jax.checkpoint(run, policy=_REMAT[remat])
    total: dict[str, jax.Array] = {}
    for key in tree.segments(params):
        layers = tree.span(key)
        assert layers is not None
        if len(layers) == 1:
            x, cache, aux = run(params[key], x, cache, layers.start)
        else:

            def body(carry: tuple[jax.Array, Any], xs: tuple[Any, jax.Array]) -> tuple[tuple[jax.Array, Any], Any]:
                new_x, new_cache, aux = run(xs[0], *carry, xs[1])
                return (new_x, new_cache), aux

            indices = jnp.arange(layers.start, layers.stop, dtype=jnp.int32)
            (x, cache), stacked = jax.lax.scan(body, (x, cache), (params[key], indices))
            aux = jax.tree.map(lambda a: jnp.sum(a, axis=0), stacked)
        total |= {name: total[name] + value if name in total else value for name, value in aux.items()}
    return x, cache, total


def init_layers(init: Callable[[jax.Array], tree.Params], key: jax.Array, depth: int) -> tree.Params:
    """`depth` equal layers in one segment, each initialised with a key of its own."""
    keys = jax.random.split(key, depth)
    if depth == 1:
        return {"0": init(keys[0])}
    return {tree.segment_key(range(depth)): jax.vmap(init)(keys)}
