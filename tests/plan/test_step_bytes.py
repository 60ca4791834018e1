"""A training step sends what the formulas of data, fsdp and tensor say and nothing else, read from
what XLA compiled.

For the axes that `jit` shards, on eight CPU devices and for a TPU v5e that is not here: on a CPU
XLA has no reduce-scatter, and so fsdp is `2G + 2P` there. Those in a `shard_map` (sequence, expert,
pipeline) are checked beside their code.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxmodel import losses, ops, plan, sharding, train, tree
from jaxmodel.errors import InputError
from jaxmodel.models import gpt2, llama

B = 16
T = 32
GPT2 = gpt2.Config(256, 128, 2, 8, T)  # the head is the embedding
LLAMA = dataclasses.replace(
    llama.SIZES["tiny"], width=128, mlp_width=256, heads=8, kv_heads=8, depth=2
)  # it is not


def found_in(module, config, shape: str, devices=None, loss=losses.next_token) -> dict:
    """What a step sends, and the bytes of gradients and of activations."""
    mesh = sharding.make_mesh(shape, devices)
    model = module.model(config, ops.Policy(axes=ops.MESH_AXES))
    batch = {name: jax.ShapeDtypeStruct((B, T), jnp.int32) for name in ("tokens", "targets")}
    program = train.Program(model, loss=loss, optimizer=optax.sgd(0.1), mesh=mesh).compile(batch)
    gradients = tree.nbytes(jax.eval_shape(model.init, jax.random.key(0)))
    return {
        "sent": plan.moved(plan.collectives(program)),
        "G": gradients,
        "act": B * T * config.width * 4,
    }


def values_on(shape: str, losses) -> list[list[float]]:
    """Each loss of the first parameters and one batch, and the norms of its gradient."""
    model = llama.model(LLAMA, ops.Policy(axes=ops.MESH_AXES))
    rows = jax.random.randint(jax.random.key(1), (4, T + 1), 0, LLAMA.vocab)
    batch = {"tokens": rows[:, :-1], "targets": rows[:, 1:]}
    found = []
    with jax.set_mesh(mesh := sharding.make_mesh(shape)):
        params = sharding.place(model.rules, jax.jit(model.init)(jax.random.key(0)), mesh)
        for loss in losses:
            value, grads = jax.jit(
                jax.value_and_grad(lambda params, loss=loss: loss(model, params, batch)[0])
            )(params)
            found.append(
                [float(value), *(float(jnp.linalg.norm(g)) for g in jax.tree.leaves(grads))]
            )
    return found


def run_all(kind: str) -> dict[str, dict]:
    """Each program's traffic, on the simulated devices or for the TPU."""
    chunked = functools.partial(losses.next_token, chunk=8)
    if kind == "cpu":
        found = {shape: found_in(llama, LLAMA, shape) for shape in ("data=8", "fsdp=8")}
        found |= {
            f"{shape}, chunked": found_in(llama, LLAMA, shape, loss=chunked)
            for shape in ("data=8", "fsdp=8")
        }
        values = {
            shape: values_on(shape, (losses.next_token, chunked))
            for shape in ("sequence=4", "data=2,fsdp=2,tensor=2")
        }
        return found | {"values": values}
    devices = plan.topology("v5e:2x4")
    found = {
        shape: found_in(gpt2, GPT2, shape, devices)
        for shape in ("data=8", "fsdp=8", "tensor=8", "sequence=8")
    }
    found["sequence=8, chunked"] = found_in(gpt2, GPT2, "sequence=8", devices, chunked)
    across = sharding.make_mesh("fsdp=8,tensor=2", plan.topology("v6e:4x4"))
    found["fsdp=8,tensor=2 on v6e:4x4"] = {
        "devices": len({device.id for device in across.devices.flat})
    }
    try:
        plan.topology("v9:2x2")
    except InputError as error:
        found["v9:2x2"] = {"error": str(error)}
    return found


@pytest.fixture(scope="module")
def on_cpu(devices8):
    return json.loads(devices8(Path(__file__), "cpu").splitlines()[-1])


@pytest.fixture(scope="module")
def on_tpu():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, of the extra `plan`, is not installed")
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run(
        [sys.executable, __file__, "tpu"], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def within(sent: int, formula: int) -> None:
    assert 0.9 * formula <= sent <= 1.02 * formula, (
        f"{sent} bytes, {sent / formula:.4f} of the formula"
    )


def test_data_on_cpu(on_cpu):
    """The gradients are summed."""
    found = on_cpu["data=8"]
    within(found["sent"]["all-reduce"], 2 * found["G"])
    assert set(found["sent"]) == {"all-reduce"}


def test_fsdp_on_cpu(on_cpu):
    found = on_cpu["fsdp=8"]
    within(sum(found["sent"].values()), 2 * found["G"] + 2 * found["G"])
    assert found["sent"]["all-gather"] <= 2 * found["G"]
    assert set(found["sent"]) == {"all-gather", "all-reduce"}


def test_a_chunked_loss_sends_what_the_whole_one_does(on_cpu, on_tpu):
    """Not its head's weights, nor their gradients, nor positions, for each chunk again."""
    assert on_tpu["sequence=8, chunked"]["sent"] == on_tpu["sequence=8"]["sent"]
    for shape in ("data=8", "fsdp=8"):
        whole, chunked = (on_cpu[name]["sent"] for name in (shape, f"{shape}, chunked"))
        assert chunked.get("all-gather") == whole.get("all-gather")
        # in a shard_map a CPU has a reduce-scatter, of half the bytes
        assert chunked["all-reduce"] + 2 * chunked.get("reduce-scatter", 0) == pytest.approx(
            whole["all-reduce"], rel=1e-4
        )
    for whole, chunked in on_cpu["values"].values():
        assert chunked == pytest.approx(whole, rel=1e-5)


def test_an_axis_may_be_a_part_of_one_of_the_wires(on_tpu):
    assert on_tpu["fsdp=8,tensor=2 on v6e:4x4"] == {"devices": 16}


def test_data_on_tpu(on_tpu):
    found = on_tpu["data=8"]
    within(found["sent"]["all-reduce"], 2 * found["G"])
    assert set(found["sent"]) == {"all-reduce"}


def test_fsdp_on_tpu(on_tpu):
    """Gradients are scattered, parameters gathered twice; only vectors, which are not cut, and
    positions are summed.
    """
    found = on_tpu["fsdp=8"]
    gradients = on_tpu["fsdp=8"]["G"]
    within(sum(found["sent"].values()), gradients + 2 * gradients)
    within(found["sent"]["reduce-scatter"], gradients)
    assert found["sent"]["all-gather"] <= 2 * gradients
    assert found["sent"]["all-reduce"] <= 0.1 * gradients
    assert set(found["sent"]) == {"all-gather", "all-reduce", "reduce-scatter"}


def test_tensor_on_tpu(on_tpu):
    """Two sums of activations a layer forward and two backward, one behind the embedding and one in
    front of the head.
    """
    found = on_tpu["tensor=8"]
    within(found["sent"].pop("all-reduce"), 2 * (4 * GPT2.depth + 2) * found["act"])
    assert not found["sent"]


def test_a_slice_that_is_none(on_tpu):
    error = on_tpu["v9:2x2"]["error"]
    assert error.startswith(
        "topology: 'v9:2x2' is not a slice that libtpu knows"
    ) and error.endswith("allowed: such as 'v5e:2x4'")
    assert "\n" not in error


if __name__ == "__main__":
    print(json.dumps(run_all(sys.argv[1])))
