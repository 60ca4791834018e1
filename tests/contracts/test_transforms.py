"""The laws of transforms: a factor that moves as `Axes.feeds` says, and a rotation, change nothing
that is computed; a family that does not allow it says why.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import axes, compress, tree
from jaxmodel.compress.transforms import drop_layers
from jaxmodel.compress.transforms.moves import move, survey
from jaxmodel.errors import InputError
from tests.contracts.conftest import CACHED, KINDS

NO_FEEDS = {
    "autoencoder": "an activation is behind each map",
    "cnn": "an activation is behind each convolution",
    "connected": "its edges are patterns that letters do not say",
    "densenet": "all later layers read a layer",
    "lenet": "an activation is behind each convolution",
    "mlp": "an activation is behind each map",
    "resnet": "an activation is behind each norm",
    "rnn": "its maps feed gates",
}
"""Families in which no factor moves, and why."""

SCALES = "scales each unit of D"
ORDER = "the order of D is fixed"
NO_STREAM = "its axes name no residual stream"
NO_ROTATION = {
    **dict.fromkeys(("autoencoder", "cnn", "connected", "densenet", "lenet"), NO_STREAM),
    **dict.fromkeys(("mlp", "resnet"), NO_STREAM),
    "bert": f"'blocks/0/attn_norm/weight' {SCALES}",
    "bert/tiny-embed": ORDER,
    "clip/tiny": f"'image/embed_norm/weight' {SCALES}",
    "llama/tiny-gemma": f"'blocks/0/attn_post_norm/weight' {SCALES}",
    "llama/tiny-olmo": f"'blocks/0/attn_post_norm/weight' {SCALES}",
    "modernbert": f"'embed_norm/weight' {SCALES}",
    "modernbert/tiny-embed": ORDER,
    "parallel": f"'norm/weight' {SCALES}",
    "transformer": ORDER,
    "vit/tiny-attention": ORDER,
    "vit/tiny-dino": f"'blocks/0/attn_scale' {SCALES}",
    "vit/tiny-mean": f"'embed_norm/weight' {SCALES}",
}
"""Members, or families, whose residual stream cannot be rotated, and what they say."""


UNITS = "FKHEC"
"""The letters of units that `shrink` removes."""

ALL_NEEDED = {
    "llama/tiny-olmo": ("GK", "one norm is over all heads"),
    "modernbert/tiny-classify": ("F", "the head normalises them"),
    "rnn": ("C", "the states of all layers are one array"),
}
"""Members, or families, of which no unit of some letters may go, and why."""

NO_UNITS = ("connected/tiny",)
"""Members without such units: its edges are patterns that letters do not say."""

OWN = "leaves or units of its own"
NO_STACK = "no stack of layers"
NO_LAYERS = {
    **dict.fromkeys(("autoencoder", "cnn", "clip", "lenet"), NO_STACK),
    **dict.fromkeys(("densenet", "mlp", "resnet"), "names no number of layers"),
    "connected": OWN,
    "rnn": OWN,
}
"""Members, or families, of which no layer may go, and what they say."""

DROPPED = ("llama/tiny-olmo", "llama/tiny-sparse", "modernbert/tiny", "t5/tiny", "vit/tiny")
"""Members of which layers go: with windows and rotations that differ by layer, with layers of two
kinds, a decoder, and an encoder of images.
"""


def off(got, want):
    return np.abs(np.asarray(got) - np.asarray(want)).max() / max(1, np.abs(want).max())


def test_factors_and_rotations_change_nothing(case):
    """Of rotations one of each family and of each kind of layer; the others refuse as it says."""
    known = survey(case.model.axes, case.params)
    family = case.name.split("/")[0]
    why = NO_ROTATION.get(case.name, NO_ROTATION.get(family, ""))
    rng = np.random.default_rng(1)
    factors = [np.exp2(rng.normal(size=f.shape)).astype(np.float32) for f in known.feeds]
    models = {}

    @jax.jit
    def changed(params, factors):
        leaves = tree.flatten(tree.unstack(params))
        for feed, factor in zip(known.feeds, factors, strict=True):
            move(known, leaves, feed, factor)
        models["moved"], moved = case.model, tree.stack(tree.unflatten(leaves))
        if why or case.name not in KINDS:
            return {"moved": moved}
        rotate = compress.transforms.Rotate(online=False)
        models["rotated"], rotated = rotate.change(case.model, params, {}, jax.random.key(1))
        return {"moved": moved, "rotated": rotated}

    assert bool(known.feeds) != (family in NO_FEEDS)
    if why:
        with pytest.raises(InputError, match=why) as refused:
            compress.transforms.Rotate().change(case.model, case.params, {}, jax.random.key(0))
        assert str(refused.value).endswith("; give stream=False")
    if why and not known.feeds:
        return
    want = case.apply(case.params, case.inputs)
    for name, params in changed(case.params, factors).items():
        assert off(case.run(models[name], params, case.inputs)[0], want) < 1e-4, name
    before = tree.flatten(case.apart)
    now = jax.device_get(tree.flatten(tree.unstack(changed(case.params, factors)["moved"])))
    other = {p for p, leaf in now.items() if np.abs(leaf - np.asarray(before[p])).max() > 1e-4}
    assert other == {p for f in known.feeds for p in (*f.sources, *f.readers)}


def test_a_model_says_which_units_it_needs_all_of(case):
    known = axes.groups(case.model.axes, case.params).values()
    kept = {group.letter for group in known if group.fixed and not group.ordered}
    name = case.name if case.name in ALL_NEEDED else case.name.split("/")[0]
    letters, _ = ALL_NEEDED.get(name, ("", ""))
    assert {letter[0] for letter in kept} == set(letters)
    for letter in UNITS:
        shrink = compress.transforms.Shrink(units=letter, score="activity")
        own = [group for group in known if group.letter[0] == letter]
        if any(not group.fixed for group in own):
            assert shrink.inputs(case.model, case.params)
            continue
        why = f"'{letter}' given{', of which this model needs all units' * bool(own)}; allowed"
        with pytest.raises(InputError, match=why):
            shrink.inputs(case.model, case.params)


def test_a_shrunk_model_is_the_masked_one(chosen):
    """Units of the sets that go are zero in all leaves, or gone from all leaves."""
    known = axes.groups(chosen.model.axes, chosen.params)
    units = {
        name: np.sort((np.arange(-(-group.size * 2 // 3)) + i) % group.size)
        for i, (name, group) in enumerate(known.items())
        if not group.fixed and group.letter[0] in UNITS and group.size > 1
    }
    assert bool(units) != (chosen.name in NO_UNITS)
    if not units:
        return
    masked = jax.tree.map(np.array, tree.flatten(chosen.apart))
    for name, keep in units.items():
        size = known[name].size
        gone = np.setdiff1d(np.arange(size), keep)
        for path, axis, start, before, after in known[name].members:
            each = np.arange(before)[:, None, None] * size + gone[None, :, None]
            place = start + each * after + np.arange(after)[None, None]
            masked[path][(slice(None),) * axis + (place.reshape(-1),)] = 0
    kept = {name: jnp.asarray(keep) for name, keep in units.items()}
    smaller = axes.select(chosen.model.axes, chosen.params, kept)
    assert tree.count(smaller) < 0.95 * tree.count(chosen.params)
    want = chosen.apply(tree.stack(tree.unflatten(masked)), chosen.inputs)
    assert off(chosen.apply(smaller, chosen.inputs), want) < 1e-5
    if chosen.name in CACHED:
        by_mask = compress.prune.mask_units(chosen.model.axes, chosen.params, kept)
        for path, leaf in tree.flatten(tree.unstack(by_mask)).items():
            np.testing.assert_array_equal(leaf, masked[path])


def test_a_model_with_fewer_layers_is_the_one_that_skips_them(case):
    drop = compress.transforms.DropLayers(0.5)
    family = case.name.split("/")[0]
    if why := NO_LAYERS.get(case.name, NO_LAYERS.get(family)):
        with pytest.raises(InputError, match=f"drop_layers: .*{why}"):
            drop.change(case.model, case.params, {}, jax.random.key(0))
        return
    if case.name not in DROPPED:
        assert drop.layers(case.model, case.params)
        return
    model, start, step = case.model, *drop_layers.programs(case.model)
    layers = list(case.apart["blocks"].values())
    x, context = start(case.params, case.inputs)
    run = lambda i, x: step(layers[i], np.int32(i), x, context, case.inputs)[0]
    stream = list(itertools.accumulate(range(len(layers)), lambda x, i: run(i, x), initial=x))
    found = drop.measure(model, case.params, [case.inputs])
    for i in range(len(layers)):
        before, after = (np.asarray(x, np.float64) for x in stream[i : i + 2])
        cosine = (before * after).sum(-1) / np.sqrt((before**2).sum(-1) * (after**2).sum(-1))
        change, count = found[f"blocks/{i}"].values()
        assert abs(change / count - (1 - cosine.mean())) < 1e-5

    first, *_ = drop.layers(model, case.params)
    marks = {path: jnp.float32(path != f"blocks/{first}") for path in found}
    few = {path: {"change": mark, "count": jnp.float32(1)} for path, mark in marks.items()}
    shorter, params = drop.change(model, case.params, few, jax.random.key(0))
    for i in range(len(layers)):
        x = x if i == first else run(i, x)
    want = jax.jit(lambda params, x: model.parts.head(params, x))(case.params, x)
    assert shorter.config.depth == len(layers) - 1 == 2
    assert off(case.run(shorter, params, case.inputs)[0], want) < 1e-5
