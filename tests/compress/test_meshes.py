"""Compression on a mesh gives what it gives on one device: recipes, calibration, rotations.

The checks run in one process with eight simulated devices (see `outcomes8`).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxmodel import compress, sharding, tree
from jaxmodel.models import llama

MESHES = ("fsdp=2", "fsdp=4,tensor=2")


def built(**changes):
    model = llama.model(dataclasses.replace(llama.SIZES["tiny"], **changes))
    return model, jax.jit(model.init)(jax.random.key(0))


# the matrices that are cut alike have one shape, so that they share their programs
SQUARE = {"vocab": 128, "width": 128, "depth": 2, "kv_heads": 4, "head_width": 32, "mlp_width": 128}


def check_recipes_give_the_same_codes() -> None:
    model, params = built(**SQUARE)
    for name in ("int8-weight", "int4-rtn", "magnitude(0.5) | rtn(8)"):
        recipe = compress.get_recipe(name)
        want = tree.fingerprint(compress.apply(recipe, params, axes=model.axes)[0])
        for shape in MESHES:
            placed = sharding.place(model.rules, params, sharding.make_mesh(shape))
            again, _ = compress.apply(recipe, placed, axes=model.axes)
            assert tree.fingerprint(again) == want, (name, shape)


def check_statistics_are_sums_over_the_mesh() -> None:
    """In sequential calibration too."""
    model, params = built(depth=2)
    recipe = [("blocks/.*/mlp/(up|down)", "gptq(4)"), (".*", "")]
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, 256, (8, 16), np.int32) for _ in range(2)]
    run = lambda params, tokens: compress.calibrate(
        model, params, recipe, tokens, order="sequential", held_out=0.0
    )[1]
    alone = run(params, list(map(jax.numpy.asarray, tokens)))
    mesh = sharding.make_mesh(MESHES[1])
    with jax.set_mesh(mesh):
        spread = jax.NamedSharding(mesh, jax.P("fsdp"))
        placed = sharding.place(model.rules, params, mesh)
        together = run(placed, [jax.device_put(one, spread) for one in tokens])
    for one, two in zip(alone.leaves, together.leaves, strict=True):
        assert one["path"] == two["path"] and one.get("tokens") == two.get("tokens")
        assert abs(one.get("output_error", 0) - two.get("output_error", 0)) < 1e-3
    assert together.leaves[-1]["bits_per_weight"] > 0


def check_a_rotated_model_runs() -> None:
    model, params = built(depth=1)
    tokens = np.arange(64, dtype=np.int32).reshape(8, 8)
    want = jax.jit(model.apply)(params, tokens).logits
    mesh = sharding.make_mesh("tensor=2,fsdp=4")
    placed = sharding.place(model.rules, params, mesh)
    models = {}

    @functools.partial(jax.jit, static_argnums=0)
    def turned(rotate, params):
        models[rotate], turned = rotate.change(model, params, {}, jax.random.key(0))
        return turned

    one = compress.transforms.Rotate()  # its blocks are longer than what a device holds
    rotated = turned(one, placed)
    rotated = sharding.place(models[one].rules, rotated, mesh)
    got = jax.jit(models[one].apply)(rotated, tokens).logits
    np.testing.assert_allclose(got, want, atol=1e-5)


CHECKS = (
    check_recipes_give_the_same_codes,
    check_statistics_are_sums_over_the_mesh,
    check_a_rotated_model_runs,
)
NAMES = [check.__name__ for check in CHECKS]


@pytest.fixture(scope="module")
def outcome(outcomes8):
    return outcomes8(__file__, NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_on_eight_devices(name, outcome):
    assert not outcome[name], outcome[name]
