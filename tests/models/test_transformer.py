"""The Transformer against stacks of torch's layers (see tests/hub/goldens/make_t5.py), and its
positions in NumPy.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import models, tree
from jaxmodel.errors import InputError
from jaxmodel.models import transformer

STORED = Path(__file__).parents[1] / "hub" / "goldens" / "seq2seq" / "transformer.npz"
FORMS = ("post", "pre")
D = 8
S = 6
T = 5


def stored(form: str) -> dict[str, np.ndarray]:
    with np.load(STORED) as file:
        return {
            key.removeprefix(f"{form}:"): value
            for key, value in file.items()
            if key.startswith(f"{form}:")
        }


def stack_of(want: dict[str, np.ndarray], side: str) -> dict:
    """torch's weights of the encoder or the decoder under our names."""

    def layer(i: int) -> dict:
        get = lambda name: jnp.asarray(want[f"{side}.layers.{i}.{name}"])
        reads = side == "decoder"
        out = {"mlp": {"up": get("linear1.weight"), "down": get("linear2.weight")}}
        out["mlp"] |= {"up_bias": get("linear1.bias"), "down_bias": get("linear2.bias")}
        for ours, theirs, keys in (
            ("attn", "self_attn", "qkv"),
            ("cross", "multihead_attn", ("q", "memory_k", "memory_v")),
        ):
            if ours == "attn" or reads:
                out[ours] = {
                    "o": get(f"{theirs}.out_proj.weight"),
                    "o_bias": get(f"{theirs}.out_proj.bias"),
                }
                for kind, suffix in (("weight", ""), ("bias", "_bias")):
                    parts = jnp.split(get(f"{theirs}.in_proj_{kind}"), 3)
                    out[ours] |= {key + suffix: part for key, part in zip(keys, parts, strict=True)}
        names = ("attn_norm", "cross_norm", "mlp_norm") if reads else ("attn_norm", "mlp_norm")
        for n, name in enumerate(names, start=1):
            out[name] = {kind: get(f"norm{n}.{kind}") for kind in ("weight", "bias")}
        return out

    out: dict = {"blocks": {"0": layer(0), "1": layer(1)}}
    if f"{side}.norm.weight" in want:
        out["norm"] = {
            kind: jnp.asarray(want[f"{side}.norm.{kind}"]) for kind in ("weight", "bias")
        }
    return out


def sinusoids(length: int) -> np.ndarray:
    out = np.zeros((length, D))
    for p in range(length):
        for i in range(0, D, 2):
            out[p, i], out[p, i + 1] = np.sin(p / 10000 ** (i / D)), np.cos(p / 10000 ** (i / D))
    return out


def test_positions():
    found = transformer.sinusoids(jnp.arange(300, dtype=jnp.int32)[None], D)[0]
    np.testing.assert_allclose(found, sinusoids(300), atol=2e-5)


def of_torch(form: str) -> tuple[models.Model, dict, dict[str, jax.Array], dict[str, np.ndarray]]:
    """A model, its parameters and inputs, and what torch made of them.

    Every token is another, and its embedding is such that with its position it is the input of the
    stored stacks.
    """
    want = stored(form)
    config = transformer.Config(
        2 * S + 2 * T, D, 2, 2, 2, 12, pre_norm=form == "pre", attn_bias=True, norm_eps=1e-3
    )
    rows = [
        (want["source"] - sinusoids(S)).reshape(-1, D),
        (want["target"] - sinusoids(T)).reshape(-1, D),
    ]
    embed = jnp.asarray(np.concatenate(rows) / np.sqrt(D), jnp.float32)
    params = {"embed": embed, "encoder": stack_of(want, "encoder"), **stack_of(want, "decoder")}
    source = jnp.arange(2 * S, dtype=jnp.int32).reshape(2, S)
    tokens = 2 * S + jnp.arange(2 * T, dtype=jnp.int32).reshape(2, T)
    inputs = {"source": source, "source_mask": jnp.asarray(want["mask"]), "tokens": tokens}
    return (
        transformer.model(config),
        params,
        inputs,
        {**want, "logits": want["out"] @ np.asarray(embed).T},
    )


@pytest.mark.parametrize("form", FORMS)
def test_the_stacks_are_those_of_torch(form):
    model, params, inputs, want = of_torch(form)
    shapes = tree.unstack(jax.jit(model.init)(jax.random.key(0)))
    assert {k: a.shape for k, a in tree.flatten(params).items()} == {
        k: a.shape for k, a in tree.flatten(shapes).items()
    }
    _, context = jax.jit(model.parts.embed)(params, inputs)
    np.testing.assert_allclose(
        np.asarray(context["memory"])[want["mask"]], want["memory"][want["mask"]], atol=5e-6
    )
    logits = jax.jit(model.apply)(params, inputs).logits
    np.testing.assert_allclose(logits, want["logits"], atol=2e-5)
    assert np.abs(want["out"]).max() > 1 and np.abs(logits).max() > 1


def test_one_table_for_source_target_and_head():
    params = jax.jit(transformer.model(transformer.SIZES["tiny"]).init)(jax.random.key(0))
    tables = [path for path, leaf in tree.flatten(params).items() if 256 in leaf.shape]
    assert tables == ["embed"] and "norm" not in params
    pre = jax.jit(transformer.model(transformer.SIZES["tiny-pre"]).init)(jax.random.key(0))
    assert "norm" in pre and "norm" in pre["encoder"]


def test_the_papers_base_model_has_65_million_weights():
    shapes = jax.eval_shape(transformer.model(transformer.SIZES["base"]).init, jax.random.key(0))
    assert tree.count(shapes) == pytest.approx(65e6, rel=0.04)  # Table 3: 65 x 10^6
    big = jax.eval_shape(transformer.model(transformer.SIZES["big"]).init, jax.random.key(0))
    assert tree.count(big) == pytest.approx(213e6, rel=0.04)


@pytest.mark.parametrize("change", [{"heads": 5}, {"width": 33, "heads": 3}])
def test_wrong_configs(change):
    with pytest.raises(
        InputError, match="width, heads: .* given; allowed: an even width that the heads divide"
    ):
        dataclasses.replace(transformer.SIZES["tiny"], **change)
