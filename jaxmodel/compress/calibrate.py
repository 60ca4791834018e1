"""Compress a model block after block, each with the statistics of what is compressed before it."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodel import ops, tree
from jaxmodel.compress.observe import Stats
from jaxmodel.errors import InputError
from jaxmodel.models import Model, check_params
from jaxmodel.models.model import Inputs, begin
from jaxmodel.ops.probe import zeros_for
from jaxmodel.progress import progress


def layer_by_layer(
    model: Model,
    params: tree.Params,
    batches: Iterable[Inputs],
    needs: Mapping[str, tuple[str, ...]],
    compress: Any,
) -> tree.Params:
    """Measure and compress one block of `params["blocks"]` after another.

    The activations of all batches are kept, and the statistics of one block.

    Args:
      model: with blocks.
      params: plain or compressed.
      batches: inputs of `model.apply`.
      needs: layer path -> the names of the statistics that its chain wants; none for no entry.
      compress: (tree of one layer with its path, its stats) -> the tree compressed.

    Returns:
      The parameters with compressed blocks; what stands outside of the blocks is as it was.

    Raises:
      InputError: a model without blocks, or no batch.
    """
    block = model.parts.block
    if block is None or "blocks" not in params:
        raise InputError("order: 'sequential' needs a model of blocks; allowed here: 'once'")
    check_params(model, params)
    start = jax.jit(functools.partial(begin, model))
    states = [start(params, inputs)[:2] for inputs in batches]
    if not states:
        raise InputError("batches: there is none")
    step = jax.jit(lambda layer, i, x, context: block(layer, x, context, None, i, None, False)[0])

    @jax.jit
    def measure(zeros: Stats, layer: tree.Params, i: Any, x: Any, context: Any) -> Stats:
        def total(zeros: Stats) -> jax.Array:
            probed = {
                path: ops.Probe(leaf, zeros[path]) if path in zeros else leaf
                for path, leaf in tree.flatten(layer).items()
            }
            return jnp.sum(block(tree.unflatten(probed), x, context, None, i, None, False)[0])

        return jax.grad(total)(zeros)

    layers = tree.unstack(params)["blocks"]
    done = {}
    for name in progress(sorted(layers, key=int), "compress"):
        layer = layers[name]
        at = f"{tree.BLOCKS}/{name}"
        zeros = {
            path: zeros_for(leaf.shape, needs[f"{at}/{path}"])
            for path, leaf in tree.flatten(layer).items()
            if needs.get(f"{at}/{path}")
        }
        i = jnp.int32(name)
        stats: Any = None
        for x, context in states if zeros else ():
            found = measure(zeros, layer, i, x, context)
            stats = found if stats is None else jax.tree.map(jnp.add, stats, found)
        measured = {f"{at}/{path}": value for path, value in (stats or {}).items()}
        layer = compress({tree.BLOCKS: {name: layer}}, measured)[tree.BLOCKS][name]
        done[name] = layer
        states = [(step(layer, i, x, context), context) for x, context in states]
    return tree.stack({**params, tree.BLOCKS: done})
