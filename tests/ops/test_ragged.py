"""`ragged` against a contraction for each group, for every leaf, with gradients and statistics."""

from __future__ import annotations

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import ops
from jaxmodel.leaves import QTensor, Sparse
from jaxmodel.ops.probe import histogram, zeros_for

module = importlib.import_module("jaxmodel.ops.ragged")  # `ops.ragged` is the function
N = 40
E = 3
IN = 16
OUT = 6
SIZES = [
    (10, 25, 5),
    (0, 40, 0),
    (37, 0, 3),
    (1, 1, 1),
    (0, 7, 4),
    (0, 0, 0),
]  # the last three leave rows over
ALL = ("square", "gram", "histogram", "norms")


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def quantise(w: jax.Array, bits: int = 8, group: int | None = None, **static) -> QTensor:
    grouped = np.asarray(w).reshape(*w.shape[:-1], -1, group or w.shape[-1])
    scale = np.abs(grouped).max(-1) / (2 ** (bits - 1) - 1)
    codes = np.round(grouped / scale[..., None]).astype(np.int32).reshape(w.shape)
    return encode(codes, scale, bits=bits, group=group, **static)


encode = jax.jit(QTensor.from_codes, static_argnames=("bits", "group", "activations"))


def affine(w: jax.Array) -> QTensor:
    grouped = np.asarray(w).reshape(*w.shape[:-1], -1, 8)
    low = grouped.min(-1)
    scale = (grouped.max(-1) - low) / 15
    codes = (
        np.round((grouped - low[..., None]) / scale[..., None]).astype(np.int32).reshape(w.shape)
    )
    return encode(codes, scale, low, bits=4, group=8)


def sparse(w: jax.Array) -> Sparse:
    return Sparse.from_dense(jnp.asarray(np.maximum(np.asarray(w), 0)))


def sparse_int8(w: jax.Array) -> Sparse:
    found = sparse(w)
    return dataclasses.replace(found, values=quantise(found.values, activations="int8"))


LEAVES = {
    "array": lambda w: w,
    "bfloat16": lambda w: w.astype(jnp.bfloat16),
    "int8": quantise,
    "int8 dynamic": lambda w: quantise(w, activations="int8"),
    "int3 rows": lambda w: quantise(w, 3),
    "int4 groups": lambda w: quantise(w, 4, group=8),
    "int4 groups dynamic": lambda w: quantise(w, 4, group=8, activations="int8"),
    "affine": affine,
    "sparse": sparse,
    "sparse int8": sparse_int8,
}


def one_by_one(
    x: jax.Array, w, sizes: tuple[int, ...], policy: ops.Policy = ops.Policy()
) -> jax.Array:
    """Each group's rows with its own matrix."""
    return each(x, w, own_rows(x.shape[0], sizes), policy)


def own_rows(count: int, sizes: tuple[int, ...]) -> jax.Array:
    """Which rows are those of each group."""
    ends = np.cumsum(sizes)[:, None]
    rows = np.arange(count)
    return jnp.asarray((rows < ends) & (rows >= ends - np.array(sizes)[:, None]))


@functools.partial(jax.jit, static_argnums=3)
def each(x: jax.Array, w, own: jax.Array, policy: ops.Policy) -> jax.Array:
    """All rows with each matrix, of which only the group's `own` are kept, so that sizes of groups
    are no shapes.
    """
    total = jnp.zeros((x.shape[0], w.shape[1]), policy.activation_dtype)
    for e in range(len(own)):
        y = ops.einsum("ND,FD->NF", x, jax.tree.map(lambda a, e=e: a[e], w), policy)
        total += jnp.where(own[e][:, None], y, jnp.zeros_like(y))
    return total


def array(sizes: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(sizes, jnp.int32)


RUN = jax.jit(ops.ragged, static_argnums=3)


@pytest.mark.parametrize("kind", LEAVES)
def test_equals_each_group_by_itself(kind):
    x = normal(N, IN)
    w = LEAVES[kind](normal(E, OUT, IN, seed=1))
    for sizes in SIZES:
        want = one_by_one(x, w, sizes)
        np.testing.assert_allclose(
            RUN(x, w, array(sizes), ops.Policy()), want, rtol=1e-5, atol=1e-5
        )
    assert np.abs(want).max() == 0 and np.abs(one_by_one(x, w, SIZES[0])).max() > 1


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 129, 300])
def test_any_number_of_rows(rows):
    """Blocks of two rows to 64, groups of many blocks."""
    rng = np.random.default_rng(rows)
    groups = 4
    x = normal(rows, IN)
    w = normal(groups, OUT, IN, seed=1)
    for share in ([0.25] * 4, [0.97, 0.01, 0.01, 0.01]):
        sizes = tuple(np.bincount(rng.choice(groups, rows, p=share), minlength=groups).tolist())
        np.testing.assert_allclose(
            RUN(x, w, array(sizes), ops.Policy()), one_by_one(x, w, sizes), rtol=1e-5, atol=1e-5
        )


