"""`repeat` against a Python loop over single layers: mixed segments, caches, keys, auxiliary
losses, rematerialisation.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import layers, ops, tree
from jaxmodel.errors import InputError
from jaxmodel.leaves import QTensor, Sparse
from jaxmodel.models import llama

B = 2
T = 5
CONFIG = dataclasses.replace(llama.SIZES["tiny"], depth=7)
MODEL = llama.model(CONFIG)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def quantise(w: jax.Array, bits: int, **static) -> QTensor:
    scale = np.abs(np.asarray(w)).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
    codes = np.round(np.asarray(w) / scale).astype(np.int32)
    return QTensor.from_codes(jnp.asarray(codes), jnp.asarray(scale), bits=bits, **static)


def narrow(block: tree.Params) -> tree.Params:
    """A feed-forward part of half the width, and a head less in attention: 3 query heads, 1 key
    head.
    """
    mlp = {
        "gate": block["mlp"]["gate"][:32],
        "up": block["mlp"]["up"][:32],
        "down": block["mlp"]["down"][:, :32],
    }
    attn = {name: block["attn"][name][: rows * 8] for name, rows in (("q", 3), ("k", 1), ("v", 1))}
    return {**block, "mlp": mlp, "attn": {**attn, "o": block["attn"]["o"][:, :24]}}


def change(block: tree.Params, leaf) -> tree.Params:
    return {
        **block,
        **{part: {name: leaf(w) for name, w in block[part].items()} for part in ("attn", "mlp")},
    }


def half(w: jax.Array) -> Sparse:
    size = np.abs(np.asarray(w))
    return Sparse.from_dense(w, jnp.asarray(size >= np.median(size, axis=-1, keepdims=True)))


@pytest.fixture(scope="module")
def mixed():
    """Seven layers: two plain, two of 8 bits, one of 4 bits with int8 activations, one sparse, one
    narrow.
    """
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.2, a.dtype), shapes)
    kinds = [
        lambda block: block,
        lambda block: block,
        lambda block: change(block, lambda w: quantise(w, 8)),
        lambda block: change(block, lambda w: quantise(w, 8)),
        lambda block: change(block, lambda w: quantise(w, 4, activations="int8")),
        lambda block: change(block, half),
        narrow,
    ]
    single = tree.unstack(params)["blocks"]
    single = {
        key: kind(single[key]) for kind, key in zip(kinds, tree.segments(single), strict=True)
    }
    return {**params, "blocks": single}, tree.stack({**params, "blocks": single})


def test_mixed_segments_equal_the_loop(mixed):
    single, stacked = mixed
    assert tree.segments(stacked["blocks"]) == ["0-1", "2-3", "4", "5", "6"]
    tokens = jax.random.randint(jax.random.key(1), (B, T), 0, CONFIG.vocab)
    embed, block, head = map(jax.jit, MODEL.parts)
    x, context = embed(single, {"tokens": tokens})
    for layer in tree.segments(single["blocks"]):
        x, _, _ = block(single["blocks"][layer], x, context)
    got = jax.jit(MODEL.apply)(stacked, tokens)
    np.testing.assert_allclose(got.hidden, x, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got.logits, head(single, x), rtol=1e-4, atol=1e-4)


def test_mixed_segments_with_a_cache_equal_the_whole(mixed):
    """Layers with fewer heads too."""
    _, params = mixed
    tokens = jax.random.randint(jax.random.key(1), (B, T), 0, CONFIG.vocab)
    run = jax.jit(MODEL.apply)
    whole = run(params, tokens).logits
    cache = MODEL.init_cache(B, T)
    parts = []
    for t in range(T):
        out = run(params, tokens[:, t : t + 1], cache)
        cache = out.cache
        parts = [*parts, out.logits]
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, rtol=1e-3, atol=1e-3)


# -------------------------------------------------------------------------------------- a toy block


def toy(params, x, context, cache, layer, rng, train):
    """Uses everything that a block is given."""
    x = jnp.tanh(ops.einsum("BTD,FD->BTF", x, params["w"])) + context["shift"]
    if rng is not None and train:
        x = x + jax.random.normal(rng, x.shape)
    if cache is not None:
        cache = cache.at[layer].set(x[0, 0, 0])
    aux = {"square": jnp.sum(x * x)}
    return x, cache, aux | ({"extra": params["extra"]} if "extra" in params else {})


def toy_case(depth: int = 5):
    singles = {str(i): {"w": normal(4, 4, seed=i)} for i in range(depth)}
    return singles, normal(B, T, 4, seed=99), {"shift": jnp.asarray(0.1)}


@pytest.mark.parametrize("cuts", [["0-4"], ["0", "1-3", "4"], ["0-1", "2-4"]])
def test_cache_keys_and_aux_do_not_depend_on_the_segments(cuts):
    singles, x, context = toy_case()
    key = jax.random.key(3)
    cache = jnp.zeros(5)
    want = x
    aux = 0.0
    seen = []
    for i in range(5):
        want, _, one = toy(
            singles[str(i)], want, context, None, i, jax.random.fold_in(key, i), True
        )
        aux = aux + one["square"]
        seen = [*seen, want[0, 0, 0]]
    pieces = {}
    for name in cuts:
        nodes = [singles[str(i)] for i in tree.span(name)]
        pieces[name] = (
            nodes[0] if len(nodes) == 1 else jax.tree.map(lambda *a: jnp.stack(a), *nodes)
        )
    run = jax.jit(lambda p, x, c: layers.repeat(toy, p, x, context, c, key, True))
    got, got_cache, got_aux = run(pieces, x, cache)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got_cache, jnp.stack(seen), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got_aux["square"], aux, rtol=1e-5)


def test_aux_of_only_some_layers_is_not_lost():
    singles, x, context = toy_case(3)
    singles["0"]["extra"], singles["1"]["extra"] = jnp.asarray(2.0), jnp.asarray(3.0)
    aux = layers.repeat(toy, tree.stack({"blocks": singles})["blocks"], x, context)[2]
    assert aux["extra"] == 5
    assert layers.repeat(toy, {"0": singles["2"]}, x, context)[2].keys() == {"square"}


def test_segments_with_a_gap_are_an_error():
    singles, x, context = toy_case(3)
    del singles["1"]
    with pytest.raises(InputError, match="without gap"):
        layers.repeat(toy, singles, x, context)


def test_init_layers_gives_each_layer_a_key_of_its_own():
    init = lambda key: {"w": jax.random.normal(key, (2, 3))}
    assert layers.init_layers(init, jax.random.key(0), 1)["0"]["w"].shape == (2, 3)
    stacked = layers.init_layers(init, jax.random.key(0), 4)["0-3"]["w"]
    keys = jax.random.split(jax.random.key(0), 4)
    np.testing.assert_array_equal(stacked, jnp.stack([init(key)["w"] for key in keys]))


# -------------------------------------------------------------------------------- rematerialisation


@pytest.mark.parametrize("cuts", [["0-4"], ["0", "1-4"]])
def test_remat_gives_the_same_gradients_and_saves_less(cuts):
    def block(params, x, context, cache, layer, rng, train):
        hidden = jnp.tanh(ops.einsum("BTD,FD->BTF", x, params["up"]))
        return x + ops.einsum("BTF,DF->BTD", jnp.sin(hidden), params["down"]), None, {}

    stack = {"up": normal(5, 8, 4), "down": normal(5, 4, 8, seed=1)}
    params = {key: tree.layer_slice(stack, range(5), tree.span(key)) for key in cuts}
    x = normal(B, T, 4, seed=2)
    results = {}
    saved = {}
    for remat in ("none", "full", "dots"):
        loss = lambda p, mode=remat: jnp.mean(layers.repeat(block, p, x, {}, remat=mode)[0] ** 2)
        results[remat] = jax.jit(jax.value_and_grad(loss))(params)
        residuals = jax.eval_shape(lambda p, f=loss: jax.vjp(f, p)[1], params)
        saved[remat] = sum(a.size for a in jax.tree.leaves(residuals))
    for remat in ("full", "dots"):
        for got, want in zip(
            jax.tree.leaves(results[remat]), jax.tree.leaves(results["none"]), strict=True
        ):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    assert saved["full"] < saved["dots"] < saved["none"]
