"""Every named recipe makes every architecture smaller, and what comes out runs: no family needs rules of its own."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import compress, tree
from jaxmodel.models import families
from jaxmodel.ops import Policy


def _inputs(model):
    """Inputs of the shapes that the model names."""
    made = {}
    for name, shape in model.inputs(2, 8).items():
        random = np.random.default_rng(len(name))
        whole = jnp.issubdtype(shape.dtype, jnp.integer)
        array = random.integers(1, 4, shape.shape) if whole else random.normal(size=shape.shape)
        made[name] = jnp.asarray(np.ones(shape.shape) if shape.dtype == bool else array, shape.dtype)
    return made


@pytest.mark.parametrize("family", families())
def test_named_recipes_take_every_family(family):
    module = families()[family]
    model = module.model(module.SIZES["tiny"], Policy())
    params = jax.jit(model.init)(jax.random.key(0))
    matrices = {p: leaf for p, leaf in tree.flatten(params).items() if len(tree.layer_shape(p, leaf)) >= 2}
    before = jax.jit(model.apply)(params, _inputs(model)).logits
    for name in ("int8", "int8-weight", "int4", "sparse50-int8", "rtn(bits=3)"):
        recipe = compress.named(name)
        smaller, report = compress.apply(recipe, params)
        treated = {row["path"] for row in report.leaves if row["method"]}
        assert {layer for p in treated for layer in tree.layer_paths(p)} == {
            layer for p in matrices for layer in tree.layer_paths(p) if not layer.endswith("router")
        }
        after = jax.jit(recipe.adapt(model).apply)(smaller, _inputs(model)).logits
        assert after.shape == before.shape and bool(jnp.all(jnp.isfinite(after)))
        if name == "int8-weight":
            spread = float(jnp.std(before)) + 1e-3
            assert float(jnp.sqrt(jnp.mean((after - before) ** 2))) < 0.2 * spread


def test_rules_in_front_are_exceptions():
    module = families()["gpt2"]
    params = module.model(module.SIZES["tiny"]).init(jax.random.key(0))
    recipe = compress.named("int4")
    mine = dataclasses.replace(recipe, rules=(("blocks/0/.*/up", "rtn(bits=8)"), ("embed", ""), *recipe.rules))
    rows = {row["path"]: row["method"] for row in compress.apply(mine, params)[1].leaves}
    assert (rows["blocks/0/mlp/up"], rows["blocks/1-2/mlp/up"], rows["embed"]) == ("rtn(bits=8)", "rtn(bits=4, group=64)", "")
