"""Every axis of a mesh, alone and with others, gives the loss and the gradients of one device; the
model is the same.

The checks run once, in one process with eight simulated devices (see `outcomes8`); the tests here
read how they went.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxmodel import losses, ops, sharding
from jaxmodel.models import gpt2, gpt_oss, llama

B = 8
T = 16
SIZES = {"depth": 4, "init_scale": 0.1}
MODELS = {
    "gpt2": (gpt2, dataclasses.replace(gpt2.SIZES["tiny"], **SIZES)),
    "gemma": (llama, dataclasses.replace(llama.SIZES["tiny-gemma"], **SIZES)),
    "sinks": (gpt_oss, dataclasses.replace(gpt_oss.SIZES["tiny"], balance=0.0, **SIZES)),
    "moe": (llama, dataclasses.replace(llama.SIZES["tiny-moe"], **SIZES)),
    "unbalanced moe": (llama, dataclasses.replace(llama.SIZES["tiny-moe"], balance=0.0, **SIZES)),
}
MESHES = {
    "gpt2": [
        *("data=8", "fsdp=8", "tensor=4", "sequence=8", "pipeline=4"),
        *("data=2,fsdp=2,tensor=2", "fsdp=2,sequence=4", "pipeline=2,fsdp=2,tensor=2"),
    ],
    "gemma": ["pipeline=2,sequence=2,tensor=2"],
    "sinks": ["data=2,sequence=2,tensor=2"],
    "moe": ["expert=4"],
    "unbalanced moe": ["pipeline=2,expert=2,fsdp=2"],  # each micro-batch has a balance of its own
}


@functools.cache
def case(name: str):
    """The model on one device, parameters, a packed batch, and the loss and gradients on one
    device.
    """
    module, config = MODELS[name]
    model = module.model(config)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, config.vocab, (B, T + 1)), jnp.int32)
    ends = rng.integers(3, T - 2, (B, 1))
    segments = jnp.asarray(
        1 + (np.arange(T)[None] >= ends) - 3 * (np.arange(T)[None] >= T - ends % 3), jnp.int32
    ).clip(0)
    weights = (segments > 0).astype(jnp.float32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": segments,
        "weights": weights,
    }
    params = jax.jit(model.init)(jax.random.key(0))
    return module, config, params, batch, of_model(model)(params, batch)


def of_model(model):
    """params, batch -> (loss, gradients), jitted."""
    return jax.jit(
        lambda params, batch: jax.value_and_grad(lambda p: losses.next_token(model, p, batch)[0])(
            params
        )
    )


def close(got, want, tolerance: float) -> None:
    largest = max(
        np.abs(a).max() for a in jax.tree.leaves(want)
    )  # some have no gradient but rounding: a bias of all keys
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        a = np.asarray(a)
        b = np.asarray(b)
        error = np.abs(a - b).max() / max(np.abs(b).max(), 1e-3 * largest)
        assert error <= tolerance, (
            f"{jax.tree_util.keystr(path)}: {error} of the largest apart, allowed: {tolerance}"
        )


def check(name: str, shape: str) -> None:
    module, config, params, batch, (loss, grads) = case(name)
    mesh = sharding.make_mesh(shape)
    micro = 4 if "pipeline=2" in shape else 0
    placed = module.model(config, ops.Policy(axes=ops.MESH_AXES, microbatches=micro))
    rows = NamedSharding(mesh, P(tuple(axis for axis in sharding.BATCH_AXES if axis in mesh.shape)))
    with jax.set_mesh(mesh):
        got = of_model(placed)(
            sharding.place(placed.rules, params, mesh), jax.device_put(batch, rows)
        )
    error = abs(float(got[0]) - float(loss)) / float(loss)
    assert error <= 1e-5, f"{error} of the loss apart, allowed: 1e-5"
    close(got[1], grads, 1e-4)


CHECKS = [f"check:{name}:{shape}" for name, shapes in MESHES.items() for shape in shapes]


@pytest.fixture(scope="module")
def outcome(outcomes8):
    return outcomes8(__file__, CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_equals_one_device(name, outcome):
    assert not outcome[name], outcome[name]
