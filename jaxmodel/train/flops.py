"""How many operations a token costs, and how many the devices could do: model FLOP utilisation (PaLM: Chowdhery et al., 2022)."""

from __future__ import annotations

import functools
import math
import time

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


def per_token(params: tree.Params, length: int, width: int = 0, depth: int = 0, experts: float = 1.0) -> float:
    """Operations of forward and backward pass for one token: `6 N + 6 L T D`, N the weights in products of matrices.

    Tables that are only looked up count, since a tied one is the head too; causal attention sees half of the T positions.

    Args:
      params: the weights that train, or their shapes.
      length: T.
      width: D; 0 leaves attention out.
      depth: L.
      experts: the share of a layer's experts that a token meets.
    """
    leaves = {path: leaf for path, leaf in tree.flatten(params).items() if len(tree.layer_shape(path, leaf)) > 1}
    shares = {path: experts if len(tree.layer_shape(path, leaf)) > 2 and "/moe/" in path else 1 for path, leaf in leaves.items()}
    matrices = sum(shares[path] * math.prod(leaf.shape) for path, leaf in leaves.items())
    return 6.0 * matrices + 6.0 * depth * length * width


@functools.cache
def peak(dtype: str) -> float | None:
    """Operations in a second that all devices of the run could do; of a CPU what a product of two
    matrices reaches on this machine here and now.

    None for an accelerator that the table does not know.
    """
    device = jax.devices()[0]
    if device.platform != "cpu":
        kind = next((name for name in sorted(_PEAK, key=len, reverse=True) if device.device_kind.startswith(name)), None)
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
