"""`apply` and `observe`: recipes by rules over whole models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import compress, tree
from jaxmodel.errors import InputError
from jaxmodel.leaves import Compressed, decode
from jaxmodel.models import gpt2, llama

MODELS = {"llama": llama.model(llama.SIZES["tiny"]), "gpt2": gpt2.model(gpt2.SIZES["tiny"])}
APPLY = {name: jax.jit(model.apply) for name, model in MODELS.items()}
TOKENS = jax.random.randint(jax.random.key(1), (2, 16), 0, 256)


@pytest.fixture(scope="module")
def params():
    return {name: jax.jit(model.init)(jax.random.key(0)) for name, model in MODELS.items()}


SPARSE = "magnitude(0.5) | rtn(8, activations='int8')"
LIMITS = {"int8": 0.05, "int8-weight": 0.03, "int4-rtn": 0.3, SPARSE: 1.0}


# contracts/test_recipes.py takes them to every family
@pytest.mark.parametrize(
    ("family", "recipe"), [*(("llama", name) for name in LIMITS), ("gpt2", "int4-rtn")]
)
def test_named_recipes(family, recipe, params):
    small, report = compress.apply(
        compress.get_recipe(recipe), params[family], axes=MODELS[family].axes
    )
    assert list(tree.flatten(small)) == list(tree.flatten(params[family]))  # same paths
    assert report.bytes_before == tree.nbytes(params[family]) and report.bytes_after == tree.nbytes(
        small
    )
    assert sum(row["bytes_after"] for row in report.leaves) == report.bytes_after
    assert report.bits_per_weight == pytest.approx(8 * tree.nbytes(small) / tree.count(small))
    for row in report.leaves:
        leaf = tree.flatten(small)[row["path"]]
        assert bool(row["method"]) == isinstance(leaf, Compressed) == (row["relative_error"] > 0)
        assert row["bits_per_weight"] == pytest.approx(8 * tree.nbytes(leaf) / np.prod(leaf.shape))
    exact, near = (np.asarray(APPLY[family](p, TOKENS).logits) for p in (params[family], small))
    assert 0 < float(np.std(near - exact) / np.std(exact)) < LIMITS[recipe]


def test_layers_may_differ(params):
    rules = (
        ("blocks/0/.*/(q|k|v|o|gate|up|down)", compress.parse("rtn(bits=4, group=8)")),
        ("blocks/1/.*/(gate|up|down)", compress.parse("magnitude(pattern=(2, 4)) | rtn(bits=8)")),
        (".*", ()),
    )
    small, report = compress.apply(rules, params["llama"])
    assert list(small["blocks"]) == ["0", "1", "2"]
    assert len(report.leaves) == len(tree.flatten(small))
    decoded = jax.jit(lambda p: tree.map_leaves(lambda _, leaf: decode(leaf), p))(small)
    same = APPLY["llama"](decoded, TOKENS).logits
    np.testing.assert_allclose(APPLY["llama"](small, TOKENS).logits, same, atol=1e-4)


def test_a_recipe_of_the_wrong_rules_is_refused(params):
    with pytest.raises(InputError, match="'blocks/.*/wq' matches no leaf"):
        compress.apply((("blocks/.*/wq", compress.parse("rtn()")), (".*", ())), params["llama"])
    with pytest.raises(InputError, match="no rule covers the leaf"):
        compress.apply((("blocks/.*/(q|k|v)", compress.parse("rtn()")),), params["llama"])


@pytest.mark.parametrize("recipe", [None, "int8"])
def test_observe_equals_hand_computed_statistics(recipe, params):
    """The inputs of the first layer's q and of the head can be computed without probes."""
    model = MODELS["llama"]
    tree_ = params["llama"]
    if recipe:
        tree_ = compress.apply(compress.RECIPES[recipe], tree_, axes=model.axes)[0]
    stats = compress.observe(
        model, tree_, [TOKENS, TOKENS[:, ::-1]], statistics=("gram", "square", "histogram")
    )
    grams = []
    for tokens in (TOKENS, TOKENS[:, ::-1]):
        x, _ = model.parts.embed(tree_, {"tokens": tokens})
        weight = tree.flatten(tree.unstack(tree_))["blocks/0/attn_norm/weight"]
        x = np.asarray(x, np.float64)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + model.config.norm_eps) * np.asarray(weight)
        grams.append(np.einsum("bti,btj->ij", x, x))
    for name in "qkv":
        found = stats[f"blocks/0-2/attn/{name}"]
        np.testing.assert_allclose(found["gram"][0], sum(grams), rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(found["square"][0], np.diag(sum(grams)), rtol=1e-4, atol=1e-3)
    assert all(np.all(found["count"] == 64) for path, found in stats.items() if path != "embed")
    assert float(stats["embed"]["taken"]) == 64 and float(stats["embed"]["count"]) == 0
    assert all(
        np.all(found["histogram"].sum(-1) == found["count"] * found["square"].shape[-1])
        for found in stats.values()
    )


def test_observe_some_paths(params):
    stats = compress.observe(MODELS["gpt2"], params["gpt2"], [TOKENS], paths="blocks/1/mlp/.*")
    assert list(stats) == ["blocks/1/mlp/down", "blocks/1/mlp/up"]
    assert stats["blocks/1/mlp/up"]["square"].shape == (32,)


def test_observe_says_what_is_wrong(params):
    with pytest.raises(InputError, match="paths: 'nothing' matches no matrix"):
        compress.observe(MODELS["gpt2"], params["gpt2"], [TOKENS], paths="nothing")
    with pytest.raises(InputError, match="batches: none given; allowed: at least one"):
        compress.observe(MODELS["gpt2"], params["gpt2"], [])
    with pytest.raises(InputError, match="statistics: 'grm' is not known"):
        compress.observe(MODELS["gpt2"], params["gpt2"], [TOKENS], statistics=("grm",))


def test_a_vector_takes_no_method():
    """Stacked over layers it looks like a matrix, and its layers would share scales."""
    params = {"blocks": {"0-1": {"norm": jnp.ones((2, 8)), "up": jnp.ones((2, 4, 8))}}}
    with pytest.raises(
        InputError,
        match=r"'rtn\(bits=8\)' given for 'blocks/0-1/norm' of shape \[8\]; allowed: matrices",
    ):
        compress.apply([(".*", (compress.Rtn(8),))], params)
    compress.apply([(".*up", (compress.Rtn(8),)), (".*", ())], params)
