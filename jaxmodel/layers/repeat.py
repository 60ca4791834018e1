"""Depth: running a block over segments of stacked layers, and initialising them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmodel import tree
from jaxmodel.errors import InputError
from jaxmodel.layers.pipeline import AXIS, Stage, gpipe
from jaxmodel.ops.product import WITHOUT_BATCH
from jaxmodel.sharding import auto_axes


@runtime_checkable
class Block(Protocol):
    """One layer of a model."""

    def __call__(
        self,
        params: tree.Params,
        x: Float[Array, "B *axes D"],
        context: dict[str, Any],
        cache: Any = None,
        layer: int | Int[Array, ""] = 0,
        rng: Array | None = None,
        train: bool = False,
        /,
    ) -> tuple[Float[Array, "B *axes D"], Any, dict[str, Float[Array, ""]]]:
        """Run the layer.

        Args:
          params: the parameters of the layer alone, without a leading axis.
          x: the activations.
          context: what the embedding computed once for all layers.
          cache: the cache of all layers, or None.
          layer: its index, from 0; traced in a scan.
          rng: a key of this layer, or None for no randomness.
          train: whether this is a step of training.

        Returns:
          The activations, of the same shape in layers that share a segment; the cache; and named
          float32 scalars, which are summed over the layers.
        """
        ...


_REMAT: dict[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(WITHOUT_BATCH),
    ),
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
    microbatches: int = 0,
    unroll: int = 1,
) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
    """Run all layers.

    Each segment of several layers is one scan; a single layer runs as it is. If the mesh has
    `pipeline`, the layers run in stages.

    Args:
      block: the function of one layer.
      params: segment -> leaves (see `jaxmodel.tree`); segments may differ in everything.
      x: activations `[B, T, D]`.
      context: values that are computed once and read by each layer: arrays `[B, ...]` or
        `[1, ...]`, and scalars.
      cache: the cache of all layers, or None; carried, so that XLA can update it in place.
      rng: a key; layer `i` gets `fold_in(rng, i)`.
      train: passed to the block.
      remat: see `ops.Policy`.
      microbatches: see `ops.Policy`; for stages, which are not used with a cache.
      unroll: see `ops.Policy`.

    Returns:
      x, the cache, and the sum of each aux value over the layers (with stages, the sum of its means
      over the micro-batches).

    Raises:
      InputError: there are stages, and the layers differ or cannot be divided evenly.
    """
    if auto_axes().get(AXIS, 1) > 1 and cache is None:
        x, total = gpipe(
            stage_of(block, train, remat, unroll),
            one_segment(params),
            x,
            context,
            rng,
            microbatches,
        )
        return x, None, total
    run = _layer(block, context, rng, train, remat)
    total: dict[str, jax.Array] = {}
    for key in tree.segments(params):
        layers = tree.span(key)
        assert layers is not None
        if len(layers) == 1:
            x, cache, aux = run(params[key], x, cache, layers.start)
        else:
            indices = jnp.arange(layers.start, layers.stop, dtype=jnp.int32)
            x, cache, aux = _scan(run, params[key], x, cache, indices, unroll)
        total |= {
            name: total[name] + value if name in total else value for name, value in aux.items()
        }
    return x, cache, total


def one_segment(params: tree.Params) -> Any:
    """Return the leaves of layers that are all equal, as stages need them.

    Raises:
      InputError: there are several segments.
    """
    keys = tree.segments(params)
    if len(keys) > 1 or len(tree.span(keys[0]) or ()) == 1:
        raise InputError(
            "mesh: pipeline stages need one segment of identical layers; there are "
            f"{', '.join(keys)}"
        )
    return params[keys[0]]


def stage_of(block: Block, train: bool, remat: str, unroll: int = 1) -> Stage:
    """Return the function of one stage of a pipeline: its part of the layers, as one scan."""

    def stage(
        layers: Any, x: jax.Array, context: Any, place: Any, key: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        own = jax.tree.leaves(layers)[0].shape[0]
        indices = place * own + jnp.arange(own, dtype=jnp.int32)
        x, _, aux = _scan(
            _layer(block, context, key, train, remat), layers, x, None, indices, unroll
        )
        return x, aux

    return stage


def _layer(
    block: Block, context: dict[str, Any], rng: Any, train: bool, remat: str
) -> Callable[..., Any]:
    def run(
        layer_params: Any, x: jax.Array, cache: Any, layer: Any
    ) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
        key = None if rng is None else jax.random.fold_in(rng, layer)
        return block(layer_params, x, context, cache, layer, key, train)

    return run if remat == "none" else jax.checkpoint(run, policy=_REMAT[remat])


def _scan(
    run: Callable[..., Any], layers: Any, x: jax.Array, cache: Any, indices: jax.Array, unroll: int
) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
    def body(
        carry: tuple[jax.Array, Any], xs: tuple[Any, jax.Array]
    ) -> tuple[tuple[jax.Array, Any], Any]:
        x, cache, aux = run(xs[0], *carry, xs[1])
        return (x, cache), aux

    (x, cache), stacked = jax.lax.scan(
        body, (x, cache), (layers, indices), unroll=min(unroll, len(indices))
    )
    return x, cache, jax.tree.map(lambda a: jnp.sum(a, axis=0), stacked)


def init_layers(
    init: Callable[[jax.Array], tree.Params], key: jax.Array, depth: int, first: int = 0
) -> tree.Params:
    """Initialise `depth` equal layers as one segment, numbered from `first`.

    Each layer has its own key.
    """
    keys = jax.random.split(key, depth)
    if depth == 1:
        return {str(first): init(keys[0])}
    return {tree.segment_key(range(first, first + depth)): jax.vmap(init)(keys)}