def test_policy():
    x = normal(N, IN)
    w = normal(E, OUT, IN, seed=1)
    sizes = SIZES[0]
    policy = ops.Policy(compute_dtype="bfloat16", activation_dtype="bfloat16")
    got = RUN(x, w, array(sizes), policy)
    want = one_by_one(x, w, sizes, policy)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        got.astype(jnp.float32), want.astype(jnp.float32), rtol=1e-2, atol=1e-2
    )
    assert (
        np.abs(got.astype(jnp.float32) - one_by_one(x, w, sizes)).max() > 1e-3
    )  # the operands are rounded


@pytest.mark.parametrize(
    "kind", ["array", "bfloat16", "int8", "int8 dynamic", "int4 groups", "affine", "sparse"]
)
def test_gradients(kind):
    """Of the rows, and of whatever in a leaf is floating-point."""
    x = normal(N, IN)
    w = LEAVES[kind](normal(E, OUT, IN, seed=1))
    leaves, structure = jax.tree.flatten(w)
    floats = {i: leaf for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)}

    def loss(run, x, floats):
        leaf = jax.tree.unflatten(structure, [floats.get(i, leaf) for i, leaf in enumerate(leaves)])
        return jnp.sum(jnp.sin(run(x, leaf)))

    run = jax.jit(
        jax.grad(lambda x, f, sizes: loss(lambda x, w: ops.ragged(x, w, sizes), x, f), (0, 1))
    )
    by_each = jax.jit(
        jax.grad(lambda x, f, own: loss(lambda x, w: each(x, w, own, ops.Policy()), x, f), (0, 1))
    )
    tolerance = 1e-2 if kind == "bfloat16" else 1e-4
    for sizes in (SIZES[0], SIZES[2], SIZES[4]):
        got = run(x, floats, array(sizes))
        want = by_each(x, floats, own_rows(N, sizes))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            a, b = (np.asarray(v, np.float32) for v in (a, b))
            rounding = 1e-6 * np.abs(b).max()  # of the sums that a number is the difference of
            np.testing.assert_allclose(a, b, tolerance, max(tolerance, rounding))
        assert np.abs(got[0]).max() > 0.1 and not np.any(np.asarray(got[0])[sum(sizes) :])


def test_what_an_accelerator_runs_is_the_same():
    x = normal(N, IN)
    w = normal(E, OUT, IN, seed=1)
    sizes = array(SIZES[2])
    got = module._by_group(x, w, sizes, ops.Policy())
    np.testing.assert_allclose(got, RUN(x, w, sizes, ops.Policy()), rtol=1e-5, atol=1e-5)
    grad = jax.grad(lambda x, w: jnp.sum(ops.ragged(x, w, sizes) ** 2), (0, 1))
    text = jax.jit(grad).trace(x, w).lower(lowering_platforms=("tpu",)).as_text()
    assert (
        text.count('"chlo.ragged_dot"(') == 3 and "while" not in text
    )  # the product and its two gradients
    assert (
        "ragged_dot" not in jax.jit(grad).trace(x, w).lower(lowering_platforms=("cpu",)).as_text()
    )


def test_rows_of_other_groups_do_not_matter():
    """To the bit: a row's result is that of the row alone, wherever it stands in its group."""
    x = normal(N, IN)
    w = normal(E, OUT, IN, seed=1)
    first = RUN(x, w, array((10, 25, 5)), ops.Policy())
    moved = RUN(jnp.concatenate([x[3:10], x[10:35], x[:8]]), w, array((7, 25, 8)), ops.Policy())
    np.testing.assert_array_equal(moved[:7], first[3:10])
    np.testing.assert_array_equal(moved[7:32], first[10:35])


