"""Layers with fewer units than the config says: saved, loaded, trained and placed like any
others.
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import axes, compress, data, hub, sharding, train, tree
from jaxmodel.errors import InputError
from jaxmodel.models import gpt2, llama

TINY = llama.model(llama.SIZES["tiny"])
MOE = llama.model(llama.SIZES["tiny-moe"])
GPT = gpt2.model(gpt2.SIZES["tiny"])
TOKENS = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)


def narrow(model, **units):
    """Parameters of which some layers have the first units alone:

    `F1=32` for 32 of `F` in layer 1.
    """
    params = jax.jit(model.init)(jax.random.key(0))
    return axes.select(
        model.axes,
        params,
        {f"blocks/{name[1:]}/{name[0]}": jnp.arange(n) for name, n in units.items()},
    )


@pytest.mark.parametrize(
    ("model", "units"),
    [
        pytest.param(TINY, {"F1": 32, "K2": 1}, id="half-of-F-and-a-group-of-heads"),
        pytest.param(TINY, {"G0": 1}, id="a-query-head-of-each-group"),
        pytest.param(MOE, {"E1": 3, "F2": 40}, id="an-expert"),
        pytest.param(GPT, {"K0": 3, "F2": 100}, id="joined-q-k-v"),
    ],
)
def test_a_narrow_bundle_comes_back_bit_for_bit(model, units, tmp_path):
    params = narrow(model, **units)
    hub.Bundle(model, params).save_pretrained(tmp_path / "narrow")
    told = json.loads((tmp_path / "narrow" / "jaxmodel.json").read_text())["narrow"]
    assert told == {f"blocks/{name[1:]}/{name[0]}": n for name, n in units.items()}
    back = hub.from_pretrained(tmp_path / "narrow")
    assert tree.fingerprint(back.params) == tree.fingerprint(params)
    want = jax.jit(model.apply)(params, TOKENS).logits
    np.testing.assert_array_equal(jax.jit(back.model.apply)(back.params, TOKENS).logits, want)
    cached = jax.jit(model.apply)(back.params, TOKENS, model.init_cache(2, 16)).logits
    np.testing.assert_allclose(cached, want, atol=1e-5)


def test_compressed_narrow_layers_come_back_too(tmp_path):
    params, _ = compress.apply([(".*/mlp/.*", "rtn(8)"), (".*", ())], narrow(TINY, F1=32))
    hub.Bundle(TINY, params).save_pretrained(tmp_path / "narrow")
    assert tree.fingerprint(hub.from_pretrained(tmp_path / "narrow").params) == tree.fingerprint(
        params
    )


def test_a_narrow_model_is_trained():
    tokens = np.random.default_rng(0).integers(0, 256, (64, 13)).astype(np.int32) % 7
    stream = data.Stream({"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}, batch_size=8)
    params = narrow(TINY, F1=32, K2=1)
    state, history = train.fit(
        TINY, stream, train.TrainConfig(steps=6, learning_rate=1e-2), params=params
    )
    assert history[-1]["loss"] < history[0]["loss"]
    assert state.params["blocks"]["1"]["mlp"]["up"].shape == (32, 32)
    assert state.params["blocks"]["2"]["attn"]["k"].shape == (8, 32)


def test_a_narrow_model_lies_on_a_mesh_that_divides_it():
    mesh = jax.sharding.AbstractMesh(
        (2, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    shapes = jax.eval_shape(lambda: narrow(TINY, F1=32))
    placed = tree.flatten(sharding.shardings(TINY.rules, shapes, mesh)[1])
    assert placed["blocks/1/mlp/up"].spec == jax.P(("tensor",), ("fsdp",))
    with pytest.raises(
        InputError, match=r"does not divide the leaf 'blocks/1/mlp/down': axis 1 of \(32, 33\)"
    ):
        sharding.shardings(TINY.rules, jax.eval_shape(lambda: narrow(TINY, F1=33)), mesh)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: p["blocks"]["1"]["mlp"].update(up=jnp.ones((30, 32))),
            r"an axis of 'blocks/1/mlp/(gate|up|down)' has the length",
        ),
        (lambda p: p.update(norm={"weight": jnp.ones(31)}), "D = "),
        (
            lambda p: p.update(embed=jnp.ones((255, 32)), head=jnp.ones((255, 32))),
            "has 255 of V; the config needs 256",
        ),
        (lambda p: p["blocks"]["1"]["mlp"].pop("up"), "the leaf 'blocks/1/mlp/up' is missing"),
    ],
)
def test_what_is_no_narrower_model_is_refused(change, message, tmp_path):
    params = tree.unstack(narrow(TINY, F1=32))
    change(params)
    with pytest.raises(InputError, match=message):
        hub.Bundle(TINY, params).save_pretrained(tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"blocks/1/F": 65}, "narrow: 'blocks/1/F': 65 given; allowed: 1 to 64"),
        ({"blocks/1/F": 2**31 - 1}, "allowed: 1 to 64"),
        ({"blocks/9/F": 3}, "narrow: 'blocks/9/F': 3 given"),
        ({"blocks/1/h": 4}, "sets of units of which some may go"),
        ({"blocks/1/F": "x"}, "narrow"),
        ({"blocks/1/F": 31}, r"has shape \[32, 32\]|has shape \[32, 31\]|the config needs"),
    ],
)
def test_a_file_that_says_other_widths_than_it_has_is_refused(told, message, tmp_path):
    hub.Bundle(TINY, narrow(TINY, F1=32)).save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "jaxmodel.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "narrow": told}))
    with pytest.raises(InputError, match=message):
        hub.from_pretrained(tmp_path / "m")
