"""What somebody may put in place of parameters, at every door of the library: the right result, or
one line.

Every public function with a parameter `params` or `bundle` is found by its signature; one that is
new needs a call here, or a place among those that are not held to this.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import importlib
import inspect
import tempfile
import types
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodel import (
    adapt,
    compress,
    contrib,
    evaluate,
    generation,
    hub,
    losses,
    models,
    optim,
    train,
    tree,
)
from jaxmodel.errors import InputError
from jaxmodel.leaves.fields import check_fields, static_fields
from jaxmodel.leaves.sparse import expand
from jaxmodel.models import autoencoder, gpt2, mlp, resnet, rnn
from jaxmodel.models.foreign import set_state
from jaxmodel.train.state import init_state
from tests.contracts.conftest import B, T, example

PACKAGES = (
    "adapt",
    "compress",
    "compress.prune",
    "compress.quantize",
    "compress.transforms",
    "contrib",
    "evaluate",
    "generation",
    "hub",
    "leaves",
    "losses",
    "models",
    "optim",
    "train",
)
MODEL = gpt2.model(gpt2.Config(vocab=300, width=16, depth=2, heads=2, context=32))
TOKENS = np.arange(12, dtype=np.int32).reshape(2, 6)
TEXTS = hub.train_bpe(["a b c"], 300)
ROWS = {"features": np.eye(4, 3, dtype=np.float32), "labels": np.arange(4, dtype=np.int32) % 2}
PIXELS = np.linspace(-1, 1, 2 * 4 * 4 * 3, dtype=np.float32).reshape(2, 4, 4, 3)


@dataclasses.dataclass(frozen=True)
class Given:
    """Good parameters, and the leaves of them that are made hostile.

    Attributes:
      model: whose they are.
      inner: the path of a leaf whose numbers are changed.
      top: the path of one in whose place something else is put.
    """

    model: models.Model
    inner: str
    top: str

    @functools.cached_property
    def params(self) -> tree.Params:
        """Of the model."""
        return jax.jit(self.model.init)(jax.random.key(0))

    def changed(self, change: Any) -> tree.Params:
        """With the inner leaf as `change` makes it."""
        return tree.map_leaves(
            lambda path, leaf: change(leaf) if path == self.inner else leaf, self.params
        )

    def put(self, thing: Any) -> tree.Params:
        """With something in place of the top leaf."""
        *parents, last = self.top.split("/")
        whole = jax.tree.map(lambda a: a, self.params)
        node = whole
        for key in parents:
            node = node[key]
        node[last] = thing
        return whole

    @property
    def leaf(self) -> Any:
        """The top leaf."""
        return tree.flatten(self.params)[self.top]


class Lora(Given):
    """With adapters."""

    @functools.cached_property
    def params(self) -> tree.Params:
        """Of the model, with those that `adapt.lora` adds."""
        return adapt.lora(
            MODEL, TEXT.params, [(".*/mlp/up", adapt.LoRA(2)), (".*", None)], jax.random.key(0)
        )[1]


def itself(given: Given) -> dict[str, Any]:
    params: dict[str, Any] = dict(given.params)
    params["again"] = params
    return params


TEXT = Given(MODEL, "blocks/0-1/mlp/up", "embed")
END = Given(MODEL, "norm/weight", "embed")  # what a head reads
LORA = Lora(MODEL, "blocks/0-1/mlp/up_lora/down", "blocks/0-1/mlp/up")
PERCEPTRON = Given(mlp.model(mlp.Config(3, (4,), 2)), "blocks/0/dense", "head")
CODE = Given(
    autoencoder.model(autoencoder.Config(3, 4, (), "l1")),
    "decoder/out/weight",
    "encoder/code/weight",
)
NORMED = Given(
    resnet.model(resnet.Config((1,), 2, classes=2, size=4, small=True)), "stem", "blocks/0/conv1"
)
FOREIGN = Given(
    models.from_linen(nn.BatchNorm(use_running_average=False), jnp.ones((4, 3))),
    "state/batch_stats/mean",
    "scale",
)

HOSTILE: dict[str, Callable[[Given], Any]] = {
    "NaN in a weight": lambda given: given.changed(lambda a: a.at[(0,) * a.ndim].set(jnp.nan)),
    "infinite": lambda given: given.changed(lambda a: a.at[(0,) * a.ndim].set(jnp.inf)),
    "complex": lambda given: given.changed(lambda a: a.astype(jnp.complex64)),
    "no elements": lambda given: given.changed(lambda a: a[:, :0] if a.ndim > 1 else a[:0]),
    "texts": lambda given: given.changed(lambda a: np.full(a.shape, "a")),
    "objects": lambda given: given.changed(lambda a: np.full(a.shape, None)),
    "a number": lambda given: given.put(1.0),
    "a text": lambda given: given.put("weights.npz"),
    "a list": lambda given: given.put([given.leaf]),
    "a tuple": lambda given: given.put((given.leaf,)),
    "None": lambda given: given.put(None),
    "a key that is a number": lambda given: {**given.params, 7: given.leaf},
    "a key with a slash": lambda given: {**given.params, "a/b": given.leaf},
    "an empty dict": lambda given: given.put({}),
    "itself": itself,
    "empty": lambda given: {},
    "a missing leaf": lambda given: tree.unflatten(
        {p: a for p, a in tree.flatten(given.params).items() if p != given.top}
    ),
    "more leaves": lambda given: {**given.params, "more": jnp.ones((3, 4))},
    "another shape": lambda given: given.put(given.leaf[..., : given.leaf.shape[-1] // 2]),
    "a leaf without axes": lambda given: given.put(jnp.float32(1)),
}
TAKEN = (
    "NaN in a weight",
    "infinite",
    "no elements",
    "empty",
    "a missing leaf",
    "more leaves",
    "another shape",
    "a leaf without axes",
)
"""What some function may take, as it is of some model."""


def bundle(params: Any, given: Given = TEXT) -> hub.Bundle:
    return hub.Bundle(given.model, params, TEXTS)


@functools.cache
def folder() -> str:
    """Good adapters on disk."""
    held = tempfile.TemporaryDirectory()
    atexit.register(held.cleanup)
    hub.save_adapters(bundle(LORA.params), held.name)
    return held.name


def some(paths: str, value: Any, rest: Any = None) -> tree.Rules:
    return [(paths, value), (".*", rest)]


def features() -> dict[str, jax.Array]:
    return {name: jnp.asarray(a) for name, a in ROWS.items()}


def predicted(params: Any, x: Any) -> jax.Array:
    return PERCEPTRON.model.apply(params, {"features": jnp.asarray(x)}).logits


CALLS: dict[str, tuple[Given, Callable[[Any], Any]]] = {
    "compress.apply": (
        TEXT,
        lambda params: compress.apply(some(".*/mlp/.*", "rtn(bits=8)", ()), params)[0],
    ),
    "compress.bottom_up": (
        TEXT,
        lambda params: [
            compress.apply(recipe, params)[0]
            for recipe in compress.bottom_up(some(".*/mlp/up", "rtn(8)", ()), MODEL, params)
        ],
    ),
    "compress.budget": (
        TEXT,
        lambda params: compress.apply(
            compress.budget(some(".*/mlp/up", "magnitude(0.5)", ()), params), params
        )[0],
    ),
    "compress.fake": (
        TEXT,
        lambda params: compress.fake(some(".*/mlp/up", "rtn(8)", ()), params),
    ),
    "compress.prune_in_rounds": (
        TEXT,
        lambda params: compress.prune_in_rounds(
            MODEL, params, [some(".*/mlp/up", "magnitude(0.5)", ())], [jnp.asarray(TOKENS)]
        )[0],
    ),
    "compress.prune.mask_units": (
        TEXT,
        lambda params: compress.prune.mask_units(MODEL.axes, params, {"blocks/0/F": jnp.arange(3)}),
    ),
    "compress.prune.score_units": (
        TEXT,
        lambda params: compress.prune.score_units(MODEL.axes, params),
    ),
    "compress.quantize.learn_ranges": (
        TEXT,
        lambda params: compress.quantize.learn_ranges(
            MODEL, params, some(".*/mlp/up", compress.quantize.Learnt(4))
        )[1],
    ),
    "compress.quantize.store_ranges": (TEXT, compress.quantize.store_ranges),
    "compress.transforms.transformed": (
        TEXT,
        lambda params: compress.transforms.transformed(
            MODEL, params, [compress.transforms.Rotate(stream=False)]
        )[1],
    ),
    "compress.calibrate": (
        TEXT,
        lambda params: compress.calibrate(
            MODEL, params, some(".*/mlp/up", "wanda(0.5)", ()), [jnp.asarray(TOKENS)], held_out=0.0
        )[0],
    ),
    "compress.compress_bundle": (
        TEXT,
        lambda params: (
            compress.compress_bundle(bundle(params), compress.get_recipe("int8"))[0].params
        ),
    ),
    "compress.observe": (
        TEXT,
        lambda params: compress.observe(MODEL, params, [jnp.asarray(TOKENS)]),
    ),
    "compress.observe_gradients": (
        TEXT,
        lambda params: compress.observe_gradients(MODEL, params, [jnp.asarray(TOKENS)], ".*/up"),
    ),
    "compress.sensitivity": (
        TEXT,
        lambda params: compress.sensitivity(
            MODEL,
            params,
            {"2": lambda: compress.apply(some(".*/mlp/up", "rtn(2)", ()), params)[0]},
            TOKENS,
        ),
    ),
    "compress.variants": (
        TEXT,
        lambda params: compress.variants(bundle(params), ["bf16"])["bf16"]().params,
    ),
    "evaluate.accuracy": (
        PERCEPTRON,
        lambda params: evaluate.accuracy(predicted, params, ROWS["features"], ROWS["labels"]).value,
    ),
    "evaluate.perplexity": (TEXT, lambda params: evaluate.perplexity(MODEL, params, TOKENS).nll),
    "evaluate.token_nll": (TEXT, lambda params: evaluate.token_nll(MODEL, params, TOKENS)),
    "generation.beam_search": (
        TEXT,
        lambda params: (
            generation.beam_search(
                MODEL, params, jnp.asarray(TOKENS), beams=2, max_new_tokens=2
            ).tokens
        ),
    ),
    "generation.generate": (
        TEXT,
        lambda params: generation.generate(bundle(params), "a b", max_new_tokens=2),
    ),  # its `source`
    "generation.measure_speed": (
        TEXT,
        lambda params: generation.measure_speed(
            bundle(params), streams=(1,), prompt=4, new=1, cache=4, repeats=1
        ),
    ),
    "generation.compare_speed": (
        TEXT,
        lambda params: generation.compare_speed(
            bundle(params), bundle(params), streams=(1,), prompt=4, new=1, cache=4, turns=1
        ),
    ),
    "generation.for_inference": (
        TEXT,
        lambda params: generation.for_inference(bundle(params)).params,
    ),
    "hub.add_adapters": (TEXT, lambda params: hub.add_adapters(bundle(params), folder()).params),
    "hub.save_adapters": (LORA, lambda params: written(bundle(params))),
    "leaves.check_fields": (TEXT, lambda params: check_fields(params, static_fields({}))),
    "leaves.expand": (TEXT, expand),
    "leaves.static_fields": (TEXT, static_fields),
    "models.check_params": (TEXT, lambda params: models.check_params(MODEL, params)),
    "adapt.coord_check": (
        TEXT,
        lambda params: adapt.coord_check(MODEL, params, jnp.asarray(TOKENS)),
    ),
    "models.set_state": (
        FOREIGN,
        lambda params: set_state(FOREIGN.model, params, jnp.ones((4, 3))),
    ),
    "models.summary": (TEXT, lambda params: models.summary(MODEL, params)),
    "losses.autoencoder": (
        CODE,
        lambda params: losses.autoencoder(CODE.model, params, features())[0],
    ),
    "losses.classification": (
        PERCEPTRON,
        lambda params: losses.classification(PERCEPTRON.model, params, features())[0],
    ),
    "contrib.count_active": (
        CODE,
        lambda params: contrib.count_active(CODE.model, params, features()),
    ),
    "losses.cross_entropy": (
        END,
        lambda params: losses.cross_entropy(
            MODEL, params, jnp.ones((2, 6, 16)), jnp.asarray(TOKENS)
        ),
    ),
    "train.find_lr": (
        PERCEPTRON,
        lambda params: train.find_lr(PERCEPTRON.model, ROWS, params=params, steps=8).losses,
    ),
    "train.fit": (
        PERCEPTRON,
        lambda params: (
            train.fit(
                PERCEPTRON.model, ROWS, train.TrainConfig(steps=1), params=params, batch_size=4
            )[0].params
        ),
    ),
    "train.gather": (TEXT, train.gather),
    "train.init_state": (TEXT, lambda params: init_state(params, optax.adam(1e-3)).params),
    "adapt.last_layers": (TEXT, lambda params: adapt.last_layers(MODEL, params, 1)),
    "adapt.layer_rates": (TEXT, lambda params: adapt.layer_rates(MODEL, params, 0.5)),
    "adapt.lora": (
        TEXT,
        lambda params: adapt.lora(MODEL, params, some(".*/up", adapt.LoRA(2)), jax.random.key(0))[
            1
        ],
    ),
    "adapt.merge_adapters": (LORA, lambda params: adapt.merge_adapters(params)[0]),
    "losses.next_token": (
        TEXT,
        lambda params: losses.next_token(
            MODEL, params, dict.fromkeys(("tokens", "targets"), jnp.asarray(TOKENS))
        )[0],
    ),
    "optim.densities": (TEXT, lambda params: optim.densities(params, 0.5)),
    "optim.quantize_weights": (
        TEXT,
        lambda params: optim.quantize_weights(params, some(".*/mlp/up", 8)),
    ),
    "adapt.replace_head": (
        PERCEPTRON,
        lambda params: adapt.replace_head(PERCEPTRON.model, params, 3, jax.random.key(0))[1],
    ),
    "train.recalibrate_batch_norm": (
        NORMED,
        lambda params: train.recalibrate_batch_norm(NORMED.model, params, [PIXELS]),
    ),
    "contrib.unit_dictionary": (CODE, contrib.unit_dictionary),
    "contrib.without_projection": (TEXT, contrib.without_projection),
}
LESS = {"hub.need_processor", "compress.text_batches"}  # they do not look at the weights


def written(one: hub.Bundle) -> None:
    with tempfile.TemporaryDirectory() as place:
        hub.save_adapters(one, place)


NOT_FINITE = ("NaN in a weight", "infinite")


def found() -> set[str]:
    """The public functions that take a tree of weights."""
    names = set()
    for package in PACKAGES:
        module = importlib.import_module(f"jaxmodel.{package}")
        for public in module.__all__:
            thing = getattr(module, public)
            if isinstance(thing, types.FunctionType) and {"params", "bundle"} & set(
                inspect.signature(thing).parameters
            ):
                names.add(f"{package}.{public}")
    return names


def test_every_function_of_weights_is_here():
    assert not found() - set(CALLS) - LESS, "write a call"
    assert not LESS - found(), "gone"


@pytest.mark.parametrize("name", CALLS)
def test_a_function_takes_what_it_can_and_says_of_the_rest_why_not(name):
    given, call = CALLS[name]
    for what, make in HOSTILE.items():
        params = make(given)
        try:
            result = call(params)
        except InputError as error:
            assert "\n" not in str(error), (what, str(error))
            continue
        assert what in TAKEN, f"{what} is taken"
        if what in NOT_FINITE:
            continue
        for part in jax.tree.leaves(result):
            if hasattr(part, "dtype") and jnp.issubdtype(part.dtype, jnp.floating):
                assert np.isfinite(np.asarray(part)).all(), what


def test_a_cache_of_another_batch_size_is_refused():
    reader = rnn.model(rnn.SIZES["tiny"])
    weights = jax.jit(reader.init)(jax.random.key(0))
    given = {"tokens": jnp.zeros((2, 1), jnp.int32), "source": jnp.ones((2, 3), jnp.int32)}
    with pytest.raises(InputError, match="cache: made for 3 rows; 2 given"):
        reader.apply(weights, given, reader.init_cache(3, 8))
    with pytest.raises(InputError, match="cache: made for 1 rows; 2 given"):
        MODEL.apply(TEXT.params, jnp.asarray(TOKENS), MODEL.init_cache(1, 8))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_pixels_that_are_not_finite_are_refused_by_row(bad):
    pixels = PIXELS.copy()
    pixels[1, 2, 0, 1] = bad
    with pytest.raises(InputError, match="pixels: row 1 "):
        models.predict_fn(NORMED.model)(NORMED.params, jnp.asarray(pixels))


@pytest.mark.parametrize("wrong", [-1, 300])
def test_ids_that_the_vocabulary_has_not_are_refused(wrong):
    tokens = TOKENS.copy()
    tokens[1, 5] = wrong
    with pytest.raises(InputError, match=f"windows: the token id {wrong} given; allowed: 0 to 299"):
        evaluate.perplexity(MODEL, TEXT.params, tokens)
    with pytest.raises(InputError, match=f"tokens: the token id {wrong} given"):
        generation.beam_search(MODEL, TEXT.params, jnp.asarray(tokens), beams=2, max_new_tokens=2)


def test_beams_beyond_the_context_are_refused_by_the_argument():
    with pytest.raises(InputError, match="max_new_tokens: 27; allowed: at most 26"):
        generation.beam_search(MODEL, TEXT.params, jnp.asarray(TOKENS), beams=2, max_new_tokens=27)


def test_unknown_token_ids(kind):
    """Where their values are known; a row that is padding may hold any id."""
    model = kind.model
    given = example(model, B, T)
    for name in {"tokens", "source"} & given.keys():
        for wrong in (-1, model.config.vocab, 2**31 - 1):
            ids = np.array(given[name])
            ids[1, 2] = wrong
            last = model.config.vocab - 1
            with pytest.raises(
                InputError, match=f"^{name}: the token id {wrong} given; allowed: 0 to {last}$"
            ):
                model.apply(kind.params, {**given, name: jnp.asarray(ids)})
            mask = np.ones(ids.shape, bool)
            mask[1, 2:] = False
            masks = {"tokens": "mask", "source": "source_mask"}[name]
            shapes = jax.eval_shape(
                lambda params, padded: model.apply(params, padded),
                kind.params,
                {**given, name: jnp.asarray(ids)},
            )
            assert shapes.logits.shape[0] == B  # in jit there are no values to look at
            models.checks.check_inputs(
                models.model.unpadded({name: jnp.asarray(ids), masks: jnp.asarray(mask)}),
                None,
                model.config.vocab,
            )
