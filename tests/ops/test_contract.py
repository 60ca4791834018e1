"""`einsum`, `take` and `conv`: arrays against jax.numpy and lax, compressed leaves against their
decoded weights.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import ops
from jaxmodel.errors import InputError
from jaxmodel.leaves import QTensor, Sparse, decode
from jaxmodel.ops.contract import quantize_rows
from jaxmodel.ops.probe import zeros_for

OUT = 6
IN = 32


# A program for each shape in place of one for each of its operations. Without jit the operation is
# called where errors and dtypes are tested.
einsum = jax.jit(ops.einsum, static_argnums=(0, 3), static_argnames=("h", "H", "g"))
conv = jax.jit(ops.conv, static_argnames=("kernel", "stride", "padding"))
encode = jax.jit(QTensor.from_codes, static_argnames=("bits", "group", "activations"))
decoded = jax.jit(decode)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def quantise(
    w: jax.Array,
    bits: int,
    group: int | None = None,
    affine: bool = False,
    tensor: bool = False,
    **static,
) -> QTensor:
    """Round to nearest, in numpy."""
    wide = np.asarray(w, np.float64)
    n = wide.shape[-1]
    wide = np.pad(wide, [(0, 0)] * (wide.ndim - 1) + [(0, -n % (group or 1))])
    grouped = wide.reshape(*wide.shape[:-1], -1, group or n)
    low, high = (grouped.min(-1), grouped.max(-1)) if affine else (0, np.abs(grouped).max(-1))
    if tensor:
        high = np.full_like(high[..., :1, :], np.max(high))
    scale = (high - low) / (2**bits - 1 if affine else max(2 ** (bits - 1) - 1, 1))
    codes = np.round((grouped - np.expand_dims(low, -1)) / scale[..., None])
    codes = (np.where(grouped < 0, -1, 1) if bits == 1 else codes).reshape(wide.shape)[..., :n]
    f32 = lambda a: jnp.asarray(a, jnp.float32)
    return encode(
        jnp.asarray(codes, jnp.int32),
        f32(scale),
        f32(low) if affine else None,
        bits=bits,
        group=group,
        **static,
    )


def two_of_four(w: jax.Array) -> Sparse:
    grouped = np.abs(np.asarray(w)).reshape(*w.shape[:-1], -1, 4)
    keep = np.argsort(np.argsort(-grouped, axis=-1), axis=-1) < 2
    return Sparse.from_dense(w, jnp.asarray(keep.reshape(w.shape)), pattern=(2, 4))


def with_values(leaf: Sparse, *args, **kwargs) -> Sparse:
    return dataclasses.replace(leaf, values=quantise(leaf.values, *args, **kwargs))


def sparse(w: jax.Array) -> Sparse:
    dense = np.asarray(w)
    return Sparse.from_dense(jnp.asarray(np.where(np.abs(dense) > 0.8, dense, 0)))


WEIGHT_ONLY = {
    "int8": lambda w: quantise(w, 8),
    "int8 tensor": lambda w: quantise(w, 8, tensor=True),
    "int8 affine": lambda w: quantise(w, 8, affine=True),
    "int4 groups": lambda w: quantise(w, 4, group=8),
    "int4 padded groups": lambda w: quantise(w[..., :27], 4, group=8),
    "int3 affine groups": lambda w: quantise(w, 3, group=16, affine=True),
    "int1": lambda w: quantise(w, 1),
    "sparse": sparse,
    "sparse 2:4": two_of_four,
    "sparse int8": lambda w: with_values(sparse(w), 8),
    "sparse int1": lambda w: with_values(sparse(w), 1),
    "sparse int4 groups": lambda w: with_values(two_of_four(w), 4, group=8),
}
DYNAMIC = {
    "dynamic": lambda w: quantise(w, 8, activations="int8"),
    "dynamic tensor": lambda w: quantise(w, 8, tensor=True, activations="int8"),
    "dynamic int4": lambda w: quantise(w, 4, activations="int8"),
    "dynamic int4 groups": lambda w: quantise(w, 4, group=8, activations="int8"),
    "dynamic affine": lambda w: quantise(w, 8, affine=True, activations="int8"),
    "dynamic sparse": lambda w: with_values(two_of_four(w), 8, activations="int8"),
    "dynamic sparse groups": lambda w: with_values(two_of_four(w), 8, group=8, activations="int8"),
}
MAKE = {"array": lambda w: w, **WEIGHT_ONLY, **DYNAMIC}


# ------------------------------------------------------------------------ arrays against jnp.einsum


@pytest.mark.parametrize(
    ("equation", "plain", "x", "w", "w_logical", "sizes"),
    [
        ("BTD,FD->BTF", "BTD,FD->BTF", (2, 3, 8), (5, 8), (5, 8), {}),
        ("D,FD->F", "D,FD->F", (8,), (5, 8), (5, 8), {}),
        ("BTD,(Hh)D->BTHh", "BTD,HhD->BTHh", (2, 3, 8), (6, 8), (2, 3, 8), {"h": 3}),
        ("BTD,(Hh)D->BTHh", "BTD,HhD->BTHh", (2, 3, 8), (6, 8), (2, 3, 8), {"H": 2}),
        ("BTHh,D(Hh)->BTD", "BTHh,DHh->BTD", (2, 3, 2, 4), (5, 8), (5, 2, 4), {}),
        ("BHh,(Kg)(Hh)->BKg", "BHh,KgHh->BKg", (2, 2, 4), (6, 8), (3, 2, 2, 4), {"g": 2}),
        ("ETD,EFD->ETF", "ETD,EFD->ETF", (4, 3, 8), (4, 5, 8), (4, 5, 8), {}),
        (
            "AETD,AE(Hh)D->AETHh",
            "AETD,AEHhD->AETHh",
            (2, 2, 3, 8),
            (2, 2, 6, 8),
            (2, 2, 2, 3, 8),
            {"h": 3},
        ),
        ("B T D , F D -> B T F", "BTD,FD->BTF", (2, 3, 8), (5, 8), (5, 8), {}),
    ],
)
def test_einsum_of_arrays(equation, plain, x, w, w_logical, sizes):
    x = normal(*x)
    w = normal(*w, seed=1)
    want = jnp.einsum(plain, x, w.reshape(w_logical), precision="highest")
    got = einsum(equation, x, w, **sizes)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "equation",
    [
        "BTD,FD",
        "BTD->BTF",
        "BTD,FD,GF->BTG",
        "BTD,DF->BTF",
        "BTD,FD->BFT",
        "BTD,FD->TF",
        "BTD,D->BT",
        "BTD,(FD->BTF",
        "BTB,FB->BTF",
        "BTD,DD->BTD",
        "BTD,BD->BTB",
        "BTD,EFD->BTF",
        "ETD,(Ee)FD->ETF",
        "",
    ],
)
def test_an_equation_of_another_form_is_an_error(equation):
    with pytest.raises(InputError, match=r"einsum: .* is not of the form"):
        ops.einsum(equation, normal(2, 2, 2), normal(2, 2))


@pytest.mark.parametrize(
    ("equation", "x", "w", "sizes", "message"),
    [
        ("BTD,FD->BTF", (2, 3, 8), (5, 7), {}, "has 8 features, the weight"),
        ("BTHh,D(Hh)->BTD", (2, 3, 2, 4), (5, 6), {}, "has 8 features, the weight"),
        ("BTD,FD->BTF", (2, 8), (5, 8), {}, "do not have these axes"),
        ("BTD,FD->BTF", (2, 3, 8), (4, 5, 8), {}, "do not have these axes"),
        ("ETD,EFD->ETF", (2, 3, 8), (4, 5, 8), {}, "do not have these axes"),
        ("BTD,(Hh)D->BTHh", (2, 3, 8), (6, 8), {}, "cannot split an axis of 6"),
        ("BTD,(Hh)D->BTHh", (2, 3, 8), (6, 8), {"h": 4}, "cannot split an axis of 6"),
        ("BTD,(Hh)D->BTHh", (2, 3, 8), (6, 8), {"h": 3, "H": 1}, "cannot split an axis of 6"),
    ],
)
def test_shapes_that_do_not_fit_are_an_error(equation, x, w, sizes, message):
    with pytest.raises(InputError, match=message):
        ops.einsum(equation, normal(*x), normal(*w), **sizes)


# -------------------------------------------------------------------------------- compressed leaves


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_einsum_of_a_compressed_leaf_is_that_of_its_decoded_weight(name):
    leaf = MAKE[name](normal(OUT, IN))
    x = normal(2, 3, leaf.shape[-1], seed=1)
    want = np.einsum(
        "btd,fd->btf", np.asarray(x, np.float64), np.asarray(decoded(leaf), np.float64)
    )
    got = einsum("BTD,FD->BTF", x, leaf)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    bf16 = einsum("BTD,FD->BTF", x, leaf, ops.Policy(compute_dtype="bfloat16"))
    assert bf16.dtype == jnp.float32
    np.testing.assert_allclose(bf16, want, atol=0.02 * np.abs(want).max())


def reference_int8(x: jax.Array, w: np.ndarray) -> np.ndarray:
    """Quantise each row of x to int8, multiply, scale back."""
    x = np.asarray(x, np.float32)
    scale = np.maximum(np.abs(x).max(-1, keepdims=True), 1e-12) / np.float32(127)
    return (np.round(x / scale).astype(np.int64) @ w.astype(np.float64).T) * scale


@pytest.mark.parametrize("name", DYNAMIC)
@pytest.mark.parametrize("rows", [1, 5])
def test_int8_activations_equal_the_reference(name, rows):
    leaf = DYNAMIC[name](normal(OUT, IN))
    x = normal(rows, IN, seed=2)
    want = reference_int8(x, np.asarray(decoded(leaf), np.float64))
    np.testing.assert_allclose(einsum("BD,FD->BF", x, leaf), want, rtol=1e-5, atol=1e-5)
    assert (
        np.abs(want - np.asarray(x) @ np.asarray(decoded(leaf)).T).max() > 1e-3
    )  # rounding is there


def test_int8_codes_and_products_are_exact():
    """Integers in, integers out: the contraction itself rounds nothing, however large its sum."""
    x = (
        jnp.asarray(np.random.default_rng(0).integers(-127, 128, (2, 4096)), jnp.float32)
        .at[:, 0]
        .set(127)
    )
    codes = np.random.default_rng(1).integers(-128, 128, (3, 4096))
    leaf = QTensor.from_codes(
        jnp.asarray(codes, jnp.int32), jnp.ones((3, 1)), bits=8, activations="int8"
    )
    want = np.asarray(x, np.int64) @ codes.T
    np.testing.assert_array_equal(np.asarray(einsum("BD,FD->BF", x, leaf)), want.astype(np.float32))


def test_round_rows():
    x = jnp.asarray([[0.0, 0, 0], [1, -2, 0.5], [127, 1, -127]])
    q, scale = quantize_rows(x)
    assert q.dtype == jnp.int8
    np.testing.assert_array_equal(q, [[0, 0, 0], [64, -127, 32], [127, 1, -127]])
    np.testing.assert_allclose(scale[1:], [[2 / 127], [1]], rtol=1e-6)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["array", "int8", "int4 groups", "sparse", "dynamic"])
def test_a_row_alone_equals_the_row_among_others(name, compute):
    leaf = MAKE[name](normal(OUT, IN))
    policy = ops.Policy(compute_dtype=compute)
    x = normal(5, IN, seed=3)
    many = einsum("BD,FD->BF", x, leaf, policy)
    one = jnp.concatenate([einsum("BD,FD->BF", x[i : i + 1], leaf, policy) for i in range(2)])
    np.testing.assert_allclose(one, many[:2], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(einsum("D,FD->F", x[0], leaf, policy), many[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "policy"), [("bf16", "bfloat16"), ("s8", "float32")])
def test_one_row_in_a_narrow_dtype_is_computed_as_two(dtype, policy):
    leaf = MAKE["dynamic" if dtype == "s8" else "array"](normal(OUT, IN))
    run = jax.jit(lambda x, w: ops.einsum("BD,FD->BF", x, w, ops.Policy(compute_dtype=policy)))
    text = str(jax.make_jaxpr(run)(normal(1, IN), leaf))
    assert "[2,32]" in text
    assert "[2,32]" not in str(jax.make_jaxpr(run)(normal(4, IN), leaf))


@pytest.mark.parametrize("name", ["int8", "int4 groups", "sparse 2:4", "dynamic"])
def test_batch_letters_of_a_compressed_leaf(name):
    leaf = MAKE[name](normal(3, OUT, IN))
    x = normal(3, 4, IN, seed=1)
    layers = [jax.tree.map(lambda a, i=i: a[i], leaf) for i in range(3)]
    want = jnp.stack([einsum("TD,FD->TF", x[i], one) for i, one in enumerate(layers)])
    np.testing.assert_allclose(einsum("ETD,EFD->ETF", x, leaf), want, rtol=1e-5, atol=1e-5)


def test_grouped_letters_of_a_compressed_leaf():
    leaf = quantise(normal(6, IN), 4, group=8)
    x = normal(2, 3, 4, 8, seed=1)
    got = einsum("BTHh,(Kg)(Hh)->BTKg", x, leaf, g=3)
    want = jnp.einsum("BTHh,KgHh->BTKg", x, leaf.decode().reshape(2, 3, 4, 8), precision="highest")
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_policy_chooses_the_dtypes():
    x = normal(4, IN)
    w = normal(OUT, IN, seed=1)
    policy = ops.Policy(compute_dtype="bfloat16", activation_dtype="bfloat16")
    y = ops.einsum("BD,FD->BF", x, w, policy)
    assert y.dtype == jnp.bfloat16
    rounded = [np.asarray(a.astype(jnp.bfloat16).astype(jnp.float32), np.float64) for a in (x, w)]
    np.testing.assert_allclose(
        y.astype(jnp.float32), rounded[0] @ rounded[1].T, rtol=2**-8, atol=1e-3
    )
    # operands are rounded, the sum is not: 512 ones and a small one would lose the small one in
    # bfloat16
    ones = jnp.ones((2, 513)).at[:, 512].set(0.125)
    kept = ops.einsum("BD,FD->BF", ones, jnp.ones((1, 513)), ops.Policy(compute_dtype="bfloat16"))
    np.testing.assert_array_equal(kept, 512.125)
    assert ops.embed(w, jnp.zeros((1, 1), jnp.int32), policy).dtype == jnp.bfloat16
    for make in DYNAMIC.values():  # a bfloat16 stream into int8 rounding
        run = lambda x, w: ops.einsum("BD,FD->BF", x, w, policy)
        narrow = jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)
        assert jax.eval_shape(run, narrow, make(w)).dtype == jnp.bfloat16


@pytest.mark.parametrize("field", ["compute_dtype", "activation_dtype", "cache_dtype", "remat"])
def test_policy_refuses_unknown_names(field):
    with pytest.raises(InputError, match=rf"policy.{field}: 'fulll' is not known; allowed"):
        ops.Policy(**{field: "fulll"})
    assert hash(ops.Policy()) == hash(ops.Policy())


# ---------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", DYNAMIC)
def test_gradients_pass_the_rounding_of_int8_activations(name):
    """As though the contraction were of the decoded weight (the straight-through estimator)."""
    leaf = DYNAMIC[name](normal(OUT, IN))
    x = normal(3, IN, seed=1)
    seed = normal(3, OUT, seed=2)
    run = jax.jit(
        jax.grad(lambda x, seed: jnp.sum(ops.einsum("BD,FD->BF", x, leaf) * seed)),
    )
    got = run(x, seed)
    np.testing.assert_allclose(
        got, np.asarray(seed) @ np.asarray(decoded(leaf)), rtol=1e-4, atol=1e-4
    )
    one = run(x[:1], seed[:1])
    np.testing.assert_allclose(one, got[:1], rtol=1e-5, atol=1e-5)


def test_gradients_of_arrays():
    x = normal(3, 4, IN)
    w = normal(OUT, IN, seed=1)
    seed = normal(3, 4, 2, 3, seed=2)
    ours = jax.grad(lambda x, w: jnp.sum(ops.einsum("BTD,(Hh)D->BTHh", x, w, h=3) * seed), (0, 1))(
        x, w
    )
    plain = lambda x, w: jnp.sum(
        jnp.einsum("BTD,HhD->BTHh", x, w.reshape(2, 3, IN), precision="highest") * seed
    )
    for got, want in zip(ours, jax.grad(plain, (0, 1))(x, w), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------- take


@pytest.mark.parametrize("name", MAKE)
def test_take_is_rows_of_the_decoded_table(name):
    table = MAKE[name](normal(7, IN))
    ids = jnp.asarray([[0, 6, 3], [3, 3, 1]])
    run = jax.jit(lambda table, ids: ops.embed(table, ids))
    got = run(table, ids)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(
        got, np.asarray(decoded(table))[np.asarray(ids)], rtol=1e-6, atol=1e-6
    )
    outside = run(table, jnp.asarray([[-1, 7, 1000]] * 2))
    assert np.all(np.isnan(outside))


def test_take_decodes_the_taken_rows_only():
    table = quantise(normal(1000, IN), 4, group=8)
    text = str(jax.make_jaxpr(lambda t, i: ops.embed(t, i))(table, jnp.zeros((1, 2), jnp.int32)))
    assert f"f32[1000,{IN}]" not in text
    assert "u8[1000,16]" in text


# --------------------------------------------------------------------------------------------- conv


CONVS = [((3, 3), (1, 1), "SAME"), ((3, 2), (2, 1), "VALID"), ((1, 1), (1, 1), "SAME")]


@pytest.mark.parametrize(("kernel", "stride", "padding"), CONVS)
def test_conv_of_an_array_against_lax_and_patches(kernel, stride, padding):
    channels = 4
    x = normal(2, 6, 5, channels)
    w = normal(OUT, channels, *kernel, seed=1)
    flat = w.reshape(OUT, -1)
    want = jax.lax.conv_general_dilated(
        x.transpose(0, 3, 1, 2),
        w,
        stride,
        padding,
        dimension_numbers=("NCHW", "OIHW", "NCHW"),
        precision="highest",
    ).transpose(0, 2, 3, 1)
    arguments = {"kernel": kernel, "stride": stride, "padding": padding}
    np.testing.assert_allclose(conv(x, flat, **arguments), want, rtol=1e-4, atol=1e-5)
    probe = ops.Probe(flat, zeros_for(flat.shape, []))  # contracts patches
    np.testing.assert_allclose(conv(x, probe, **arguments), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["int8", "int4 groups", "sparse 2:4", "dynamic", "dynamic sparse"])
def test_conv_of_a_compressed_leaf(name):
    x = normal(2, 5, 5, 8)
    w = normal(OUT, 8 * 4, seed=1)
    leaf = MAKE[name](w)
    got = conv(x, leaf, kernel=(2, 2), padding="VALID")
    if name.startswith("dynamic"):
        pixels = np.asarray(x)
        patches = np.stack(
            [
                pixels[:, i : i + 2, j : j + 2].transpose(0, 3, 1, 2).reshape(2, -1)
                for i in range(4)
                for j in range(4)
            ],
            1,
        )
        want = reference_int8(patches, np.asarray(decoded(leaf), np.float64)).reshape(2, 4, 4, OUT)
    else:
        want = conv(x, decoded(leaf), kernel=(2, 2), padding="VALID")
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_conv_of_shapes_that_do_not_fit():
    with pytest.raises(
        InputError,
        match=r"conv: the weight \(6, 32\) does not fit 3 channels and a kernel of \(3, 3\)",
    ):
        ops.conv(normal(1, 4, 4, 3), normal(OUT, IN), kernel=(3, 3))
