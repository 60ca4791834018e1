"""Fusing q, k, v and gate, up: reversible bit for bit, and the same products.

Whole models: tests/contracts.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import ops, tree
from jaxmodel.layers.fuse import cut, divide, fuse, fused_key, unfuse
from jaxmodel.leaves import QTensor, Sparse, Turned
from jaxmodel.ops.probe import zeros_for


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def quantise(w: jax.Array, bits: int = 8, group: int | None = None, **static) -> QTensor:
    grouped = np.asarray(w).reshape(*w.shape[:-1], -1, group or w.shape[-1])
    scale = np.abs(grouped).max(-1) / (2 ** (bits - 1) - 1)
    codes = np.round(grouped / scale[..., None]).astype(np.int32).reshape(w.shape)
    return QTensor.from_codes(
        jnp.asarray(codes), jnp.asarray(scale), bits=bits, group=group, **static
    )


def assert_same(a: tree.Params, b: tree.Params) -> None:
    assert set(tree.flatten(a)) == set(tree.flatten(b))
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def attention(
    q: int = 24, k: int = 8, v: int = 8, lead: tuple[int, ...] = (), width: int = 16
) -> dict[str, jax.Array]:
    return {
        name: normal(*lead, n, width, seed=n + i)
        for i, (name, n) in enumerate((("q", q), ("k", k), ("v", v)))
    }


LEAVES = {
    "array": lambda w: w,
    "bfloat16": lambda w: w.astype(jnp.bfloat16),
    "int8": quantise,
    "int4 groups": lambda w: quantise(w, 4, group=8),
    "int3": lambda w: quantise(w, 3),
    "dynamic": lambda w: quantise(w, activations="int8"),
    "turned": lambda w: Turned(quantise(w), hadamard=4),
}


@pytest.mark.parametrize("kind", LEAVES)
@pytest.mark.parametrize("lead", [(), (3,)])
def test_fuse_and_unfuse_are_inverse(kind, lead):
    parts = {name: LEAVES[kind](w) for name, w in attention(lead=lead).items()}
    key = "0-2" if lead else "0"
    mlp = {name: LEAVES[kind](normal(*lead, 12, 16)) for name in ("gate", "up", "down")}
    params = {
        "embed": normal(5, 16),
        "blocks": {key: {"attn": {**parts, "o": normal(*lead, 16, 24)}, "mlp": mlp}},
    }
    fused = fuse(params)
    assert set(fused["blocks"][key]["attn"]) == {"3q+k+v", "o"}
    assert set(fused["blocks"][key]["mlp"]) == {"gate+up", "down"}
    assert fused["blocks"][key]["attn"]["3q+k+v"].shape == (*lead, 40, 16)
    assert_same(unfuse(fused), params)
    if lead:
        assert_same(jax.jit(lambda p: unfuse(fuse(p)))(params), params)
    assert tree.nbytes(fused) == tree.nbytes(params)
    assert_same(fuse(fused), fused)


def test_biases_go_with_their_weights():
    params = {
        **attention(),
        **{f"{n}_bias": normal(w.shape[0]) for n, w in attention().items()},
        "o_bias": normal(4),
    }
    fused = fuse(params)
    assert set(fused) == {"3q+k+v", "3q+k+v_bias", "o_bias"}
    np.testing.assert_array_equal(
        fused["3q+k+v_bias"], jnp.concatenate([params[f"{n}_bias"] for n in "qkv"])
    )
    assert_same(unfuse(fused), params)


@pytest.mark.parametrize(
    "widths", [(24, 8, 8), (8, 8, 8), (40, 16, 16), (7, 5, 3), (1, 1, 1), (576, 192, 192)]
)
def test_any_widths(widths):
    params = attention(*widths, width=2)
    fused = fuse(params)
    (key,) = fused
    assert_same(unfuse(fused), params)
    x = normal(4, 2)
    parts = cut(ops.einsum("BD,FD->BF", x, fused[key]), key)
    for part, name in zip(parts, "qkv", strict=True):
        np.testing.assert_allclose(
            part, ops.einsum("BD,FD->BF", x, params[name]), rtol=1e-5, atol=1e-6
        )


def sparse(w: jax.Array) -> Sparse:
    return Sparse.from_dense(jnp.where(w > 0, w, 0))


@pytest.mark.parametrize(
    "change",
    [
        {"q": lambda w: w.astype(jnp.bfloat16)},
        {"q": quantise},
        {"k": quantise},
        {"q": quantise, "k": quantise, "v": lambda w: quantise(w, 4)},
        {"q": quantise, "k": quantise, "v": lambda w: quantise(w, activations="int8")},
        {n: lambda w: dataclasses.replace(quantise(w), scale=jnp.ones((1, 1))) for n in "qkv"},
        {n: sparse for n in "qkv"},
        {"v": lambda w: w[:, :8]},
        {n: lambda w: ops.Probe(w, zeros_for(w.shape, [])) for n in "qkv"},
    ],
)
def test_what_cannot_be_joined_stays_apart(change):
    params = attention()
    params |= {name: fn(params[name]) for name, fn in change.items()}
    fused = fuse({"attn": params})
    assert set(fused["attn"]) == set(params)
    assert all(fused["attn"][name] is params[name] for name in params)


def test_what_is_not_whole_stays_apart():
    for params in (
        {**attention(), "q_bias": normal(24)},
        {name: attention()[name] for name in "qk"},
    ):
        assert set(fuse(params)) == set(params)


def test_keys():
    assert divide("q") is None
    assert divide("q+") is None
    assert divide("q+k") == {"q": (0.0, 0.5), "k": (0.5, 1.0)}
    assert divide("3q+k+v")["v"] == (0.8, 1.0)
    assert fused_key(["o", "3q+k+v"], ("q", "k", "v")) == "3q+k+v"
    assert fused_key(["o", "gate+up"], ("q", "k", "v")) is None
