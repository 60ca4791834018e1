"""Statistics by differentiation against the same sums taken by hand from the inputs of each
contraction.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import ops
from jaxmodel.errors import InputError
from jaxmodel.leaves import QTensor, Sparse
from jaxmodel.ops.probe import histogram, top_share, zeros_for

ALL = ("count", "square", "gram", "histogram", "norms")


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def by_hand(x: jax.Array) -> dict[str, np.ndarray]:
    """The documented statistics of the rows of x, in numpy."""
    rows = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    edges = 2.0 ** (-24 + 0.5 * np.arange(65))
    inside = np.clip(np.abs(rows), edges[0], edges[-1] * (1 - 1e-9))
    return {
        "count": np.float64(len(rows)),
        "taken": np.float64(0),
        "square": (rows**2).sum(0),
        "gram": rows.T @ rows,
        "histogram": np.histogram(inside, edges)[0],
        "norms": norms_by_hand(rows, edges),
    }


def norms_by_hand(rows: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """How many rows are of each size, and the sum of their squares."""
    size = np.clip(np.sqrt((rows**2).mean(-1)), edges[0], edges[-1] * (1 - 1e-9))
    return np.stack([np.histogram(size, edges, weights=w)[0] for w in (None, (rows**2).sum(-1))])


def program(loss, argnums=0):
    """The gradient by one program; without jit it is taken below."""
    return jax.jit(jax.grad(loss, argnums))


def close(got: dict, want: dict) -> None:
    assert set(got) == set(want)
    for name, statistic in want.items():
        np.testing.assert_allclose(got[name], statistic, rtol=1e-4, atol=1e-4, err_msg=name)


def quantise(w: jax.Array, **static) -> QTensor:
    scale = jnp.max(jnp.abs(w), axis=-1, keepdims=True) / 127
    return QTensor.from_codes(jnp.round(w / scale).astype(jnp.int32), scale, bits=8, **static)


# ---------------------------------------------------------------------------------- one contraction


WEIGHTS = {
    "array": lambda w: w,
    "int8": quantise,
    "dynamic": lambda w: quantise(w, activations="int8"),
    "sparse": lambda w: Sparse.from_dense(jnp.where(w > 0, w, 0)),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_statistics_of_one_contraction(kind):
    x = normal(2, 5, 6)
    weight = WEIGHTS[kind](normal(4, 6, seed=1))
    zeros = zeros_for(weight.shape, ALL)

    def loss(zeros):
        y = ops.einsum("BTD,FD->BTF", x, ops.Probe(weight, zeros))
        return jnp.sum(y**2), y

    got, y = jax.jit(jax.grad(loss, has_aux=True))(zeros)
    close(got, by_hand(x))
    np.testing.assert_array_equal(y, jax.jit(lambda: ops.einsum("BTD,FD->BTF", x, weight))())


def test_a_probe_stands_for_its_weight():
    weight = quantise(normal(4, 6))
    probe = ops.Probe(weight, zeros_for(weight.shape, []))
    assert (probe.shape, probe.dtype) == (weight.shape, weight.dtype)
    assert set(probe.zeros) == {"count", "taken"}


@pytest.mark.parametrize("lead", [(), (5,), (4, 5)])
def test_zeros_have_the_leading_axes_of_the_weight(lead):
    zeros = zeros_for((*lead, 2, 3), [*ALL, "tokens"])
    shapes = {
        "count": (),
        "taken": (),
        "square": (3,),
        "gram": (3, 3),
        "histogram": (64,),
        "norms": (2, 64),
        "tokens": (2,),
    }
    assert {name: zero.shape for name, zero in zeros.items()} == {
        name: (*lead, *shape) for name, shape in shapes.items()
    }
    assert set(ops.STATISTICS) == set(shapes)


def test_zeros_for_says_what_is_wrong():
    with pytest.raises(
        InputError, match=r"statistics: 'gramm' is not known; allowed: .*gram.*nearest: gram"
    ):
        zeros_for((2, 3), ["gramm"])
    with pytest.raises(
        InputError, match=r"shape: \(3,\) is not that of a matrix; allowed: \[..., out, in\]"
    ):
        zeros_for((3,), ["gram"])


def test_the_gradients_of_everything_else_are_unchanged():
    x = normal(3, 6)
    w = normal(4, 6, seed=1)
    plain = program(lambda x, w: jnp.sum(jnp.sin(ops.einsum("BD,FD->BF", x, w))), (0, 1))(x, w)

    def probed(x, w, zeros):
        return jnp.sum(jnp.sin(ops.einsum("BD,FD->BF", x, ops.Probe(w, zeros))))

    got = program(probed, (0, 1, 2))(x, w, zeros_for(w.shape, ALL))
    for a, b in zip(got[:2], plain, strict=True):
        np.testing.assert_array_equal(a, b)
    close(got[2], by_hand(x))


def test_the_statistic_does_not_depend_on_the_loss():
    x = normal(3, 6)
    w = normal(4, 6, seed=1)
    for loss in (
        jnp.sum,
        lambda y: 1e6 * jnp.sum(y**3),
        lambda y: 0.0 * jnp.sum(y),
        lambda y: y[0, 0],
    ):
        zeros = zeros_for(w.shape, ALL)
        close(
            program(lambda z, f=loss: f(ops.einsum("BD,FD->BF", x, ops.Probe(w, z))))(zeros),
            by_hand(x),
        )


def test_what_no_gradient_reaches_counts_zero():
    """So that it can be told from a statistic of zeros."""
    x = normal(3, 6)
    w = normal(4, 6, seed=1)
    blocked = lambda z: jnp.sum(jax.lax.stop_gradient(ops.einsum("BD,FD->BF", x, ops.Probe(w, z))))
    assert program(blocked)(zeros_for(w.shape, ALL))["count"] == 0


def test_batch_letters_have_statistics_each():
    x = normal(3, 5, 6)
    w = normal(3, 4, 6, seed=1)
    zeros = zeros_for(w.shape, ALL)
    got = program(lambda z: jnp.sum(ops.einsum("ETD,EFD->ETF", x, ops.Probe(w, z))))(zeros)
    for i in range(3):
        close({name: statistic[i] for name, statistic in got.items()}, by_hand(x[i]))


def test_grouped_input_letters_are_one_axis():
    x = normal(2, 3, 2, 4)
    w = normal(5, 8, seed=1)
    got = program(lambda z: jnp.sum(ops.einsum("BTHh,D(Hh)->BTD", x, ops.Probe(w, z))))(
        zeros_for(w.shape, ALL)
    )
    close(got, by_hand(x.reshape(2, 3, 8)))


def test_statistics_of_a_convolution_are_of_its_patches():
    x = normal(2, 4, 4, 3)
    w = normal(5, 3 * 4, seed=1)
    probed = lambda z: jnp.sum(ops.conv(x, ops.Probe(w, z), kernel=(2, 2), padding="VALID"))
    got = jax.jit(jax.grad(probed))(zeros_for(w.shape, ALL))
    patches = [
        x[:, i : i + 2, j : j + 2].transpose(0, 3, 1, 2).reshape(2, 12)
        for i in range(3)
        for j in range(3)
    ]
    close(got, by_hand(jnp.concatenate(patches)))


# -------------------------------------------------------------------------------------- many layers

L = 3
D = 6


def layers_by_hand(x: jax.Array, weights: list) -> list[dict]:
    """Statistics of each layer of `x -> tanh(W x)`, with the ops one at a time."""
    found = []
    for w in weights:
        found.append(by_hand(x))
        x = jnp.tanh(ops.einsum("BD,FD->BF", x, w))
    return found


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("kind", ["array", "dynamic"])
def test_statistics_of_every_scanned_layer(kind, remat):
    x = normal(4, D)
    w = WEIGHTS[kind](normal(L, D, D, seed=1))

    def loss(zeros):
        def body(x, leaf):
            return jnp.tanh(ops.einsum("BD,FD->BF", x, leaf)), None

        body = jax.checkpoint(body) if remat else body
        return jnp.sum(jax.lax.scan(body, x, ops.Probe(w, zeros))[0])

    got = jax.jit(jax.grad(loss))(zeros_for(w.shape, ALL))
    layers = [jax.tree.map(lambda a, i=i: a[i], w) for i in range(L)]
    for i, want in enumerate(layers_by_hand(x, layers)):
        close({name: statistic[i] for name, statistic in got.items()}, want)


@pytest.mark.parametrize("remat", [False, True])
def test_statistics_of_every_expert_of_every_scanned_layer(remat):
    """Two leading axes: one that scan slices off, one of batch letters."""
    experts = 2
    x = normal(experts, 4, D)
    w = normal(L, experts, D, D, seed=1)

    def loss(zeros):
        body = lambda x, leaf: (jnp.tanh(ops.einsum("END,EFD->ENF", x, leaf)), None)
        return jnp.sum(
            jax.lax.scan(jax.checkpoint(body) if remat else body, x, ops.Probe(w, zeros))[0]
        )

    got = jax.jit(jax.grad(loss))(zeros_for(w.shape, ALL))
    for e in range(experts):
        for i, want in enumerate(layers_by_hand(x[e], list(w[:, e]))):
            close({name: statistic[i, e] for name, statistic in got.items()}, want)


def test_two_batch_letters_have_statistics_each():
    x = normal(2, 3, 5, 6)
    w = normal(2, 3, 4, 6, seed=1)
    got = program(lambda z: jnp.sum(ops.einsum("GETD,GEFD->GETF", x, ops.Probe(w, z))))(
        zeros_for(w.shape, ALL)
    )
    for g, e in np.ndindex(2, 3):
        close({name: statistic[g, e] for name, statistic in got.items()}, by_hand(x[g, e]))


@pytest.mark.parametrize("jit", [False, True])
def test_vmap_over_inputs_is_a_sum(jit):
    """One probe, many inputs: every statistic, the counts too, is that of all of them together."""
    x = normal(5, 2, 3, D)
    w = normal(4, D, seed=1)
    ids = jnp.asarray(np.random.default_rng(2).integers(0, 4, (5, 2, 3)))

    def loss(zeros):
        leaf = ops.Probe(w, zeros)
        y = jax.vmap(jax.vmap(lambda x: ops.einsum("BD,FD->BF", x, leaf)))(x)
        return jnp.sum(y) + jnp.sum(jax.vmap(lambda i: ops.embed(leaf, i))(ids))

    grad = jax.jit(jax.grad(loss)) if jit else jax.grad(loss)
    want = {
        **by_hand(x),
        "taken": np.float64(30),
        "tokens": np.bincount(np.asarray(ids).reshape(-1), minlength=4),
    }
    close(grad(zeros_for(w.shape, [*ALL, "tokens"])), want)


def test_vmap_of_the_gradient_keeps_inputs_apart():
    x = normal(5, 3, D)
    w = normal(4, D, seed=1)
    one = lambda x: program(lambda z: jnp.sum(ops.einsum("BD,FD->BF", x, ops.Probe(w, z))))(
        zeros_for(w.shape, ALL)
    )
    got = jax.vmap(one)(x)
    for i in range(5):
        close({name: statistic[i] for name, statistic in got.items()}, by_hand(x[i]))


def test_counts_do_not_read_the_values():
    x = jnp.asarray([[jnp.nan, 1.0], [jnp.inf, 2.0]])
    got = program(lambda z: jnp.nansum(ops.einsum("BD,FD->BF", x, ops.Probe(normal(3, 2), z))))(
        zeros_for((3, 2), [])
    )
    assert float(got["count"]) == 2


def test_batches_add_up():
    x = normal(6, D)
    w = normal(D, D, seed=1)
    run = jax.jit(jax.grad(lambda z, x: jnp.sum(ops.einsum("BD,FD->BF", x, ops.Probe(w, z)))))
    parts = [run(zeros_for(w.shape, ALL), part) for part in jnp.split(x, 3)]
    close(jax.tree.map(lambda *a: sum(a), *parts), by_hand(x))


def test_a_tied_table_counts_lookups_and_contractions_apart():
    table = normal(7, D)
    ids = jnp.asarray([[0, 3, 3, 6], [1, 3, 0, 0]])

    def loss(zeros, weight):
        leaf = ops.Probe(weight, zeros)
        return jnp.sum(ops.einsum("BTD,VD->BTV", jnp.tanh(ops.embed(leaf, ids)), leaf) ** 2)

    for weight in (table, quantise(table), quantise(table, activations="int8")):
        got = jax.jit(jax.grad(loss))(zeros_for(table.shape, [*ALL, "tokens"]), weight)
        want = by_hand(jnp.tanh(ops.embed(weight, ids)))
        close(
            got,
            {
                **want,
                "taken": np.float64(8),
                "tokens": np.bincount(np.asarray(ids).reshape(-1), minlength=7),
            },
        )


def test_tokens_outside_the_table_count_for_the_row_that_they_take():
    table = normal(4, D)
    ids = jnp.asarray([[-1, 4, 99, 2]])
    got = program(lambda z: jnp.sum(ops.embed(ops.Probe(table, z), ids)))(
        zeros_for(table.shape, ["tokens"])
    )
    np.testing.assert_array_equal(got["tokens"], [1, 0, 1, 2])
    assert (got["taken"], got["count"]) == (4, 0)


def test_histogram_covers_the_line():
    x = jnp.asarray([0.0, 1.0, -1.0, 1.5, 2.0, 1e-30, -1e30, 2.0**-24])
    counts = np.asarray(histogram(x))
    assert counts.sum() == x.size
    assert (counts[0], counts[-1]) == (3, 1)  # 0, 1e-30, 2^-24; 1e30
    assert (counts[48], counts[49], counts[50]) == (
        2,
        1,
        1,
    )  # [1, sqrt 2), [sqrt 2, 2), [2, 2 sqrt 2)


# ------------------------------------------------------------------------------------ eight devices

PROGRAM = """
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    from jaxmodel import ops
    from jaxmodel.leaves import QTensor
    from jaxmodel.ops.probe import zeros_for
    from jaxmodel.sharding import make_mesh

    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((16, 8), (3, 8, 8)))
    scale = jnp.max(jnp.abs(w), axis=-1, keepdims=True) / 127
    codes = QTensor.from_codes(
        jnp.round(w / scale).astype(jnp.int32), scale, bits=8, activations="int8"
    )
    zeros = zeros_for(w.shape, ["square", "gram", "histogram"])


    def statistics(zeros, w, x, policy=ops.Policy()):
        def loss(zeros):
            body = lambda x, leaf: (jnp.tanh(ops.einsum("BD,FD->BF", x, leaf, policy)), None)
            return jnp.sum(jax.lax.scan(body, x, ops.Probe(w, zeros))[0])

        return jax.grad(loss)(zeros)


    alone = {
        kind: jax.jit(statistics)(zeros, leaf, x) for kind, leaf in (("array", w), ("int8", codes))
    }
    gram = np.asarray(x).T @ np.asarray(x)
    np.testing.assert_allclose(alone["array"]["gram"][0], gram, rtol=1e-5, atol=1e-5)


    def compare(name, got, want):
        for key in want:
            np.testing.assert_allclose(
                got[key], want[key], rtol=1e-4, atol=1e-4, err_msg=f"{name} {key}"
            )
        print("equal", name)


    mesh = make_mesh("fsdp=4,tensor=2")
    experts = jnp.asarray(
        rng.normal(size=(4, 16, 8)), jnp.float32
    )  # E N D, one matrix for each of the four


    def of_experts(zeros, w, x):
        return jax.grad(lambda z: jnp.sum(ops.einsum("END,EFD->ENF", x, ops.Probe(w, z))))(zeros)


    matrices = jnp.stack([w[0], w[1], w[2], w[0]])
    each = {name: jnp.zeros((4, *zero.shape[1:])) for name, zero in zeros.items()}
    want = of_experts(each, matrices, experts)
    np.testing.assert_allclose(
        want["gram"], np.einsum("eni,enj->eij", experts, experts), rtol=1e-4, atol=1e-4
    )
    with jax.set_mesh(mesh):
        cut = (
            jax.device_put(a, NamedSharding(mesh, P(*s)))
            for a, s in ((matrices, ("tensor",)), (experts, ("tensor", "fsdp")))
        )
        compare("experts", jax.jit(of_experts)(each, *cut), want)
        on_mesh = jax.jit(lambda z, w, x: statistics(z, w, x, ops.Policy(axes=ops.MESH_AXES)))
        put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
        compare(
            "jit array",
            on_mesh(zeros, put(w, None, "tensor", "fsdp"), put(x, "fsdp")),
            alone["array"],
        )
        specs = codes.specs(P(None, "tensor", "fsdp"), dict(mesh.shape))
        placed = jax.tree.map(
            lambda s, a: put(a, *s), specs, codes, is_leaf=lambda s: isinstance(s, P)
        )
        compare("jit int8", on_mesh(zeros, placed, put(x, "fsdp")), alone["int8"])
        for name, leaf in (("array", w), ("int8", codes)):
            for axes in ("fsdp", ("fsdp", "tensor")):
                manual = jax.shard_map(
                    statistics, mesh=mesh, in_specs=(P(), P(), P(axes)), out_specs=P()
                )
                compare(f"shard_map {name} {axes}", jax.jit(manual)(zeros, leaf, x), alone[name])
"""


def test_statistics_on_a_mesh_equal_those_on_one_device(devices8):
    lines = devices8(PROGRAM).splitlines()
    assert len([line for line in lines if line.startswith("equal")]) == 7


def test_a_cap_shortens_the_longest_rows():
    x = normal(9, 6).at[2].multiply(100.0).at[4].set(0.0)
    w = normal(4, 6, seed=1)
    run = lambda z: jnp.sum(ops.einsum("BD,FD->BF", x, ops.Probe(w, z, cap=2.0)))
    got = program(run)(zeros_for(w.shape, ALL))
    size = np.linalg.norm(np.asarray(x, np.float64), axis=-1)
    limit = 2 * np.median(size[size > 0])
    short = np.asarray(x) * np.minimum(1, limit / np.maximum(size, 1e-9))[:, None]
    want = by_hand(x)  # the histogram, and how long the rows were, are not concerned
    close(got, {**want, "gram": short.T @ short, "square": (short**2).sum(0)})
    assert top_share(np.asarray(got["norms"]), 0.1) == pytest.approx(
        size.max() ** 2 / (size**2).sum(), rel=1e-4
    )
