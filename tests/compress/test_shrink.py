"""Removal of units: those with the smallest score by NumPy go, in all leaves, and the result is a
model of that shape, saved and loaded.
"""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import compress, hub, tree
from jaxmodel.errors import InputError
from jaxmodel.models import gpt2, llama

TOKENS = jax.random.randint(jax.random.key(1), (4, 16), 0, 256)
SMALL = dataclasses.replace(llama.SIZES["tiny"], depth=2)
MODELS = {
    "llama": llama.model(SMALL),
    "tied": llama.model(dataclasses.replace(SMALL, tied=True)),
    "moe": llama.model(dataclasses.replace(llama.SIZES["tiny-moe"], depth=1)),
}


@functools.cache
def params(name):
    def new(key):
        shift = lambda a: a + 0.2 * jax.random.normal(jax.random.key(3), a.shape)
        return jax.tree.map(shift, MODELS[name].init(key))

    return jax.jit(new)(jax.random.key(0))


def shrunk(name, text, batches=None):
    bundle = hub.Bundle(MODELS[name], params(name), None, {"name": name})
    return compress.compress_bundle(bundle, compress.get_recipe(f"{text} ;"), batches=batches)[0]


def test_the_units_with_the_smallest_weights_go():
    bundle = shrunk("llama", "shrink(0.25)")
    assert bundle.model.config == dataclasses.replace(SMALL, mlp_width=16)
    before, after = (tree.flatten(tree.unstack(p)) for p in (params("llama"), bundle.params))
    for layer in ("blocks/0/mlp", "blocks/1/mlp"):
        gate, up, down = (np.asarray(before[f"{layer}/{name}"]) for name in ("gate", "up", "down"))
        sums = [np.sum(gate**2, 1), np.sum(up**2, 1), np.sum(down**2, 0)]
        score = sum(one / one.mean() for one in sums)
        stay = np.sort(np.argsort(-score)[:16])
        np.testing.assert_array_equal(after[f"{layer}/gate"], gate[stay])
        np.testing.assert_array_equal(after[f"{layer}/down"], down[:, stay])


def test_heads_go_with_their_queries_and_the_config_says_so(tmp_path):
    bundle = shrunk("llama", "shrink(0.5, units='K')")
    assert bundle.model.config == dataclasses.replace(SMALL, heads=2, kv_heads=1)
    bundle.save_pretrained(tmp_path / "one")
    again = hub.from_pretrained(tmp_path / "one")
    chex.assert_trees_all_equal(again.params, bundle.params)
    assert again.model is bundle.model


def test_the_units_that_do_least_may_be_in_one_layer(tmp_path):
    """Of the second layer 48 of 64 units are quiet."""
    quiet = np.where(np.arange(64) < 16, 1, 0.1).astype(np.float32)
    loud = np.ones(64, np.float32)
    rows = np.stack([loud, quiet])[:, :, None]

    def change(path, leaf):
        if path.endswith("down"):
            return jnp.asarray(leaf * rows.transpose(0, 2, 1))
        return jnp.asarray(leaf * rows if "mlp/" in path else leaf)

    quiet = tree.map_leaves(change, jax.device_get(params("llama")))
    bundle = hub.Bundle(MODELS["llama"], quiet, None, {"name": "quiet"})
    recipe = compress.get_recipe("shrink(0.5, score='activity', scope='model', multiple=8) ;")
    smaller = compress.compress_bundle(bundle, recipe, batches=[TOKENS])[0]
    widths = {
        path: leaf.shape[-1]
        for path, leaf in tree.flatten(tree.unstack(smaller.params)).items()
        if path.endswith("down")
    }
    assert smaller.model is MODELS["llama"]
    assert list(widths.values()) == [48, 16]
    smaller.save_pretrained(tmp_path / "two")
    chex.assert_trees_all_equal(hub.from_pretrained(tmp_path / "two").params, smaller.params)


