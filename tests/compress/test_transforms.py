"""Transforms: the factors are those of the papers, by NumPy; what is rotated is saved and
generates; recipes with transforms are read, written and told apart.
"""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import compress, hub, leaves, tree
from jaxmodel.compress import Recipe, get_recipe
from jaxmodel.compress.recipe_file import from_record, to_record
from jaxmodel.errors import InputError
from jaxmodel.models import llama

MODEL = llama.model(dataclasses.replace(llama.SIZES["tiny"], depth=1, tied=True))
TOKENS = jax.random.randint(jax.random.key(1), (4, 16), 0, 256)
NORM = "blocks/0/mlp_norm/weight"
READERS = [f"blocks/0/mlp/{name}" for name in ("gate", "up")]


@functools.cache
def params():
    def new(key):
        shift = lambda a: a + 0.2 * jax.random.normal(jax.random.key(3), a.shape)
        return jax.tree.map(shift, MODEL.init(key))

    return jax.jit(new)(jax.random.key(0))


@functools.cache
def stats():
    """Return the statistics of the inputs of all matrices."""
    return compress.observe(MODEL, params(), [TOKENS], "blocks/.*", ["square", "gram"])


def flat(params):
    return {path: np.asarray(leaf) for path, leaf in tree.flatten(tree.unstack(params)).items()}


def test_smooth_takes_the_factors_of_the_paper():
    before = flat(params())
    _, after = compress.transforms.Smooth(0.25).change(MODEL, params(), stats(), jax.random.key(0))
    after = flat(after)
    seen = stats()["blocks/0/mlp/up"]
    size = np.sqrt(np.asarray(seen["square"]) / seen["count"])
    weight = np.max([np.abs(before[path]).max(0) for path in READERS], axis=0)
    want = size**0.25 / weight**0.75
    np.testing.assert_allclose(before[NORM] / after[NORM], want, rtol=1e-4)
    gate, up = READERS
    np.testing.assert_allclose(after[gate], before[gate] * want[None], rtol=1e-4)
    # the rows of `up` have another factor, which is in the columns of `down`
    rows = after[up] / (before[up] * want[None])
    columns = after["blocks/0/mlp/down"] / before["blocks/0/mlp/down"]
    np.testing.assert_allclose(rows * columns[:1].T, np.ones_like(rows), rtol=1e-3)


def test_awq_takes_the_alpha_with_the_smallest_error():
    points = 6
    before = flat(params())
    awq = compress.transforms.Awq(3, points=points)
    after = flat(awq.change(MODEL, params(), stats(), jax.random.key(0))[1])
    gram = np.asarray(stats()["blocks/0/mlp/up"]["gram"], np.float64)
    size = np.sqrt(np.diagonal(gram))

    def factor(alpha):
        found = size**alpha
        return found / np.sqrt(found.max() * found.min())

    def error(alpha):
        total = 0
        for path in READERS:
            scaled = before[path] * factor(alpha)
            step = np.abs(scaled).max(1, keepdims=True) / 3
            off = (np.round(scaled / step) * step - scaled) / factor(alpha)
            total += np.sum(off @ gram * off)
        return total

    best = min(np.arange(points) / points, key=error)
    assert error(best) < 0.97 * error(0)
    np.testing.assert_allclose(before[NORM] / after[NORM], factor(best), rtol=1e-4)


def test_scales_without_a_norm_in_front_are_online():
    plain = {"square": stats()["blocks/0/attn/q"]["square"], "count": jnp.float32(64)}
    other = dataclasses.replace(MODEL, axes=dataclasses.replace(MODEL.axes, feeds=()))
    smooth = compress.transforms.Smooth(online=True)
    paths = smooth.inputs(other, params())
    assert "blocks/0/attn/q" in paths and "blocks/0/mlp/down" in paths and "embed" not in paths
    assert len(paths) == 7
    seen = {path: stats()[path] for path in paths} | {"blocks/0/attn/q": plain}
    _, after = smooth.change(other, params(), seen, jax.random.key(0))
    before, after = tree.flatten(params()), tree.flatten(after)
    for path in paths:
        assert isinstance(after[path], leaves.Turned)
        np.testing.assert_allclose(after[path].decode(), before[path], rtol=1e-5)
    with pytest.raises(InputError, match=r"smooth: the model's axes name no plain leaves"):
        compress.transforms.Smooth().inputs(other, params())


