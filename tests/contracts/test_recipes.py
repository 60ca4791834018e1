"""Every named recipe makes every architecture smaller, and what comes out runs: no family needs
rules of its own, nor does somebody else's Flax module.
"""

from __future__ import annotations

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmodel import compress, hub, tree
from jaxmodel.axes import ROLES
from jaxmodel.errors import InputError
from jaxmodel.models import families, from_linen, from_nnx, sizes
from tests.contracts.conftest import FORMS, KINDS


def _inputs(model):
    """Inputs of the shapes that the model names."""
    made = {}
    for name, shape in model.inputs(2, 8).items():
        random = np.random.default_rng(len(name))
        whole = jnp.issubdtype(shape.dtype, jnp.integer)
        array = random.integers(1, 4, shape.shape) if whole else random.normal(size=shape.shape)
        made[name] = jnp.asarray(
            np.ones(shape.shape) if shape.dtype == bool else array, shape.dtype
        )
    return made


SPARSE = "magnitude(0.5) | rtn(8, activations='int8')"
NAMES = ("int8", "int8-weight", "int4-rtn", SPARSE, "rtn(bits=3)")


def test_named_recipes_are_one_rule_by_role():
    """So what one of them takes, the others take: below three speak for all."""
    for name in NAMES:
        ((pattern, chains),) = compress.get_recipe(name).rules
        assert pattern == ".*" and {role for role in ROLES if chains.of(role)} == {
            *("matrix", "experts", "table", "head"),
        }


def test_without_axes_nobody_guesses():
    with pytest.raises(InputError, match="axes: None given; a recipe by role needs"):
        compress.apply(compress.get_recipe("int4-rtn"), {"up": jnp.ones((8, 8))})


BY_LEAVES = ("gpt_oss/tiny", "llama/tiny-sparse", "resnet/tiny-group")
"""Kinds that between them have leaves of every number of axes, which is all that a method sees."""


def axes_of_leaves(params):
    """What a method may tell apart: the axes of a layer's leaf, and whether layers are stacked."""
    return {
        (len(tree.layer_shape(path, leaf)), len(tree.layer_paths(path)) > 1)
        for path, leaf in tree.flatten(params).items()
        if len(tree.layer_shape(path, leaf)) >= 2
    }


def test_some_kinds_have_leaves_of_every_number_of_axes():
    def of(names):
        return set().union(
            *(
                axes_of_leaves(jax.eval_shape(module.model(config).init, jax.random.key(0)))
                for module, config in map(sizes().__getitem__, names)
            )
        )

    assert of(BY_LEAVES) == of(KINDS)


def test_named_recipes_take_every_kind(kind):
    """All matrices but routers, and no vectors (of which experts have one each), which the rules
    decide: one recipe for each kind (the rules of all are the same, see above), and every chain for
    every number of axes of a leaf.

    What comes out is traced, and that of one recipe is run for each form of code; test_models.py
    runs each kind of leaf in every kind of model.
    """
    matrices = {
        p: leaf
        for p, leaf in tree.flatten(kind.params).items()
        if len(tree.layer_shape(p, leaf)) >= 2
    }
    logits = jax.eval_shape(kind.model.apply, kind.params, kind.inputs).logits
    others = ("int8", "int4-rtn", SPARSE) if kind.name in BY_LEAVES else ()
    for name in ("int8-weight", *others):
        recipe = compress.get_recipe(name)
        smaller, report = compress.apply(recipe, kind.params, axes=kind.model.axes)
        treated = {row["path"] for row in report.leaves if row["method"]}
        assert {layer for p in treated for layer in tree.layer_paths(p)} == {
            layer
            for p in matrices
            for layer in tree.layer_paths(p)
            if not layer.endswith(("router", "_bias"))
        }
        assert report.bytes_after < report.bytes_before
        assert all(
            np.isfinite(np.asarray(buffer).astype(np.float32)).all()
            for buffer in jax.tree.leaves(smaller)
        )
        assert (
            jax.eval_shape(recipe.adapt(kind.model).apply, smaller, kind.inputs).logits.shape
            == logits.shape
        )
        if name == "int8-weight":
            assert all(row["relative_error"] < 0.02 for row in report.leaves)
        if name == "int8-weight" and kind.name in FORMS:
            before = np.asarray(kind.apply(kind.params, kind.inputs))
            after = np.asarray(kind.apply(smaller, kind.inputs))
            assert np.sqrt(np.mean((after - before) ** 2)) < 0.2 * np.std(before)


