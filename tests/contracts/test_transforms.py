"""The laws of transforms: a factor that moves as `Axes.feeds` says, and a rotation, change nothing
that is computed; a family that does not allow it says why.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxmodel import axes, compress, tree
from jaxmodel.compress.transforms.moves import move, survey
from jaxmodel.errors import InputError

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


def off(got, want):
    return np.abs(np.asarray(got) - np.asarray(want)).max() / max(1, np.abs(want).max())


def test_factors_and_rotations_change_nothing(case):
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
        if why:
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


def test_a_shrunk_model_is_the_masked_one(cached):
    """Units of the sets that go are zero in all leaves, or gone from all leaves."""
    known = axes.groups(cached.model.axes, cached.params)
    units = {
        name: np.flatnonzero(np.arange(group.size) % 3 != 1)
        for name, group in known.items()
        if not group.ordered and group.letter[0] in "FKHC" and group.size > 1
    }
    masked = jax.tree.map(np.array, tree.flatten(cached.apart))
    for name, keep in units.items():
        size = known[name].size
        gone = np.setdiff1d(np.arange(size), keep)
        for path, axis, start, before, after in known[name].members:
            each = np.arange(before)[:, None, None] * size + gone[None, :, None]
            place = start + each * after + np.arange(after)[None, None]
            masked[path][(slice(None),) * axis + (place.reshape(-1),)] = 0
    kept = {name: jax.numpy.asarray(keep) for name, keep in units.items()}
    smaller = axes.select(cached.model.axes, cached.params, kept)
    assert tree.count(smaller) < 0.9 * tree.count(cached.params)
    want = cached.apply(tree.unflatten(masked), cached.inputs)
    assert off(cached.apply(smaller, cached.inputs), want) < 1e-5