@pytest.fixture(scope="module")
def rotated():
    """A bundle whose stream, heads and feed-forward units are rotated, in 8 bits."""
    bundle = hub.Bundle(MODEL, params(), None, {"name": "tiny"})
    return compress.compress_bundle(bundle, get_recipe("rotate() ; rtn(8)"))[0]


def test_a_rotated_bundle_is_saved_and_runs(rotated, tmp_path):
    assert not rotated.model.config.tied and "head" in rotated.params
    down = rotated.params["blocks"]["0"]["mlp"]["down"]
    assert isinstance(down, leaves.Turned) and down.hadamard == 64
    run = jax.jit(rotated.model.apply)
    got = run(rotated.params, TOKENS).logits
    want = MODEL.apply(params(), TOKENS).logits
    assert jnp.abs(got - want).max() < 0.05 * jnp.abs(want).max()
    rotated.save_pretrained(tmp_path / "rotated")
    again = hub.from_pretrained(tmp_path / "rotated")
    chex.assert_trees_all_equal(again.params, rotated.params)
    assert again.model is rotated.model
    assert compress.read_recipe(tmp_path / "rotated") == get_recipe("rotate() ; rtn(8)")
    first = run(rotated.params, TOKENS[:, :8], rotated.model.init_cache(4, 16))
    then = run(rotated.params, TOKENS[:, 8:], first.cache).logits
    np.testing.assert_allclose(then, got[:, 8:], atol=1e-4)


def test_recipes_with_transforms_have_a_text_and_a_record():
    recipe = get_recipe("rotate(online=False) ; smooth(0.5) ; int8")
    assert [str(one) for one in recipe.transforms] == [
        "rotate(stream=True, online=False)",
        "smooth(alpha=0.5)",
    ]
    assert recipe.rules == get_recipe("int8").rules and recipe.compute == "bfloat16"
    record = to_record(recipe)
    assert record["transforms"] == "rotate(stream=True, online=False) ; smooth(alpha=0.5)"
    assert from_record(record) == recipe
    assert Recipe([(".*", ())], transforms="rotate()").transforms == (compress.transforms.Rotate(),)


def test_equal_recipes_have_equal_fingerprints():
    one = get_recipe("smooth() ; rtn(4)").fingerprint
    assert get_recipe("smooth( alpha=0.5 );rtn(bits=4)").fingerprint == one
    others = ["rtn(4)", "smooth(0.4) ; rtn(4)", "smooth() ; rtn(5)", "smooth() ; smooth() ; rtn(4)"]
    assert len({get_recipe(text).fingerprint for text in others} | {one}) == 5
    chain = get_recipe("rtn(4)").rules
    rules = [Recipe([(p, ()), *chain]) for p in ("head", tree.optional("head"))]
    assert rules[0].fingerprint != rules[1].fingerprint


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rotat() ; int8", r"transform: .*rotat.*nearest: rotate"),
        ("rotate(strem=False) ;", r"rotate takes the settings .*nearest: stream"),
        (
            "rotate(block=7) ;",
            r"rotate: block is 7; allowed: a size of a Hadamard matrix, such as 1",
        ),
        ("rotate(stream=False, heads=False, online=False) ;", "rotate: stream is False; allowed"),
        ("smooth(2) ;", "smooth: alpha is 2"),
        ("smooth(0.5) ; int8", r"batches: none given; the recipe needs square .* has no tokenizer"),
        ("rotate() ; rotate() ;", "'blocks/0/mlp/down' is a Turned already"),
    ],
)
def test_wrong_transforms_are_refused(text, said):
    bundle = hub.Bundle(MODEL, params(), None, {"name": "tiny"})
    with pytest.raises(InputError, match=said):
        compress.compress_bundle(bundle, get_recipe(text))


def test_apply_alone_has_no_model_to_transform():
    with pytest.raises(InputError, match=r"recipe: it has transforms, rotate\(stream=True\)"):
        compress.apply(get_recipe("rotate() ; int8"), params(), axes=MODEL.axes)
