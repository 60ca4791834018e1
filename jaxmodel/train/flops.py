"""Model FLOP utilisation (PaLM: Chowdhery et al., 2022).

It is computed from the operations of a token and the peak speed of the devices.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodel import tree

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


TABLES = ("embed", "positions", "types", "embedding")
"""The last name of leaves that are looked up."""


def per_token(
    params: tree.Params,
    length: int,
    width: int = 0,
    depth: int = 0,
    experts: float = 1.0,
    *,
    trains: tree.Params | None = None,
) -> float:
    """Return the operations of the forward and backward pass for one token: `6 N + 6 L T D`.

    N is the number of weights in matrix products. Of the 6 operations, 2 are the forward pass of
    every weight, 2 the gradient of the weight, if it trains, and 2 the gradient of its input, if
    something before it trains. So frozen weights after adapters cost 4, those before the first
    trained layer cost 2, and their attention a third. Tables that are only looked up cost nothing;
    one that is also the head counts as the head. Causal attention sees half of the T positions.
    Operations that are repeated to save memory do not count.

    Args:
      params: all weights, or their shapes.
      length: the sequence length T.
      width: the model width D; 0 leaves attention out.
      depth: the number of layers L.
      experts: the share of a layer's experts that a token uses.
      trains: the weights that train; None for all, or for the adapters alone if there are some.

    >>> layers = {"blocks": {"0": {"mlp": {"up": np.zeros((16, 8))}}}}
    >>> shapes = {"embed": np.zeros((100, 8)), **layers, "head": np.zeros((100, 8))}
    >>> weights = 16 * 8 + 100 * 8
    >>> per_token(shapes, 1) / weights, per_token(shapes, 1, trains=layers) / weights
    (6.0, 4.0)
    """
    leaves = tree.flatten(params)
    adapters = [
        path for path in leaves if path.split("/")[-2:-1] and path.split("/")[-2].endswith("_lora")
    ]
    learns = list(tree.flatten(trains)) if trains is not None else adapters or list(leaves)
    places = [_place(layer) for path in learns for layer in tree.layer_paths(path)]
    first = min(places, default=(math.inf, 0.0))
    learnt = set(learns)
    cost = 0.0
    for path, leaf in leaves.items():
        shape = tree.layer_shape(path, leaf)
        if len(shape) < 2 or _is_table(path, leaves):
            continue
        share = experts if len(shape) > 2 and "moe" in path.split("/") else 1.0
        place = _place if path != "embed" else lambda _: (math.inf, 1.0)  # as the head
        passed = [first < place(layer) for layer in tree.layer_paths(path)]
        factors = sum(2 + 2 * (path in learnt) + 2 * through for through in passed)
        cost += share * factors * math.prod(shape)
    behind = depth - min(max(first[0], 0), depth)
    return cost + 2.0 * length * width * (depth + 2 * behind)


def _place(layer: str) -> tuple[float, float]:
    """Return a leaf's position in the forward pass: its layer's number, and the place within."""
    keys = layer.split("/")
    if tree.BLOCKS not in keys:
        return (
            (-1.0, 0.0)
            if keys[-1] in TABLES or "embed" in keys or "encoder" in keys
            else (math.inf, float(keys[0] == "head"))
        )
    at = keys.index(tree.BLOCKS) + 1
    number = float(keys[at]) if "encoder" not in keys else -1.0
    rest = keys[at + 1 :]
    within = (
        0.0
        if rest[0].startswith("attn_norm")
        else 1.0
        if rest[0] == "attn" and rest[-1] != "o"
        else 2.0
    )
    return number, within + 0.5 * (
        rest[-1] == "up" and len(rest) > 1 and rest[-2].endswith("_lora")
    )


def _is_table(path: str, leaves: Mapping[str, Any]) -> bool:
    """Return whether a matrix is only looked up.

    That is an embedding, unless it is the head too, as in a model without a separate head.
    """
    if path.split("/")[-1] not in TABLES:
        return False
    heads = [leaf for other, leaf in leaves.items() if other == "head" or other.startswith("head/")]
    own = [len(leaf.shape) for leaf in heads if leaf.shape[:1] == leaves[path].shape[:1]]
    tied = path == "embed" and (not heads or (bool(own) and max(own) < 2))
    return not tied


@functools.cache
def peak(dtype: str) -> float | None:
    """Return the operations per second that all devices of the run can do.

    For a CPU this is what a matrix product reaches on this machine at this moment. None for an
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