class Linen(nn.Module):
    """Kernels of two axes and of four, an embedding's place taken by a convolution, norms, and
    statistics.
    """

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.BatchNorm(use_running_average=not train)(nn.Conv(64, (3, 3))(x))
        x = nn.Dense(32)(nn.relu(x).mean(axis=(1, 2)))
        return nn.Dense(5)(nn.LayerNorm()(x))


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.inner = nnx.Linear(6, 64, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(64, 64, rngs=rngs) for _ in range(2)])
        self.out = nnx.Linear(64, 5, rngs=rngs)

    def __call__(self, x):
        x = self.inner(self.norm(x).mean(axis=(1, 2)))
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.out(x)


FOREIGN = {
    "linen": lambda: from_linen(Linen(), jax.ShapeDtypeStruct((1, 8, 8, 6), jnp.float32)),
    "nnx": lambda: from_nnx(Nnx, jax.ShapeDtypeStruct((1, 8, 8, 6), jnp.float32)),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_named_recipes_take_modules_of_others(name, tmp_path):
    """They get smaller, run, are saved and read back, and are trained further where their weights
    are plain; what is measured and vectors stay.
    """
    model = FOREIGN[name]()
    params = jax.jit(model.init)(jax.random.key(0))
    inputs = _inputs(model)
    run = jax.jit(lambda model, params: model.apply(params, inputs).logits, static_argnums=0)
    before = np.asarray(run(model, params))
    kernels = {path for path, leaf in tree.flatten(params).items() if path.endswith("kernel")}
    for recipe in NAMES:
        bundle, report = compress.compress_bundle(
            hub.Bundle(model, params), compress.get_recipe(recipe)
        )
        treated = {
            layer
            for row in report.leaves
            if row["method"]
            for layer in tree.layer_paths(row["path"])
        }
        assert treated == {layer for path in kernels for layer in tree.layer_paths(path)}, recipe
        assert report.bytes_after < report.bytes_before
        after = np.asarray(run(bundle.model, bundle.params))
        assert np.all(np.isfinite(after))
        bundle.save_pretrained(tmp_path / recipe)
        again = hub.from_pretrained(tmp_path / recipe, module=model)
        chex.assert_trees_all_equal(again.params, bundle.params)
        assert again.model.policy == bundle.model.policy
        if recipe == "int8":  # the one whose numbers in between are not those of the model
            np.testing.assert_array_equal(run(again.model, again.params), after)
        if recipe == "int8-weight":
            assert np.sqrt(np.mean((after - before) ** 2)) < 0.2 * (np.std(before) + 1e-3)


def test_rules_in_front_are_exceptions():
    module = families()["gpt2"]
    model = module.model(module.SIZES["tiny"])
    params = jax.jit(model.init)(jax.random.key(0))
    recipe = compress.get_recipe("int4-rtn")
    mine = dataclasses.replace(
        recipe, rules=(("blocks/0/.*/up", "rtn(bits=8)"), ("embed", ""), *recipe.rules)
    )
    _, report = compress.apply(mine, params, axes=model.axes)
    rows = {row["path"]: row["method"] for row in report.leaves}
    assert (rows["blocks/0/mlp/up"], rows["blocks/1-2/mlp/up"], rows["embed"]) == (
        "rtn(bits=8)",
        "rtn(bits=4, group=64)",
        "",
    )
