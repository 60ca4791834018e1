"""How many operations a token costs, and how many the devices could do: model FLOP utilisation
(PaLM: Chowdhery et al., 2022).
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

_PEAK = {  # bfloat16 operations in a second of one chip, as its maker states it
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
    """Operations of forward and backward pass for one token: `6 N + 6 L T D`, N the weights in
    products of matrices.

    Of the 6, 2 are the forward pass of every weight, 2 its own gradient, where it trains, and 2
    that of what it reads, where something in front of it trains: so frozen weights behind adapters
    cost 4, those in front of the first layer that trains 2, and their attention a third. Tables
    that are only looked up cost nothing; one that is the head too counts as that. Causal attention
    sees half of the T positions. What is computed again to save memory does not count.

    Args:
      params: all weights, or their shapes.
      length: T.
      width: D; 0 leaves attention out.
      depth: L.
      experts: the share of a layer's experts that a token meets.
      trains: those of them that train; None for all, or the adapters alone where there are some.

    >>> layers = {"blocks": {"0": {"mlp": {"up": np.zeros((16, 8))}}}}
    >>> shapes = {"embed": np.zeros((100, 8)), **layers, "head": np.zeros((100, 8))}
    >>> per_token(shapes, 1) / (16 * 8 + 100 * 8), per_token(shapes, 1, trains=layers) / (16 * 8 + 100 * 8)
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
    """Where a layer's leaf stands in the forward pass: the number of its layer, and where in that."""
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
    """Whether a matrix is only looked up: an embedding, unless it is the head too, as it is where
    that has no rows of its own.
    """
    if path.split("/")[-1] not in TABLES:
        return False
    heads = [leaf for other, leaf in leaves.items() if other == "head" or other.startswith("head/")]
    own = [len(leaf.shape) for leaf in heads if leaf.shape[:1] == leaves[path].shape[:1]]
    tied = path == "embed" and (not heads or (bool(own) and max(own) < 2))
    return not tied


@functools.cache
def peak(dtype: str) -> float | None:
    """Operations in a second that all devices of the run could do; of a CPU what a product of two
    matrices reaches on this machine here and now.

    None for an accelerator that the table does not know.
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