def test_an_expert_that_no_token_reached_is_not_missed():
    model = MODELS["moe"]
    token = jnp.asarray(np.asarray(TOKENS)[:1, :1])
    run = jax.jit(lambda params: model.apply(params, token).logits)
    leaves = jax.device_get(tree.flatten(params("moe")))
    down = "blocks/0/moe/down"
    want = np.asarray(run(params("moe")))
    others = np.arange(4)[:, None, None]
    without = [{**leaves, down: np.where(others == i, 0, leaves[down])} for i in range(4)]
    reached = [np.any(np.asarray(run(tree.unflatten(one))) != want) for one in without]
    assert sum(reached) == 2
    shrink = compress.transforms.Shrink(0.5, units="E", score="activity")
    stats = shrink.measure(model, params("moe"), [token])
    smaller, kept = shrink.change(model, params("moe"), stats, jax.random.key(0))
    assert smaller.config.experts == 2
    got = jax.jit(smaller.apply)(kept, token).logits
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_stream_that_uses_fewer_units_is_sliced_without_loss():
    first = (np.arange(32) < 24).astype(np.float32)

    def few(path, leaf):
        if path == "embed":
            leaf = leaf * first[None]
        return jnp.asarray(leaf * first[None, :, None] if path.endswith(("/o", "/down")) else leaf)

    used = tree.map_leaves(few, jax.device_get(params("tied")))
    want = np.asarray(jax.jit(MODELS["tied"].apply)(used, TOKENS).logits)
    hide = compress.transforms.Rotate(heads=False, online=False, matrix="random")
    model, hidden = hide.change(MODELS["tied"], used, {}, jax.random.key(5))
    assert np.abs(hidden["embed"]).min() > 0
    bundle = hub.Bundle(model, hidden, None, {"name": "hidden"})
    recipe = compress.get_recipe("slice(0.75) ;")
    small = compress.compress_bundle(bundle, recipe, batches=[TOKENS])[0]
    assert small.model.config.width == 24 and small.params["embed"].shape == (256, 24)
    got = jax.jit(small.model.apply)(small.params, TOKENS).logits
    np.testing.assert_allclose(got, want, atol=1e-3 * np.abs(want).max())


def test_the_layer_with_the_smallest_weights_goes(tmp_path):
    small = tree.map_leaves(
        lambda path, leaf: leaf.at[0].multiply(0.5) if path.endswith("/o") else leaf,
        params("llama"),
    )
    bundle = hub.Bundle(MODELS["llama"], small, None, {"name": "small"})
    recipe = compress.get_recipe("drop_layers(0.5, score='magnitude') ;")
    shorter = compress.compress_bundle(bundle, recipe)[0]
    assert shorter.model.config == dataclasses.replace(SMALL, depth=1)
    layer = jax.tree.map(lambda leaf: leaf[1], small["blocks"]["0-1"])
    chex.assert_trees_all_equal(shorter.params, {**small, "blocks": {"0": layer}})
    shorter.save_pretrained(tmp_path / "one")
    again = hub.from_pretrained(tmp_path / "one")
    chex.assert_trees_all_equal(again.params, shorter.params)
    assert again.model is shorter.model
    with pytest.raises(InputError, match="batches: none given; the recipe needs change"):
        compress.compress_bundle(bundle, compress.get_recipe("drop_layers() ;"))


def test_what_a_family_does_not_have_is_named():
    with pytest.raises(InputError, match=r"shrink: letters: 'C' given; .*F, G, K"):
        shrunk("llama", "shrink(0.5, units='C')")
    with pytest.raises(InputError, match=r"shrink: keep is 0"):
        shrunk("llama", "shrink(0)")
    other = gpt2.model(gpt2.SIZES["tiny"])
    with pytest.raises(InputError, match="slice: the norms of this model subtract the mean"):
        compress.transforms.Slice().change(other, {}, {}, jax.random.key(0))
