"""Model FLOP utilisation (PaLM: Chowdhery et al., 2022).

It is computed from the operations of a token and the peak speed of the devices.
"""

from __future__ import annotations

import functools
import math
import time
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodel import tree
from jaxmodel.axes import UNDECLARED, assign, role_of
from jaxmodel.leaves.adapted import SUFFIX
from jaxmodel.models import Model
from jaxmodel.models.reads import reads

_PEAK = {  # peak bfloat16 operations per second of one chip, as its maker states them
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


_PRODUCTS = ("matrix", "experts", "router", "head")


def per_token(
    model: Any,
    params: Any,
    length: int,
    experts: float = 1.0,
    *,
    trains: tree.Params | None = None,
) -> float:
    """Count the operations of the forward and backward pass for one token.

    The count is `6 N + 6 L T D`, where N is the number of weights in matrix products. Of the 6, 2
    are the forward pass of every weight, 2 its own gradient if it trains, and 2 the gradient of its
    input if an upstream leaf trains. So frozen weights behind adapters cost 4; those upstream of
    the first leaf that trains cost 2, and their attention a third. Tables that are only looked up
    cost nothing; a table that is also the head counts as the head. Causal attention sees half of
    the T positions. Recomputation to save memory is not counted.

    Args:
      model: its axes say which leaves are matrices, its trace which leaves are upstream of them.
      params: all weights, or their shapes.
      length: T; 0 omits attention.
      experts: fraction of a layer's experts that a token uses.
      trains: the weights that train; None for all.

    >>> from jaxmodel.models import llama
    >>> model = llama.model(llama.Config(100, 8, 1, 2, 2, 4, 16, 32))
    >>> shapes = jax.eval_shape(model.init, jax.random.key(0))
    >>> layer, head = 4 * 8 * 8 + 3 * 16 * 8, 100 * 8
    >>> per_token(model, shapes, 0) / (layer + head)
    6.0
    >>> part = {"head": shapes["head"]}
    >>> per_token(model, shapes, 0, trains=part) == 2 * layer + 4 * head
    True
    """
    if not isinstance(model, Model):
        return _by_shapes(model, params, length, int(experts))
    shapes = {
        layer: tree.layer_shape(path, leaf)
        for path, leaf in tree.flatten(params).items()
        for layer in tree.layer_paths(path)
    }
    learns = tree.flatten(params if trains is None else trains)
    learnt = {layer for path in learns for layer in tree.layer_paths(path)}
    role = role_of(model.axes)
    letters = assign(model.axes, params)
    cost = 0.0
    width = 0
    layers: dict[str, bool] = {}  # whether anything in them or upstream trains
    for path, read in reads(model, params).items():
        passed = bool(learnt & read.ever)
        axes = letters[path].axes
        if path.startswith(f"{tree.BLOCKS}/"):
            layer = path.split("/")[1]
            layers[layer] = layers.get(layer, False) or passed or path in learnt
            if axes and any("h" in product for product in axes[0]):
                width = max(width, shapes[path][0])
        kind = role(path, shapes[path])
        in_head = axes and axes[0][0][0][0] == "V" and any("blocks/" in one for one in read.ever)
        if kind in _PRODUCTS or (kind == "table" and in_head):
            share = experts if kind == "experts" else 1.0
            cost += share * (2 + 2 * (path in learnt) + 2 * passed) * math.prod(shapes[path])
    return cost + 2.0 * length * width * (len(layers) + 2 * sum(layers.values()))


def _by_shapes(params: tree.Params, length: int, width: int, depth: int = 1) -> float:
    """Count as `per_token` of before did: from shapes and guessed roles.

    If there are adapters, only they train.
    """
    warnings.warn("flops.per_token takes the model first now", DeprecationWarning, stacklevel=3)
    leaves = tree.flatten(params)
    role = role_of(UNDECLARED)
    kinds = {path: role(path, leaf.shape) for path, leaf in leaves.items()}
    products = (*_PRODUCTS, *(() if "head" in kinds.values() else ("table",)))
    each = 4 if any(f"{SUFFIX}/" in path for path in leaves) else 6
    sizes = [math.prod(leaves[path].shape) for path, kind in kinds.items() if kind in products]
    return float(each * (sum(sizes) + depth * length * width))


@functools.cache
def peak(dtype: str) -> float | None:
    """Return the peak operations per second of all devices of the run.

    For a CPU this is measured: what a matrix product reaches on this machine now. None for an
    accelerator that the table does not list.
    """
    device = jax.devices()[0]
    if device.platform != "cpu":
        kind = next(
            (
                name
                for name in sorted(_PEAK, key=len, reverse=True)
                if device.device_kind.startswith(name)
            ),
            None,
        )
        return None if kind is None else _PEAK[kind] * jax.device_count()
    n = 1024
    a = jax.device_put(np.ones((n, n), jnp.dtype(dtype)), jax.local_devices()[0])
    run = jax.jit(lambda a: jax.lax.dot(a, a, preferred_element_type=jnp.float32))
    run(a).block_until_ready()
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        run(a).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best
