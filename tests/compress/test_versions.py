"""The versions that are compared: made when asked for, each what its name says."""

from __future__ import annotations

import importlib

import jax
import pytest

from jaxmodel import compress, leaves, tree
from jaxmodel.compress.variants import VERSIONS
from jaxmodel.errors import InputError
from jaxmodel.hub import Bundle
from jaxmodel.models import gpt2

MODEL = gpt2.model(gpt2.SIZES["tiny"])


@pytest.fixture(scope="module")
def bundle():
    return Bundle(MODEL, jax.jit(MODEL.init)(jax.random.key(0)), card={"name": "tiny"})


def test_each_is_what_its_name_says(bundle):
    tokens = [jax.random.randint(jax.random.key(i), (2, 8), 0, 256) for i in range(2)]
    made = {name: make() for name, make in compress.variants(bundle, batches=tokens).items()}
    assert tuple(made) == VERSIONS == ("f32", "bf16", *compress.RECIPES)
    assert made["f32"].params is bundle.params and made["f32"] is not bundle
    assert {leaf.dtype.name for leaf in jax.tree.leaves(made["bf16"].params)} == {"bfloat16"}
    assert made["bf16"].model.policy.compute_dtype == "bfloat16"
    for name in compress.RECIPES:
        given = tokens if compress.RECIPES[name].needs else None
        whole = compress.compress_bundle(bundle, compress.RECIPES[name], batches=given)[0]
        assert (
            tree.fingerprint(made[name].params) == tree.fingerprint(whole.params)
            and made[name].card == whole.card
        )
        assert any(
            isinstance(leaf, leaves.Compressed) for leaf in tree.flatten(made[name].params).values()
        )


def test_nothing_is_made_before_it_is_asked_for(bundle, monkeypatch):
    module = importlib.import_module("jaxmodel.compress.variants")
    monkeypatch.setattr(module, "compress_bundle", lambda *_, **__: pytest.fail("made too early"))
    assert list(compress.variants(bundle, ("int8", "f32"))) == ["int8", "f32"]


def test_what_cannot_be_compared(bundle):
    with pytest.raises(InputError, match="names: 'int5' is not known; allowed: bf16, f32"):
        compress.variants(bundle, ("int5",))
    small = compress.variants(bundle)["int8"]()
    with pytest.raises(
        InputError, match="model: 'tiny' is already compressed; allowed: plain weights"
    ):
        compress.variants(small)
