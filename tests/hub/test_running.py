"""The form that runs: the same weights, in a layout that this machine reads fast."""

from __future__ import annotations

import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import hub, ops, tree
from jaxmodel.errors import InputError
from jaxmodel.hub.running import _split, running
from jaxmodel.leaves import Codebook, QTensor, RowPacked, Sparse, Turned
from jaxmodel.models import llama

OUT, IN = 16, 40


def codes(bits: int, affine: bool = False, group: int | None = None, **more: Any) -> QTensor:
    rng = np.random.default_rng(bits)
    low = 0 if affine else -(2 ** (bits - 1))
    q = rng.integers(low, low + 2**bits, (2, OUT, IN))
    if bits == 1 and not affine:
        q = 2 * q + 1
    if more.get("form") == "ternary":
        q = np.clip(q, -1, 1)
    shape = (2, OUT, -(-IN // group) if group else 1)
    scale = jnp.asarray(rng.uniform(0.5, 2, shape).astype(np.float16))
    minimum = jnp.asarray(-np.asarray(scale)) if affine else None
    return encode(jnp.asarray(q), scale, minimum, bits=bits, group=group, **more)


encode = jax.jit(QTensor.from_codes, static_argnames=("bits", "group", "activations", "form"))
decode = jax.jit(lambda leaf: leaf.decode())


def half() -> Sparse:
    dense = np.asarray(decode(codes(8)))
    return Sparse.from_dense(jnp.asarray(np.where(dense > 0, dense, 0)))


@functools.cache
def kinds() -> dict[str, Any]:
    """Return leaf, the form that it runs in, and how much larger that may be; not on import."""
    return {name: make() for name, make in KINDS.items()}


KINDS = {
    "int4 groups": lambda: (codes(4, group=16), RowPacked, 1),
    "int4 affine": lambda: (codes(4, affine=True), RowPacked, 1),
    "int3": lambda: (codes(3, group=8), RowPacked, 4 / 3),
    "int2": lambda: (codes(2), RowPacked, 1),
    "int1": lambda: (codes(1), RowPacked, 1),
    "ternary": lambda: (codes(2, form="ternary"), RowPacked, 1.25),
    "int6 affine groups": lambda: (codes(6, affine=True, group=8), QTensor, 4 / 3),
    "int4 with int8 activations": lambda: (codes(4, activations="int8"), QTensor, 2),
    "int4 groups, int8 activations": lambda: (codes(4, group=16, activations="int8"), RowPacked, 1),
    "int8": lambda: (codes(8), QTensor, 1),
    "codebook": lambda: (
        Codebook.from_codes(jnp.zeros((2, OUT, IN), jnp.uint8), jnp.ones((2, 1, 16)), bits=4),
        jax.Array,
        8,
    ),
    "turned int4": lambda: (Turned(codes(4), hadamard=4), Turned, 1),
    "sparse": lambda: (
        half(),
        jax.Array,
        1.6,
    ),
}


@pytest.fixture(scope="module")
def forms():
    stored = {name: leaf for name, (leaf, *_) in kinds().items()}
    return {memory: running(stored, (), memory) for memory in ("fast", "packed")}


@pytest.mark.parametrize("name", KINDS)
def test_the_form_that_runs_is_the_same_weight(forms, name):
    leaf, kind, growth = kinds()[name]
    x = np.random.default_rng(0).normal(size=(1, IN)).astype(np.float32)
    ids = jnp.asarray([[0, OUT // 2, OUT - 1]])

    @jax.jit
    def run(leaf, x):
        dense = leaf if isinstance(leaf, jax.Array) else leaf.decode()
        first = jax.tree.map(lambda a: a[0], leaf)
        return dense, ops.embed(first, ids), ops.einsum("BD,FD->BF", x, first)

    want, _, same = jax.device_get(run(leaf, x))
    for memory in ("fast", "packed"):
        got = forms[memory][name]
        dense, rows, y = jax.device_get(run(got, x))
        np.testing.assert_array_equal(dense, want)
        np.testing.assert_allclose(rows[0], want[0][np.asarray(ids[0])], rtol=1e-6)
        np.testing.assert_allclose(y, same, atol=1e-5 * np.abs(same).max())
        if memory == "packed":
            assert tree.nbytes(got) <= tree.nbytes(leaf) + 1
        else:
            assert isinstance(got, kind) and tree.nbytes(got) <= growth * tree.nbytes(leaf) + 64
    again = running(forms["fast"], (), "fast")
    assert jax.tree.leaves(again[name])[0] is jax.tree.leaves(forms["fast"][name])[0]


def test_a_bundle_keeps_its_form():
    model = llama.model(llama.SIZES["tiny"])
    params = jax.jit(model.init)(jax.random.key(0))
    inner = params["blocks"]["0-2"]["mlp"]["down"]
    q = jnp.clip(jnp.round(inner * 50), -7, 7).astype(jnp.int8)
    leaf = QTensor.from_codes(q, jnp.full((*q.shape[:-1], 1), 0.02), bits=3)
    params["blocks"]["0-2"]["mlp"]["down"] = leaf
    bundle = hub.Bundle(model, params)
    packed = dataclasses.replace(bundle, memory="packed")
    down = lambda params: params["blocks"]["0-2"]["mlp"]["down"]
    assert isinstance(down(bundle.for_inference()), RowPacked)
    assert bundle.for_inference() is bundle.for_inference("fast")
    assert down(packed.for_inference()) is leaf
    assert down(bundle.for_inference("packed")) is leaf
    with pytest.raises(InputError, match="memory: 'small'.*allowed: fast, packed"):
        bundle.for_inference("small")


def test_what_a_mesh_has_cut_keeps_its_layout():
    """Rows that lie on several devices are not joined in one byte."""
    leaf = codes(4, group=8)
    whole = RowPacked.of(leaf)
    assert whole is not None
    with pytest.raises(InputError, match="distant ones share a byte"):
        whole.specs(jax.P(None, "tensor", None), {"tensor": 2})
    assert whole.specs(jax.P(None, None, "tensor"), {"tensor": 5}).scale == jax.P(
        None, None, "tensor"
    )
    cut = types.SimpleNamespace(sharding=types.SimpleNamespace(is_fully_replicated=False))
    assert _split(dataclasses.replace(leaf, packed=cut)) and not _split(leaf)
