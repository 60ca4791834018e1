"""The kernels in C++ compute what XLA's form and float64 do, for any sizes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel.errors import InputError
from jaxmodel.leaves import QTensor, RowPacked, Turned
from jaxmodel.ops import contract, kernels

RNG = np.random.default_rng(0)


def codes(bits: int, out: int, n: int, group: int | None = None, affine: bool = False, **more: Any):
    low = 0 if affine else -(2 ** (bits - 1))
    q = RNG.integers(low, low + 2**bits, (2, out, n))
    if bits == 1 and not affine:
        q = 2 * q + 1
    one, dtype = more.pop("one_scale", False), more.pop("dtype", jnp.float16)
    groups = 1 if group is None else -(-n // group)
    scale = jnp.asarray(RNG.uniform(0.5, 2, (2, 1 if one else out, groups)), dtype)
    minimum = -2 * scale if affine else None
    leaf = QTensor.from_codes(jnp.asarray(q), scale, minimum, bits=bits, group=group, **more)
    if leaf.bits == 8:
        return leaf
    packed = RowPacked.of(leaf)
    assert packed is not None
    return packed


LEAVES = {
    "4 bits, groups, padded": codes(4, 40, 70, group=32),
    "4 bits, affine groups": codes(4, 30, 64, group=16, affine=True),
    "4 bits, rows": codes(4, 38, 67, dtype=jnp.bfloat16),
    "4 bits, rows of float32": codes(4, 16, 64, dtype=jnp.float32),
    "4 bits, one scale": codes(4, 16, 33, one_scale=True),
    "2 bits": codes(2, 44, 50),
    "2 bits, affine groups": codes(2, 24, 48, group=24, affine=True),
    "1 bit": codes(1, 40, 65, group=24),
    "8 bits": codes(8, 37, 75),
    "8 bits, groups, padded": codes(8, 18, 90, group=32),
    "8 bits, one scale": codes(8, 9, 64, one_scale=True),
    "rounded": codes(8, 37, 75, activations="int8"),
    "rounded, padded": codes(8, 20, 50, group=64, activations="int8"),
    "rounded, many": codes(8, 66, 193, activations="int8"),
    "rounded, one scale": codes(8, 7, 64, activations="int8", one_scale=True),
    "rounded, limited": codes(
        8, 10, 40, activations="int8", limit=jnp.full((2, 1, 1), 1.5, jnp.float32)
    ),
}


@pytest.fixture
def built(request, monkeypatch):
    monkeypatch.setenv(kernels.SETTING, getattr(request, "param", "native"))
    found = kernels.library()
    if found.tag is None:
        pytest.skip(found.reason)
    return found.tag


def inputs(rows: int) -> dict[str, Any]:
    return {
        name: jnp.asarray(RNG.normal(size=(rows, leaf.shape[-1])), jnp.float32)
        for name, leaf in LEAVES.items()
    }


def first(leaf: Any) -> Any:
    return jax.tree.map(lambda a: a[0], leaf)


def plain(x: Any, leaf: Any) -> Any:
    return contract._plain(x, leaf, contract.DEFAULT)


def product(x: Any, leaf: Any) -> Any:
    """What `ops.einsum` does, whose traces are kept whatever the switch says."""
    whole = leaf.activations is None or kernels.of_int8(leaf)
    x = x if whole else contract._rounded(x, leaf)
    return kernels.product(x, leaf, plain)


def products(xs: dict[str, Any], leaves: dict[str, Any], of: Any = product) -> dict[str, Any]:
    return {name: of(x, leaves[name]) for name, x in xs.items()}


def by_hand(x: np.ndarray, leaf: Any) -> np.ndarray:
    """The product in float64, of inputs that are rounded as the leaf says."""
    weight = np.asarray(leaf.decode(), np.float64)
    if leaf.activations is None:
        return x.astype(np.float64) @ weight.T
    top = np.abs(x).max(1, keepdims=True) if leaf.limit is None else np.asarray(leaf.limit)
    step = (top / np.float32(127)).astype(np.float32)
    q = np.rint(np.clip(x / step, -127, 127)).astype(np.float64)
    return q @ weight.T * step


@pytest.mark.parametrize(
    ("built", "rows"),
    [
        *[("native", rows) for rows in (1, 3, 31)],  # tiles of 8, 4, 2 and 1 rows
        *[("avx2", rows) for rows in (1, 13)],
    ],
    indirect=["built"],
)
def test_a_product_is_that_by_hand(built, rows):
    xs = inputs(rows)
    leaves = {name: first(leaf) for name, leaf in LEAVES.items()}
    lowered = jax.jit(products).lower(xs, leaves)
    assert lowered.as_text().count("custom_call @jaxmodel_") == len(leaves)
    found = lowered.compile()(xs, leaves)
    for name, y in found.items():
        want = by_hand(np.asarray(xs[name]), leaves[name])
        size = np.abs(want).max()
        np.testing.assert_allclose(np.asarray(y), want, atol=3e-6 * size, err_msg=name)


def test_transformed_programs(built):
    """Scanned, mapped and differentiated, a product is that of XLA's form."""
    names = ("4 bits, affine groups", "8 bits, groups, padded", "rounded, limited")
    leaves = {name: LEAVES[name] for name in names}
    xs = {name: jnp.stack([x, 2 * x]) for name, x in inputs(2).items() if name in names}

    def all_of(xs, leaves, of):
        _, scanned = jax.lax.scan(lambda c, one: (c, products(*one, of)), 0, (xs, leaves))
        mapped = lambda xs: {name: jax.vmap(of)(x, leaves[name]) for name, x in xs.items()}
        norm = lambda xs: sum(jnp.sum(jnp.square(y)) for y in mapped(xs).values())
        return scanned, mapped(xs), jax.grad(norm)(xs)

    run = jax.jit(all_of, static_argnums=2)
    for got, want in zip(run(xs, leaves, product), run(xs, leaves, plain), strict=True):
        for name in leaves:
            w = np.asarray(want[name])
            np.testing.assert_allclose(
                np.asarray(got[name]), w, atol=2e-5 * np.abs(w).max(), err_msg=name
            )


def test_where_no_kernel_serves(monkeypatch):
    """Many rows and the switch; a wrong word of it is refused."""
    leaf = first(LEAVES["4 bits, rows"])
    text = lambda rows: jax.jit(lambda x: product(x, leaf)).lower(jnp.ones((rows, 67))).as_text()
    assert "jaxmodel_packed" not in text(kernels.MOST_ROWS["packed"] + 1)
    monkeypatch.setenv(kernels.SETTING, "off")
    assert kernels.library().tag is None and "jaxmodel_packed" not in text(1)
    assert kernels.says(Turned(leaf, hadamard=1)) == (
        "its input turned, then unpacked for products in float (no kernel: JAXMODEL_KERNELS is off)"
    )
    monkeypatch.setenv(kernels.SETTING, "naive")
    with pytest.raises(InputError, match="JAXMODEL_KERNELS: 'naive' is not known.*native"):
        kernels.library()


def test_a_compiler_that_fails_is_done_without(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXMODEL_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    found = kernels._library.__wrapped__("native")
    assert found == (None, "they could not be built: CalledProcessError")
    assert not list(tmp_path.rglob("*.so"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert kernels._library.__wrapped__("native") == (None, "there is no C++ compiler")