def test_under_scan_remat_and_vmap():
    x = normal(N, IN)
    w = normal(2, E, IN, IN, seed=1) / 4
    sizes = array(SIZES[0])

    def stack(x, w):
        body = jax.checkpoint(lambda x, leaf: (jnp.tanh(ops.ragged(x, leaf, sizes)), None))
        return jnp.sum(jax.lax.scan(body, x, w)[0] ** 2)

    def loop(x, w):
        for leaf in w:
            x = jnp.tanh(one_by_one(x, leaf, SIZES[0]))
        return jnp.sum(x**2)

    got = jax.jit(jax.grad(stack, (0, 1)))(x, w)
    want = jax.jit(jax.grad(loop, (0, 1)))(x, w)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)
    both = jnp.stack([array(SIZES[0]), array(SIZES[1])])
    mapped = jax.jit(jax.vmap(lambda x, s: ops.ragged(x, w[0], s)))(jnp.stack([x, -x]), both)
    for y, rows, sizes in zip(mapped, (x, -x), SIZES, strict=False):
        np.testing.assert_allclose(y, one_by_one(rows, w[0], sizes), rtol=1e-5, atol=1e-5)


def test_wrong_shapes():
    x = normal(N, IN)
    w = normal(E, OUT, IN)
    for bad in ((x, w[0], array(SIZES[0])), (x[:, 1:], w, array(SIZES[0])), (x, w, array((1, 2)))):
        with pytest.raises(ValueError, match=r"allowed: \[N, in\], \[E, out, in\]"):
            ops.ragged(*bad)


# --------------------------------------------------------------------------------------- statistics


HISTOGRAMS = jax.jit(jax.vmap(histogram))  # of each row: one program, whatever the groups


def by_hand(x: jax.Array, sizes: tuple[int, ...]) -> dict[str, np.ndarray]:
    slices = [slice(end - size, end) for size, end in zip(sizes, np.cumsum(sizes), strict=True)]
    rows = [np.asarray(x, np.float64)[group] for group in slices]
    counts = np.asarray(HISTOGRAMS(x))
    return {
        "count": np.asarray(sizes, np.float64),
        "taken": np.zeros(len(sizes)),
        "square": np.stack([(r * r).sum(0) for r in rows]),
        "gram": np.stack([r.T @ r for r in rows]),
        "histogram": np.stack([counts[group].sum(0) for group in slices]),
        "norms": np.stack([norms_by_hand(r) for r in rows]),
    }


def norms_by_hand(rows: np.ndarray) -> np.ndarray:
    edges = 2.0 ** (-24 + 0.5 * np.arange(65))
    size = np.sqrt((rows**2).mean(-1))
    return np.stack([np.histogram(size, edges, weights=w)[0] for w in (None, (rows**2).sum(-1))])


def same(got: dict[str, jax.Array], want: dict[str, np.ndarray]) -> None:
    assert set(got) == set(want)
    for name, value in want.items():
        assert got[name].shape == value.shape and got[name].dtype == jnp.float32, name
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("kind", ["array", "int8 dynamic", "sparse"])
def test_statistics_are_those_of_each_groups_rows(kind):
    x = normal(N, IN)
    w = LEAVES[kind](normal(E, OUT, IN, seed=1))

    @jax.jit
    def measure(zeros, sizes):
        return jax.grad(lambda z: jnp.sum(ops.ragged(x, ops.Probe(w, z), sizes)))(zeros)

    for sizes in SIZES:
        same(measure(zeros_for(w.shape, ALL), array(sizes)), by_hand(x, sizes))
    got = RUN(x, ops.Probe(w, zeros_for(w.shape, ALL)), array(SIZES[0]), ops.Policy())
    np.testing.assert_array_equal(got, RUN(x, w, array(SIZES[0]), ops.Policy()))


@pytest.mark.parametrize("remat", [False, True])
def test_statistics_of_every_layer(remat):
    x = normal(N, IN)
    w = normal(2, E, IN, IN, seed=1) / 4
    sizes = SIZES[4]

    def loss(zeros):
        body = lambda x, leaf: (jnp.tanh(ops.ragged(x, leaf, array(sizes))), None)
        return jnp.sum(
            jax.lax.scan(jax.checkpoint(body) if remat else body, x, ops.Probe(w, zeros))[0]
        )

    got = jax.jit(jax.grad(loss))(zeros_for(w.shape, ALL))
    for i in range(2):
        same({name: value[i] for name, value in got.items()}, by_hand(x, sizes))
        x = jnp.tanh(one_by_one(x, w[i], sizes))
