"""The laws that every compressed leaf keeps: one function for jit, scan, vmap, stacking, naming and
placing.
"""

from __future__ import annotations

import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import tree
from jaxmodel.errors import InputError
from jaxmodel.leaves import (
    Adapted,
    BlockSparse,
    Codebook,
    Compressed,
    QTensor,
    RowPacked,
    Sparse,
    Turned,
    decode,
)
from jaxmodel.leaves.leaf import from_tensors, tensor_names, to_tensors

L = 3
OUT = 4
IN = 24
ENCODE = jax.jit(QTensor.from_codes, static_argnames=("bits", "group", "activations", "form"))
DECODE = jax.jit(decode)
PACK = jax.jit(RowPacked.of)
SLICE = jax.jit(lambda leaf, i: jax.tree.map(lambda a: a[i], leaf))


def qtensor(
    bits: int,
    affine: bool = False,
    scales: str = "row",
    group: int | None = None,
    n: int = IN,
    **static,
) -> QTensor:
    rng = np.random.default_rng(bits)
    shape = (L, 1 if scales == "tensor" else OUT, -(-n // group) if group else 1)
    if static.get("form") == "ternary":
        codes = rng.integers(-1, 2, (L, OUT, n))
    elif static.get("form"):
        codes = rng.integers(0, 120, (L, OUT, n))
    elif affine:
        codes = rng.integers(0, 2**bits, (L, OUT, n))
    elif bits == 1:
        codes = rng.choice([-1, 1], (L, OUT, n))
    else:
        codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (L, OUT, n))
    scale = rng.uniform(0.5, 2, shape).astype(static.pop("dtype", jnp.float32))
    minimum = -scale if affine else None
    return ENCODE(jnp.asarray(codes, jnp.int32), scale, minimum, bits=bits, group=group, **static)


def sparse(
    n: int = IN, pattern: tuple[int, int] | None = None, values: QTensor | None = None
) -> Sparse:
    rng = np.random.default_rng(0)
    m = pattern[1] if pattern else n
    keep = np.argsort(rng.random((L, OUT, n // m, m)), axis=-1) < (
        pattern[0] if pattern else n // 2
    )
    weight = np.where(keep.reshape(L, OUT, n), rng.normal(size=(L, OUT, n)), 0).astype(np.float32)
    leaf = Sparse.from_dense(
        jnp.asarray(weight), jnp.asarray(keep.reshape(L, OUT, n)), pattern=pattern
    )
    return leaf if values is None else dataclasses.replace(leaf, values=values)


def blocks(columns: int) -> BlockSparse:
    rng = np.random.default_rng(0)
    keep = np.argsort(rng.random((L, OUT // 2, columns)), axis=-1) < columns // 2
    weight = rng.normal(size=(L, OUT, 4 * columns)).astype(np.float32)
    return BlockSparse.from_dense(jnp.asarray(weight), jnp.asarray(keep), block=(2, 4))


def codebook(bits: int, rows: int, group: int | None = None, n: int = IN) -> Codebook:
    rng = np.random.default_rng(bits)
    codes = jnp.asarray(rng.integers(0, 2**bits, (L, OUT, n)))
    table = np.sort(rng.normal(size=(L, rows, 2**bits)).astype(np.float32))
    scale = np.full((L, OUT, -(-n // group)), 0.5, np.float16) if group else None
    encode = jax.jit(Codebook.from_codes, static_argnames=("bits", "group"))
    return encode(codes, table, scale, bits=bits, group=group)


def grouped_sparse() -> Sparse:
    """Zeros, and codes whose scale belongs to a group of the dense row."""
    one = jnp.asarray(np.ones((L, OUT, 1), np.float32))
    values = dataclasses.replace(qtensor(4, n=IN // 2), scale=one)
    scale = jnp.asarray(1 + np.arange(L * OUT * 3, dtype=np.float32).reshape(L, OUT, 3))
    leaf = sparse(pattern=(2, 4), values=values)
    return dataclasses.replace(leaf, scale=scale, group=8)


def adapted(base: Compressed) -> Adapted:
    rng = np.random.default_rng(0)
    down, up, scale = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((L, 1, IN), (L, OUT, 1), (L,))
    )
    return Adapted(base, down, up, scale)


def row_packed(leaf: QTensor) -> RowPacked:
    found = PACK(leaf)
    assert found is not None
    return found


MAKE = {
    "int8 rows": lambda: qtensor(8),
    "int8 tensor": lambda: qtensor(8, scales="tensor"),
    "int8 affine": lambda: qtensor(8, affine=True),
    "int8 activations": lambda: qtensor(8, activations="int8"),
    "int4 groups": lambda: qtensor(4, group=8, dtype=jnp.float16),
    "int4 padded": lambda: qtensor(4, group=16, n=21),
    "int3 affine groups": lambda: qtensor(3, affine=True, group=8),
    "int2 padded": lambda: qtensor(2, n=13),
    "int1 tensor": lambda: qtensor(1, scales="tensor"),
    "ternary padded": lambda: qtensor(2, n=13, form="ternary"),
    "ternary groups": lambda: qtensor(2, n=24, group=10, form="ternary"),
    "e4m3 limit": lambda: qtensor(
        8, form="e4m3", activations="e4m3", limit=np.full((L, 1, 1), 3, np.float32)
    ),
    "e5m2 groups": lambda: qtensor(8, form="e5m2", group=8),
    "sparse": lambda: sparse(),
    "sparse padded": lambda: sparse(n=13),
    "sparse 2:4": lambda: sparse(pattern=(2, 4)),
    "sparse int8": lambda: sparse(values=qtensor(8, n=IN // 2, activations="int8")),
    "sparse int4 groups": lambda: sparse(pattern=(2, 4), values=qtensor(4, n=IN // 2, group=4)),
    "sparse int4 dense groups": lambda: grouped_sparse(),
    "codebook": lambda: codebook(4, 1),
    "codebook rows padded": lambda: codebook(3, OUT, n=21),
    "codebook groups": lambda: codebook(2, 1, group=8),
    "sparse codebook": lambda: sparse(values=codebook(4, OUT, n=IN // 2)),
    "row packed int4 groups": lambda: row_packed(qtensor(4, group=16, n=21, dtype=jnp.float16)),
    "row packed int3": lambda: row_packed(qtensor(3, activations="int8")),
    "row packed int2 affine": lambda: row_packed(qtensor(2, affine=True)),
    "turned": lambda: Turned(
        qtensor(8), jnp.asarray(np.full((L, 1, IN), 2, np.float32)), hadamard=12
    ),
    "turned limit": lambda: Turned(qtensor(8), limit=jnp.asarray(np.ones((L, 1, 1), np.float32))),
    "blocks": lambda: blocks(8),
    "blocks padded": lambda: blocks(5),
    "adapted int4": lambda: adapted(qtensor(4, group=8, dtype=jnp.float16)),
}


@functools.cache
def made(name: str) -> Compressed:
    """Return a leaf of the list, which is not made on import: each process of tests does that."""
    return MAKE[name]()


@pytest.fixture(params=MAKE, scope="module")
def leaf(request):
    return made(request.param)


def layer(leaf: Compressed, i: int) -> Compressed:
    return SLICE(leaf, i)


def test_every_leaf_type_stands_in_the_list():
    assert {type(made(name)) for name in MAKE} == set(Compressed.__subclasses__())


def test_describes_itself(leaf):
    leaf.check()
    dense = DECODE(leaf)
    chex.assert_shape(dense, leaf.shape)
    chex.assert_type(dense, leaf.dtype)
    assert leaf.ndim == 3
    assert leaf.size == dense.size == L * layer(leaf, 0).size
    assert (
        leaf.nbytes
        == sum(np.asarray(a).nbytes for a in jax.tree.leaves(leaf))
        == tree.nbytes({"w": leaf})
    )
    assert leaf.bits_per_weight == pytest.approx(8 * leaf.nbytes / dense.size)
    assert tree.count({"w": leaf}) == dense.size
    assert leaf.nbytes < dense.nbytes
    assert layer(leaf, 1).shape == leaf.shape[1:]


def test_jit_scan_and_vmap_equal_a_loop_over_layers(leaf):
    def run(leaf):
        body = lambda carry, one: (carry + 1, decode(one))
        return leaf.decode(), jax.lax.scan(body, 0, leaf)[1], jax.vmap(decode)(leaf)

    whole, scanned, mapped = jax.jit(run)(leaf)
    loop = np.stack([DECODE(layer(leaf, i)) for i in range(L)])
    for got in (whole, scanned, mapped):
        chex.assert_trees_all_close(
            got, loop, rtol=1e-6, atol=1e-6, strict=True
        )  # XLA may fuse multiply and add
    chex.assert_trees_all_equal(DECODE(leaf), loop, strict=True)


def test_it_is_traced_once_for_all_layers(leaf):
    """Its static fields are equal in all layers, and hash: no layer compiles anew."""
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(one):
        return one.decode()

    chex.assert_tree_all_finite([run(layer(leaf, i)) for i in range(L)])


def test_abstract_evaluation_knows_the_shape(leaf):
    shapes = jax.eval_shape(lambda leaf: leaf, leaf)
    assert shapes.shape == leaf.shape
    assert shapes.nbytes == leaf.nbytes
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, leaf)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(decode, leaf), DECODE(leaf))


def test_stack_and_unstack(leaf):
    stacked = {"blocks": {"0-2": {"w": leaf}}}
    single = tree.unstack(stacked)
    assert list(tree.flatten(single)) == ["blocks/0/w", "blocks/1/w", "blocks/2/w"]
    for i in range(L):
        one = single["blocks"][str(i)]["w"]
        one.check()
        chex.assert_trees_all_equal(one, layer(leaf, i), strict=True)
    chex.assert_trees_all_equal(tree.stack(single), stacked, strict=True)
    assert tree.fingerprint(single) == tree.fingerprint(stacked)


def test_names_of_its_tensors_and_back(leaf):
    tensors, fields = to_tensors(leaf)
    assert list(tensors) == tensor_names(fields)
    assert sorted(id(a) for a in tensors.values()) == sorted(id(a) for a in jax.tree.leaves(leaf))
    fields = json.loads(json.dumps(fields))  # what stands on disk
    back = from_tensors({name: np.asarray(a) for name, a in tensors.items()}, fields)
    chex.assert_trees_all_equal(back, leaf, strict=True)


def test_a_missing_tensor_is_an_error(leaf):
    tensors, fields = to_tensors(leaf)
    for name in tensors:
        rest = {key: a for key, a in tensors.items() if key != name}
        inner = name.removeprefix("values_").removeprefix("base_")
        with pytest.raises(InputError, match=f"the tensor {inner!r} is missing"):
            from_tensors(rest, fields)


def test_device_put_keeps_the_leaf(leaf):
    device = jax.devices()[0]
    moved = jax.device_put(leaf, device)
    chex.assert_tree_is_on_device(moved, device=device)
    shardings = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(device), leaf)
    chex.assert_trees_all_equal(moved, jax.device_put(leaf, shardings), leaf, strict=True)


def test_other_static_fields_are_another_structure(leaf):
    """So that jit compiles again and `tree.stack` does not join."""
    assert hash(jax.tree.structure(leaf)) == hash(jax.tree.structure(layer(leaf, 0)))
    padded = lambda one: dataclasses.replace(one, pad=one.pad + 1)
    other = (
        dataclasses.replace(leaf, base=padded(leaf.base))
        if isinstance(leaf, Adapted | Turned)
        else padded(leaf)
    )
    assert jax.tree.structure(other) != jax.tree.structure(leaf)
    assert list(
        tree.stack({"blocks": {"0": {"w": layer(leaf, 0)}, "1": {"w": layer(other, 1)}}})["blocks"]
    ) == ["0", "1"]
    assert list(
        tree.stack({"blocks": {"0": {"w": layer(leaf, 0)}, "1": {"w": layer(leaf, 1)}}})["blocks"]
    ) == ["0-1"]


# -------------------------------------------------------------------------- what is no leaf of ours


def test_a_plain_array_has_one_nameless_tensor():
    array = jnp.ones(3)
    tensors, fields = to_tensors(array)
    assert tensors == {"": array}
    assert fields is None
    assert tensor_names(fields) == [""]
    assert from_tensors(tensors, fields) is array
    assert decode(array) is array
    assert decode(array, jnp.bfloat16).dtype == jnp.bfloat16


def test_an_unknown_type_names_those_that_are_known():
    with pytest.raises(
        InputError,
        match=r"leaf type: 'QTensr' is not known; allowed: Adapted, BlockSparse, Codebook, "
        r"QTensor, RowPacked, Sparse, Turned \(nearest: QTensor",
    ):
        from_tensors({}, {"type": "QTensr"})


def test_broken_arrays_are_refused():
    tensors, fields = to_tensors(made("int4 groups"))
    with pytest.raises(InputError, match="3 groups do not divide|scale has shape"):
        from_tensors({**tensors, "scale": tensors["scale"][:, :2]}, fields)
    with pytest.raises(InputError, match="bits is 12"):
        from_tensors(tensors, {**fields, "bits": 12})
