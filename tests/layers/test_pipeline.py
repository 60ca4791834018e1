"""Layers in stages on eight devices: equal to layers in a row, with the bytes that the formula
says.

The checks run once, in one process with eight simulated devices (see `outcomes8`); the tests here
read how they went.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxmodel import layers, plan, sharding, tree
from jaxmodel.errors import InputError

L = 4
B = 16
T = 3
D = 8


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / 3, jnp.float32)


PARAMS = {"0-3": {"w": random(L, D, D), "b": random(L, D, seed=1)}}
X = random(B, T, D, seed=2)
CONTEXT = {
    "row": random(B, T, seed=3),
    "all": random(1, T, D, seed=4),
    "number": jnp.float32(0.5),
    "nothing": None,
}


def block(params, x, context, cache, layer, rng, train):
    """Reads what has rows, what has none, its own number and its key."""
    y = (
        jnp.tanh(jnp.einsum("btd,ed->bte", x, params["w"]) + params["b"][None, None])
        * context["row"][..., None]
    )
    y = y + context["number"] * context["all"] * (layer + 1)
    if rng is not None:
        y = y + jax.random.normal(rng, y.shape)
    return x + y, cache, {"size": jnp.mean(x**2), "layer": jnp.float32(layer)}


def score(params, x, context, rng=None, remat="none", microbatches=0):
    out, _, aux = layers.repeat(block, params, x, context, None, rng, True, remat, microbatches)
    return jnp.sum(jnp.sin(out)) + 3 * aux["size"], (out, aux)


def placed(mesh):
    rows = tuple(name for name in sharding.BATCH_AXES if name in mesh.shape)
    put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
    context = {**CONTEXT, "row": put(CONTEXT["row"], rows)}
    return jax.tree.map(lambda a: put(a, "pipeline"), PARAMS), put(X, rows), context


def close(got, want, tolerance: float = 2e-6) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(float(np.abs(b).max()), 1))


def gradients(**options):
    run = lambda params, x, context: score(params, x, context, **options)
    return jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True, allow_int=True))


def check_equal_to_layers_in_a_row() -> None:
    """Values, aux and the gradients of everything, also of what is shared by the micro-batches."""
    (value, (out, aux)), grads = gradients()(PARAMS, X, CONTEXT)
    assert float(aux["layer"]) == 0 + 1 + 2 + 3
    for shape, count, remat in (
        ("pipeline=4", 0, "none"),
        ("pipeline=2,data=2", 8, "full"),
        ("pipeline=4,tensor=2", 16, "none"),
    ):
        mesh = sharding.make_mesh(shape)
        with jax.set_mesh(mesh):
            run = gradients(remat=remat, microbatches=count)
            (got_value, (got_out, got_aux)), got = run(*placed(mesh))
        close((got_value, got_out, got_aux, got), (value, out, aux, grads))


def check_micro_batches_have_keys_of_their_own() -> None:
    """A row's noise is that of its micro-batch; equal for micro-batches would be wrong."""
    mesh = sharding.make_mesh("pipeline=2")
    with jax.set_mesh(mesh):
        params, x, context = placed(mesh)
        run = jax.jit(lambda *args, **options: score(*args, microbatches=4, **options)[1][0])
        args = jax.tree.map(jnp.zeros_like, params), x, context
        found = np.asarray(run(*args, rng=jax.random.key(0)) - run(*args))
    assert len(np.unique(np.round(found.reshape(B, -1)[:, 0], 4))) == B
    assert np.abs(found.std() - np.sqrt(L)) < 0.2


def check_bytes() -> None:
    for shape, count in (("pipeline=4", 8), ("pipeline=4", 4), ("pipeline=2,data=2", 4)):
        mesh = sharding.make_mesh(shape)
        stages = mesh.shape["pipeline"]
        groups = mesh.shape.get("data", 1)
        act = B * T * D * 4 // groups
        rows = B * T * 4 // groups
        with jax.set_mesh(mesh):
            params, x, context = placed(mesh)
            run = lambda params, x, context=context, count=count: score(
                params, x, context, microbatches=count
            )[0]
            program = jax.jit(jax.grad(run, argnums=(0, 1))).lower(params, x).compile()
        found = plan.moved(plan.collectives(program))
        assert found.pop("collective-permute") == 2 * act * (stages - 1) // stages
        assert found.pop("all-gather") == 2 * act + rows
        assert found.pop("reduce-scatter") == 2 * act
        gradients = 2 * (L * (D * D + D) * 4 // stages) * (groups > 1)  # over data, once
        assert 0 <= found.pop("all-reduce") - gradients <= 64 and not found  # and aux


def check_what_does_not_divide_is_refused() -> None:
    def refused(message: str, shape: str, params=PARAMS, x=X, context=CONTEXT, **options) -> None:
        with jax.set_mesh(sharding.make_mesh(shape)):
            try:
                jax.eval_shape(lambda *args: score(*args, **options), params, x, context)
            except InputError as error:
                assert re.search(message, str(error)), str(error)
            else:
                raise AssertionError(f"nothing raised; wanted: {message}")

    refused("pipeline = 3 does not divide the 4 layers", "pipeline=3")
    refused(
        "microbatches: 6 given for 16 rows in 2 stages; allowed: 2, 4, 8, 16",
        "pipeline=2",
        microbatches=6,
    )
    refused(
        "microbatches: 2 given for 16 rows in 4 stages; allowed: 4, 8, 16",
        "pipeline=4",
        microbatches=2,
    )
    refused(
        "8 given for 16 rows in 2 stages and 4 places along 'data'; allowed: 2, 4",
        "pipeline=2,data=4",
        microbatches=8,
    )
    small = {**CONTEXT, "row": CONTEXT["row"][:3]}
    few = "microbatches: 2 given for 3 rows in 2 stages; no number is possible; give a multiple"
    refused(few, "pipeline=2", x=X[:3], context=small)
    apart = tree.unstack({"blocks": PARAMS})["blocks"]
    refused(
        "pipeline stages need one segment of identical layers; there are 0, 1, 2, 3",
        "pipeline=2",
        params=apart,
    )


def check_places() -> None:
    """Rules place the layers of a segment on the stages; a number that does not divide is
    refused.
    """
    params = {"blocks": PARAMS}
    rules = [(".*/w", P("tensor", None)), (".*", P())]
    on = sharding.place(rules, params, sharding.make_mesh("pipeline=4,tensor=2"))["blocks"]["0-3"]
    assert on["w"].sharding.shard_shape(on["w"].shape) == (1, D // 2, D)
    assert on["b"].sharding.shard_shape(on["b"].shape) == (1, D)
    layers_of = "the 4 layers of the leaf 'blocks/0-3/w' into stages; allowed: 1, 2, 4"
    for shape, leaf, message in (
        ("pipeline=3", params, f"pipeline = 3 does not divide {layers_of}"),
        ("pipeline=2", {"w": X}, "the axis 'pipeline' would hold 2 copies"),
    ):
        try:
            sharding.place([(".*", P())], leaf, sharding.make_mesh(shape))
        except InputError as error:
            assert message in str(error), str(error)
        else:
            raise AssertionError(f"nothing raised; wanted: {message}")


CHECKS = [name for name in globals() if name.startswith("check_")]


@pytest.fixture(scope="module")
def outcome(outcomes8):
    return outcomes8(__file__, CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_pipeline(name, outcome):
    assert not outcome[name], outcome[name]
