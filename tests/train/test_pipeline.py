"""One forward, one backward on eight devices: equal to one device, with the bytes and the memory
that are promised.

The checks run once, in one process with eight simulated devices (see `outcomes8`); the tests here
read how they went.
"""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxmodel import losses, ops, plan, sharding, tree
from jaxmodel.errors import InputError
from jaxmodel.models import gpt2, llama
from jaxmodel.train.pipeline import one_forward_one_backward

B = 16
T = 8
GPT2 = dataclasses.replace(gpt2.SIZES["tiny"], depth=4, init_scale=0.1)
MOE = dataclasses.replace(llama.SIZES["tiny-moe"], depth=4, init_scale=0.1, balance=0.0)


def build(module, config, shape: str, count: int = 0, rows: int = B, **policy):
    """The model alone and placed, parameters alone and placed, a batch alone and placed,
    the mesh.
    """
    mesh = sharding.make_mesh(shape)
    alone = module.model(config)
    placed = module.model(config, ops.Policy(axes=ops.MESH_AXES, microbatches=count, **policy))
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, config.vocab, (rows, T + 1)), jnp.int32)
    segments = jnp.asarray(1 + (np.arange(T)[None] >= rng.integers(2, T - 1, (rows, 1))), jnp.int32)
    weights = jnp.asarray(
        rng.random((rows, T)) < 0.7, jnp.float32
    )  # so that micro-batches weigh unequally
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": segments,
        "weights": weights,
    }
    params = jax.jit(alone.init)(jax.random.key(0))
    where = NamedSharding(
        mesh, P(tuple(axis for axis in sharding.BATCH_AXES if axis in mesh.shape))
    )
    return (
        alone,
        placed,
        params,
        sharding.place(alone.rules, params, mesh),
        batch,
        jax.device_put(batch, where),
        mesh,
    )


def close(got, want, tolerance: float = 1e-4) -> None:
    largest = max(np.abs(a).max() for a in jax.tree.leaves(want))
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        a = np.asarray(a)
        b = np.asarray(b)
        error = np.abs(a - b).max() / max(np.abs(b).max(), 1e-3 * largest)
        assert error <= tolerance, (
            f"{jax.tree_util.keystr(path)}: {error} of the largest apart, allowed: {tolerance}"
        )


def check_equal_to_one_device(which: str, shape: str, count: str) -> None:
    module, config = {"gpt2": (gpt2, GPT2), "moe": (llama, MOE)}[which]
    alone, placed, params, on_mesh, batch, on_rows, mesh = build(module, config, shape, int(count))
    plain = lambda p, batch: losses.next_token(alone, p, batch)
    (value, metrics), grads = jax.jit(jax.value_and_grad(plain, has_aux=True))(params, batch)
    with jax.set_mesh(mesh):
        program = (
            jax.jit(one_forward_one_backward(placed, losses.next_token))
            .lower(on_mesh, on_rows)
            .compile()
        )
        (got_value, got_metrics), got = program(on_mesh, on_rows)
    assert abs(float(got_value) - float(value)) <= 1e-5 * float(value)
    assert set(got_metrics) == set(metrics)
    np.testing.assert_allclose(got_metrics["weight"], metrics["weight"])
    close(got, grads)
    if which == "gpt2":
        the_bytes(plan.moved(plan.collectives(program)), params, batch, mesh)


def the_bytes(
    found: dict[str, int], params: tree.Params, batch: dict, mesh: jax.sharding.Mesh
) -> None:
    stages = mesh.shape["pipeline"]
    groups = mesh.shape.get("data", 1)
    act = B * T * GPT2.width * 4 // groups
    outside = tree.nbytes({name: node for name, node in params.items() if name != "blocks"})
    layers = tree.nbytes(params["blocks"]) // stages
    assert found.pop("collective-permute") == 2 * act * (stages - 1) // stages
    assert found.pop("all-gather") == tree.nbytes(batch) // groups
    assert (
        0 <= found.pop("all-reduce") - 2 * outside - 2 * layers * (groups > 1) <= 64
    )  # and a few sums
    assert not found


