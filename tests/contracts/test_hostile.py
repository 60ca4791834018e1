"""What somebody may put in place of parameters, at every door of the library: the right result, or one line.

Every public function with a parameter `params` or `bundle` is found by its signature; one that is new needs a call here, or a
place among those that are not held to this.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodel import compress, evaluate, generation, hub, models, train, tree
from jaxmodel.errors import InputError
from jaxmodel.models import gpt2

PACKAGES = ("adapt", "compress", "contrib", "evaluate", "generation", "hub", "leaves", "losses", "models", "optim", "train")
MODEL = gpt2.model(gpt2.Config(vocab=300, width=16, depth=2, heads=2, context=32))


@functools.cache
def good() -> tree.Params:
    return jax.jit(MODEL.init)(jax.random.key(0))


def changed(path: str, change: Any) -> tree.Params:
    return tree.map_leaves(lambda p, leaf: change(leaf) if p == path else leaf, good())


def itself() -> dict[str, Any]:
    params: dict[str, Any] = dict(good())
    params["again"] = params
    return params


UP = "blocks/0-1/mlp/up"
HOSTILE: dict[str, Any] = {
    "NaN in a weight": lambda: changed(UP, lambda a: a.at[0, 0, 0].set(jnp.nan)),
    "infinite": lambda: changed(UP, lambda a: a.at[0, 0, 0].set(jnp.inf)),
    "complex": lambda: changed(UP, lambda a: a.astype(jnp.complex64)),
    "no elements": lambda: changed(UP, lambda a: a[:, :0]),
    "texts": lambda: changed(UP, lambda a: np.full(a.shape, "a")),
    "objects": lambda: changed(UP, lambda a: np.full(a.shape, None)),
    "a number": lambda: {**good(), "embed": 1.0},
    "a text": lambda: {**good(), "embed": "weights.npz"},
    "a list": lambda: {**good(), "embed": [good()["embed"]]},
    "a tuple": lambda: {**good(), "embed": (good()["embed"],)},
    "None": lambda: {**good(), "embed": None},
    "a key that is a number": lambda: {**good(), 7: good()["embed"]},
    "a key with a slash": lambda: {**good(), "a/b": good()["embed"]},
    "an empty dict": lambda: {**good(), "embed": {}},
    "itself": itself,
    "empty": lambda: {},
    "a missing leaf": lambda: {k: v for k, v in good().items() if k != "embed"},
    "more leaves": lambda: {**good(), "more": jnp.ones((3, 4))},
    "another shape": lambda: {**good(), "embed": good()["embed"][:, :8]},
    "a leaf without axes": lambda: {**good(), "embed": jnp.float32(1)},
}


TOKENS = np.arange(12, dtype=np.int32).reshape(2, 6)
TEXTS = hub.train_bpe(["a b c"], 300)


def bundle(params: Any) -> hub.Bundle:
    return hub.Bundle(MODEL, params, TEXTS)


CALLS: dict[str, Any] = {
    "compress.apply": lambda params: compress.apply([(".*/mlp/.*", compress.parse("rtn(bits=8)")), (".*", ())], params)[0],
    "compress.compress_bundle": lambda params: compress.compress_bundle(bundle(params), compress.named("int8"))[0].params,
    "compress.observe": lambda params: compress.observe(MODEL, params, [jnp.asarray(TOKENS)]),
    "evaluate.perplexity": lambda params: evaluate.perplexity(MODEL, params, TOKENS).nll,
    "evaluate.token_nll": lambda params: evaluate.token_nll(MODEL, params, TOKENS),
    "generation.beam_search": lambda params: (
        generation.beam_search(MODEL, params, jnp.asarray(TOKENS), beams=2, max_new_tokens=2).tokens
    ),
    "generation.generate": lambda params: generation.generate(bundle(params), "a b", max_new_tokens=2),  # its `source`
    "generation.running_only": lambda params: generation.running_only(bundle(params)).params,
    "train.init_state": lambda params: train.init_state(params, optax.adam(1e-3)).params,
    "models.check_params": lambda params: models.check_params(MODEL, params),
}
LESS = {  # they only pass on, look at shapes, or are called with what one of the above has taken
    *("compress.versions", "evaluate.accuracy", "generation.measure_speed", "hub.need_processor", "hub.add_adapters"),
    *("hub.save_adapters", "leaves.check_fields", "leaves.expand", "leaves.static_fields", "adapt.coordinates"),
    *("models.set_state", "models.summary", "losses.autoencoder", "losses.classification", "contrib.count_active"),
    *("losses.cross_entropy", "train.find_lr", "train.fit", "train.gather", "adapt.last_layers", "adapt.layer_rates"),
    *("adapt.lora", "adapt.merge_adapters", "losses.next_token", "optim.quantize_weights"),
    *("adapt.replace_head", "train.set_batch_statistics", "contrib.unit_dictionary", "contrib.without_projection"),
}
NOT_FINITE = ("NaN in a weight", "infinite")


def found() -> set[str]:
    """The public functions that take a tree of weights."""
    names = set()
    for package in PACKAGES:
        module = importlib.import_module(f"jaxmodel.{package}")
        for public in module.__all__:
            thing = getattr(module, public)
            if isinstance(thing, types.FunctionType) and {"params", "bundle"} & set(inspect.signature(thing).parameters):
                names.add(f"{package}.{public}")
    return names


def test_every_function_of_weights_is_here():
    assert not found() - set(CALLS) - LESS, "write a call"
    assert not LESS - found(), "gone"


@pytest.mark.parametrize("name", CALLS)
def test_a_function_takes_what_it_can_and_says_of_the_rest_why_not(name):
    for what, make in HOSTILE.items():
        try:
            result = CALLS[name](make())
        except InputError as error:
            assert "\n" not in str(error), (what, str(error))
            continue
        assert what not in ("complex", "itself", "texts", "objects", "a text", "a number", "a list", "None"), "taken"
        if what in NOT_FINITE:
            continue
        for part in jax.tree.leaves(result):
            if hasattr(part, "dtype") and jnp.issubdtype(part.dtype, jnp.floating):
                assert np.isfinite(np.asarray(part)).all(), what