def check_what_is_frozen_has_no_gradient() -> None:
    alone, placed, params, _, batch, on_rows, mesh = build(gpt2, GPT2, "pipeline=2,tensor=2")
    trains, frozen = tree.partition(
        params, [("blocks/.*/(q|up)", True), ("norm/.*", True), (".*", False)]
    )
    plain = lambda p: losses.next_token(alone, tree.combine(p, frozen), batch)[0]
    want = jax.jit(jax.grad(plain))(trains)
    with jax.set_mesh(mesh):
        got = jax.jit(one_forward_one_backward(placed, losses.next_token, frozen))(trains, on_rows)[
            1
        ]
    close(got, want)


def memory(count: int, rows: int, schedule) -> int:
    """Bytes of a step beside its arguments and results."""
    _, placed, _, on_mesh, _, on_rows, mesh = build(gpt2, GPT2, "pipeline=2", count, rows)
    with jax.set_mesh(mesh):
        return (
            jax.jit(schedule(placed))
            .lower(on_mesh, on_rows)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )


def check_memory_does_not_grow_with_the_micro_batches() -> None:
    """Four times as many rows in four times as many micro-batches:

    GPipe keeps more, this only the longer batch.
    """
    gpipe = lambda model: (
        lambda p, batch: jax.value_and_grad(
            lambda p: losses.next_token(model, p, batch), has_aux=True
        )(p)
    )
    ours = lambda model: one_forward_one_backward(model, losses.next_token)
    by_ours, by_gpipe = (
        memory(32, 128, schedule) - memory(8, 32, schedule) for schedule in (ours, gpipe)
    )
    assert (
        by_ours <= (128 - 32) * T * 4 * 4 * 2
    )  # the four arrays of the batch, and a copy in another order
    assert by_gpipe >= (128 - 32) * T * GPT2.width * 4  # the measure sees what it should


def check_what_it_keeps() -> None:
    """The buffer of activations has one place for each stage, however many micro-batches
    there are.
    """
    _, placed, _, on_mesh, _, on_rows, mesh = build(gpt2, GPT2, "pipeline=4", 16, 32)
    with jax.set_mesh(mesh):
        text = str(
            jax.make_jaxpr(one_forward_one_backward(placed, losses.next_token))(on_mesh, on_rows)
        )
    kept = {int(n) for n in re.findall(rf"f32\[(\d+),2,{T},{GPT2.width}\]", text)}
    assert max(kept) == 4, kept


def check_what_does_not_fit_is_refused() -> None:
    def refused(message: str, run) -> None:
        try:
            run()
        except InputError as error:
            assert re.search(message, str(error)), str(error)
        else:
            raise AssertionError(f"nothing raised; wanted: {message}")

    def shapes(shape: str, loss=losses.next_token):
        _, placed, params, _, batch, _, _ = build(gpt2, GPT2, "data=1")
        with jax.set_mesh(sharding.make_mesh(shape)):
            jax.eval_shape(one_forward_one_backward(placed, loss), params, batch)

    def twice(model, params, batch, rng=None, *, train=True):
        one, two = (
            model.apply(params, batch["tokens"], rng=rng, train=train).logits for _ in range(2)
        )
        return jnp.mean(one * two), {}

    refused(
        "this schedule needs an axis 'pipeline' of 2 or more; there are {'data': 2}",
        lambda: shapes("data=2"),
    )
    refused(
        "a ring over 'sequence' needs all stages at once", lambda: shapes("pipeline=2,sequence=2")
    )
    refused(
        "beside 'tensor', 'fsdp' ends in a failed assertion",
        lambda: shapes("pipeline=2,fsdp=2,tensor=2"),
    )
    costly = losses.regularized(losses.next_token, [(".*", "l2(0.1)")])
    refused("loss: it reads the parameters of all layers", lambda: shapes("pipeline=2", costly))
    refused("loss: it runs the model 2 times", lambda: shapes("pipeline=2", twice))
    refused(
        "does not run the model's layers",
        lambda: shapes("pipeline=2", lambda *args, **options: (jnp.zeros(()), {})),
    )


CHECKS = [
    *(
        "check_equal_to_one_device:gpt2:pipeline=4:8",
        "check_equal_to_one_device:gpt2:pipeline=2,data=2:4",
    ),
    "check_equal_to_one_device:moe:pipeline=2,expert=2:2",
    *(
        name
        for name in globals()
        if name.startswith("check_") and name != "check_equal_to_one_device"
    ),
]


@pytest.fixture(scope="module")
def outcome(outcomes8):
    return outcomes8(__file__, CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_pipeline(name, outcome):
    assert not outcome[name], outcome[name]
