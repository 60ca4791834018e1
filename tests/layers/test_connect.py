"""Connection patterns: each layer equals its list of edges, forward and backward, and keeps what it promises."""

from __future__ import annotations

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodel import ops, tree
from jaxmodel.errors import InputError
from jaxmodel.layers import connect
from jaxmodel.leaves import BlockSparse, QTensor
from jaxmodel.ops.edges import EdgeBlock, edges_of

POLICY = ops.Policy()
PATTERN = (("a", "x"), ("b", "x"), ("b", "y"), ("c", "y"), ("c", "z"))
WIDTHS = (("x", 3), ("y", 2), ("z", 4))


def branches(**widths: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=(5, n)), jnp.float32) for name, n in widths.items()}


def fill(params, seed=1):
    """Parameters that are not zero anywhere, of the size that keeps results near one."""
    rng = np.random.default_rng(seed)
    fresh = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / leaf.shape[-1] ** 0.5, jnp.float32)
    return tree.map_leaves(lambda _, leaf: fresh(leaf), params)


def one(xs: dict[str, jax.Array]) -> jax.Array:
    return jnp.concatenate(list(xs.values()), axis=1)


THREE = branches(a=4, b=6, c=5)
EQUAL = branches(a=4, b=4, c=4)


def groups(**kwargs) -> connect.Groups:
    return connect.Groups(PATTERN, WIDTHS, POLICY, **kwargs)


# name -> the module, its arguments, its result as one array, its edges from its params
CASES = {
    "full": (connect.Full(7, POLICY), (one(THREE),), None, lambda m, p: m.edges(p)),
    "full without bias": (connect.Full(7, POLICY, bias=False), (one(THREE),), None, lambda m, p: m.edges(p)),
    "bilinear": (connect.Bilinear(7, POLICY), (THREE["a"], THREE["b"]), None, lambda m, p: m.edges(p)),
    "factorised": (connect.Factorised(7, 3, POLICY), (THREE,), None, lambda m, p: m.edges(p, "abc")),
    "groups": (groups(), (THREE,), one, lambda m, p: m.edges(p, "abc")),
    "a group for each branch": (
        connect.Groups((("a", "x"), ("b", "y"), ("c", "y")), (("x", 3), ("y", 2)), POLICY),
        (THREE,),
        one,
        lambda m, p: m.edges(p, "abc"),
    ),
    "products of groups": (groups(combine="product", importance=True), (THREE,), one, lambda m, p: m.edges(p, "abc")),
    "importance and sharing": (
        groups(importance=True, share=(("[bc]->y", "pair"), ("c->z", "z")), combine="sum"),
        (EQUAL,),
        one,
        lambda m, p: m.edges(p, "abc"),
    ),
    "shared": (connect.Shared(connect.Full(3, POLICY)), (EQUAL,), one, lambda m, p: m.edges(p, 3)),
    "blocks": (connect.BlockLinear(8, (2, 4), 2, POLICY), (branches(a=16)["a"], 1), None, lambda m, p: m.edges(p, 1, 16)),
    "learnt blocks": (connect.BlockLinear(8, (2, 4), 2, POLICY, True), (branches(a=16)["a"],), None, lambda m, p: m.edges(p)),
}


def make(name):
    module, args, join, edges = CASES[name]
    params = fill(dict(module.init(jax.random.key(0), *args)["params"]))
    run = lambda params, args: (join or (lambda y: y))(module.apply({"params": params}, *args))
    flat = lambda args: one(args[0]) if isinstance(args[0], dict) else jnp.concatenate([a for a in args if jnp.ndim(a)], axis=1)
    listed = lambda params, args: ops.edge_sum(flat(args), edges(module, params))
    return params, args, run, listed


@pytest.mark.parametrize("name", CASES)
def test_equals_gather_and_segment_sum(name):
    params, args, run, listed = make(name)
    want = jax.jit(lambda p: listed(p, args))(params) if "learnt" not in name else listed(params, args)
    got = jax.jit(lambda p: run(p, args))(params)
    assert np.abs(want).max() > 0.5
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_those_of_the_list(name):
    params, args, run, listed = make(name)
    loss = lambda f: lambda p: jnp.sum(jnp.sin(f(p, args)))
    got, want = (jax.grad(loss(f))(params) for f in (run, listed))
    if "scores" in got:  # the list has no edges that are not chosen, so it has no gradient for choosing them
        assert np.abs(got.pop("scores")).max() > 0.01 and not np.any(want.pop("scores"))
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=2e-6)


# ------------------------------------------------------------------------------------------------------ lists of edges


def test_an_edge_list_against_a_loop():
    rng = np.random.default_rng(0)
    x, w, v, b = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 5), (2, 2, 3), (2, 4), 4))
    blocks = [EdgeBlock(jnp.asarray(w), (0, 2), 1), EdgeBlock(jnp.asarray(v), (1,)), EdgeBlock(jnp.asarray(b))]
    want = np.zeros((3, 4))
    for o, i, j in itertools.product(range(2), range(2), range(3)):
        want[:, o + 1] += w[o, i, j] * x[:, i] * x[:, j + 2]
    for o, i in itertools.product(range(2), range(4)):
        want[:, o] += v[o, i] * x[:, i + 1]
    edges = edges_of(blocks, 5, 4)
    assert edges.sources.shape == (12 + 8 + 4, 2)
    np.testing.assert_allclose(ops.edge_sum(jnp.asarray(x), edges), want + b, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jit(ops.edge_sum)(jnp.asarray(x), edges), want + b, rtol=1e-5, atol=1e-6)


def test_edges_outside_are_refused():
    with pytest.raises(InputError, match="sources: 2 to 4 given; allowed: 0 to 3"):
        edges_of([EdgeBlock(jnp.ones((1, 3)), (2,))], 3, 1)
    with pytest.raises(InputError, match="targets: 1 to 2 given; allowed: 0 to 1"):
        edges_of([EdgeBlock(jnp.ones((2, 3)), (0,), 1)], 3, 2)
    with pytest.raises(InputError, match="has 4 features; the edges are of 3"):
        ops.edge_sum(jnp.ones((1, 4)), edges_of([EdgeBlock(jnp.ones((1, 3)), (0,))], 3, 1))


# --------------------------------------------------------------------------------------------------------- second order


def test_factorised_with_one_hot_branches_is_a_factorisation_machine():
    """`sum over i < j of <v_i, v_j>` of what is set (Rendle, 2010), with P a row of ones."""
    rng = np.random.default_rng(0)
    params = {f"factor_{n}": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32) for n in "abc"}
    params["out"] = jnp.ones((1, 3))
    ids = {"a": 1, "b": 0, "c": 3}
    xs = {name: jax.nn.one_hot(jnp.asarray([i]), 4) for name, i in ids.items()}
    vectors = [np.asarray(params[f"factor_{name}"])[:, i] for name, i in ids.items()]
    want = sum(a @ b for a, b in itertools.combinations(vectors, 2))
    got = connect.Factorised(1, 3, POLICY).apply({"params": params}, xs)
    np.testing.assert_allclose(got, [[want]], rtol=1e-5)


def test_bilinear_is_the_triple_sum():
    x, z = THREE["a"], THREE["b"]
    module = connect.Bilinear(7, POLICY)
    params = module.init(jax.random.key(0), x, z)["params"]
    want = jnp.einsum("dij,bi,bj->bd", params["pairs"].reshape(7, 4, 6), x, z, precision="highest")
    np.testing.assert_allclose(module.apply({"params": params}, x, z), want, rtol=1e-5, atol=1e-6)


def test_a_product_needs_two_branches():
    with pytest.raises(InputError, match=r"branches: \['a'\] given; at least two"):
        connect.Factorised(2, 2, POLICY).init(jax.random.key(0), {"a": jnp.ones((1, 2))})


# --------------------------------------------------------------------------------------------- sharing and importance


def test_shared_edges_count_once_and_stay_equal_in_training():
    """Each edge has the gradient of its own use; the shared leaf has their sum, and after steps all its edges are it."""
    share = (("[bc]->y", "pair"),)
    tied, loose = groups(share=share), groups()
    params = fill(dict(tied.init(jax.random.key(0), EQUAL)["params"]))
    apart = {name: params[tied_name] for name, tied_name in connect.weight_names(PATTERN, share).items()}
    apart |= {name: leaf for name, leaf in params.items() if name.endswith("_bias")}
    assert tree.count(apart) - tree.count(params) == 2 * 4  # y is two wide, a branch four

    loss = lambda module: lambda p: jnp.sum(one(module.apply({"params": p}, EQUAL)) ** 2)
    both, each = jax.grad(loss(tied))(params), jax.grad(loss(loose))(apart)
    np.testing.assert_allclose(both["pair"], each["b->y"] + each["c->y"], rtol=1e-5, atol=1e-5)

    optimizer = optax.adam(1e-2)
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = optimizer.update(jax.grad(loss(tied))(params), state, params)
        params = optax.apply_updates(params, updates)
    edges = tied.edges(params, "abc")
    of = lambda source: edges.weights[(edges.sources[:, 0] // 4 == source) & (edges.targets >= 3) & (edges.targets < 5)]
    np.testing.assert_array_equal(of(1), of(2))


def test_edges_of_different_shapes_cannot_share():
    with pytest.raises(InputError, match=r"share: the edge c->y needs a weight \[2, 5\]; the one that it shares is \[2, 6\]"):
        groups(share=(("[bc]->y", "pair"),)).init(jax.random.key(0), THREE)
    with pytest.raises(InputError, match="'q->.*' matches no leaf"):
        connect.weight_names(PATTERN, (("q->.*", "q"),))


def test_importance_finds_the_edges_that_matter():
    """Of three branches one decides the target; a small L1 norm of the factors takes the others away."""
    pattern = tuple((name, "y") for name in "abc")
    module = connect.Groups(pattern, (("y", 1),), POLICY, importance=True)
    rng = np.random.default_rng(0)
    xs = {name: jnp.asarray(rng.normal(size=(64, 4)), jnp.float32) for name in "abc"}
    target = jnp.sum(xs["b"], axis=1, keepdims=True)
    params = dict(module.init(jax.random.key(0), xs)["params"])
    before = connect.importances(params, pattern)
    assert sum(before.values()) == pytest.approx(1) and max(before.values()) < 0.6
    optimizer = optax.adam(3e-2)

    @jax.jit
    def train(params):
        def loss(p):
            error = jnp.mean((module.apply({"params": p}, xs)["y"] - target) ** 2)
            return error + 0.02 * sum(jnp.linalg.norm(p[f"{n}->y"]) for n in "abc") + 0.02 * jnp.sum(jnp.abs(p["importance"]))

        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), None, 300)[0][0]

    after = connect.importances(train(params), pattern)
    assert list(after) == ["a->y", "b->y", "c->y"]
    assert after["b->y"] > 0.95


def test_importance_does_not_depend_on_how_an_edge_is_split_into_factor_and_weight():
    module = groups(importance=True)
    params = fill(dict(module.init(jax.random.key(0), THREE)["params"]))
    moved = {**params, "importance": params["importance"].at[1].mul(-4.0), "b->x": params["b->x"] / -4}
    chex.assert_trees_all_close(connect.importances(moved, PATTERN), connect.importances(params, PATTERN), rtol=1e-5)
    chex.assert_trees_all_close(*(module.apply({"params": p}, THREE) for p in (moved, params)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ((("a", "x"), ("b", "x"), ("d", "x")), "group of inputs: 'd' is not known"),
        ((("a", "x"), ("b", "x"), ("c", "w")), "group of outputs: 'w' is not known"),
        ((("a", "x"), ("a", "x"), ("b", "x"), ("c", "x")), "each edge once"),
        ((("a", "x"), ("b", "x")), "the group 'c' has none"),
    ],
)
def test_patterns_that_are_refused(pattern, message):
    with pytest.raises(InputError, match=message):
        connect.Groups(pattern, (("x", 2),), POLICY).init(jax.random.key(0), THREE)


# --------------------------------------------------------------------------------------------------- a shared extractor


@pytest.mark.parametrize(("how", "function"), [("sum", np.sum), ("mean", np.mean), ("max", np.max)])
def test_a_shared_extractor_merged(how, function):
    module = connect.Shared(connect.Full(3, POLICY))
    params = module.init(jax.random.key(0), EQUAL)["params"]
    assert tree.count(params) == 3 * 4 + 3  # once, for three branches
    found = module.apply({"params": params}, EQUAL)
    weight, bias = (np.asarray(params["extractor"][name]) for name in ("weight", "weight_bias"))
    each = [np.asarray(EQUAL[name]) @ weight.T + bias for name in "abc"]
    np.testing.assert_allclose(connect.merged(found, how), function(np.stack(each), axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(connect.merged(found), np.concatenate(each, axis=1), rtol=1e-5, atol=1e-6)


def test_what_a_shared_extractor_refuses():
    with pytest.raises(InputError, match="branches: a 4, b 6, c 5 features given"):
        connect.Shared(connect.Full(3, POLICY)).init(jax.random.key(0), THREE)
    with pytest.raises(InputError, match="merge: 'avg' is not known"):
        connect.merged(EQUAL, "avg")
    with pytest.raises(InputError, match="merge: 'sum' given for branches of several widths"):
        connect.merged(THREE, "sum")


# --------------------------------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize(("rows", "columns", "kept"), [(4, 8, 2), (16, 5, 2), (3, 3, 3), (1, 7, 1)])
def test_a_fixed_mask_uses_every_column_as_often(rows, columns, kept):
    places = connect.block_columns(rows, columns, kept, seed=3)
    assert all(len(set(row)) == kept for row in places.tolist())
    counts = np.bincount(places.reshape(-1), minlength=columns)
    assert counts.max() - counts.min() <= 1
    np.testing.assert_array_equal(places, connect.block_columns(rows, columns, kept, seed=3))
    if kept < columns and rows > 1:
        assert (places != connect.block_columns(rows, columns, kept, seed=4)).any()


@pytest.mark.parametrize("learnt", [False, True])
def test_settled_blocks_are_the_same_function(learnt):
    x = branches(a=16)["a"]
    module = connect.BlockLinear(8, (2, 4), 2, POLICY, learnt)
    params = fill(dict(module.init(jax.random.key(0), x)["params"]))
    settled = connect.settle_blocks(module, params, 0, 16)
    assert isinstance(settled["weight"], BlockSparse) and settled["weight"].values.shape == (4, 2, 2, 4)
    assert float(jnp.mean(settled["weight"].keep())) == 0.5
    run = lambda p: module.apply({"params": p}, x)
    np.testing.assert_allclose(run(settled), run(params), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(ops.edge_sum(x, module.edges(settled)), run(params), rtol=1e-6, atol=1e-6)


def test_a_mask_is_learnt():
    """The target reads one block of inputs for each row of blocks; the scores find them, from a choice that is wrong."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(256, 16)), jnp.float32)
    wanted = np.array([1, 3])
    weight = np.zeros((4, 16), np.float32)
    for row, column in enumerate(wanted):
        weight[2 * row : 2 * row + 2, 4 * column : 4 * column + 4] = rng.normal(size=(2, 4))
    target = x @ jnp.asarray(weight).T
    module = connect.BlockLinear(4, (2, 4), 1, POLICY, True)
    params = dict(module.init(jax.random.key(0), x)["params"])
    params["scores"] = jnp.asarray([0.1, 0, 0, 0, 0, 0.1, 0, 0])
    optimizer = optax.adam(2e-2)
    loss = lambda p: jnp.mean((module.apply({"params": p}, x) - target) ** 2)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    trained = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), None, 400)[0][0])(params)
    np.testing.assert_array_equal(jnp.argmax(trained["scores"].reshape(2, 4), axis=1), wanted)
    assert float(loss(trained)) < 0.01 * float(loss(params))
    settled = connect.settle_blocks(module, trained)
    np.testing.assert_allclose(settled["weight"].decode(), weight, atol=0.05)


def test_blocks_that_do_not_fit_are_refused():
    for block, kept in (((3, 4), 1), ((2, 5), 1), ((2, 4), 5)):
        with pytest.raises(InputError, match="block, kept: .* given; divisors of 8 and 16"):
            connect.BlockLinear(8, block, kept, POLICY).init(jax.random.key(0), jnp.ones((1, 16)))
    params = connect.BlockLinear(8, (2, 4), 2, POLICY).init(jax.random.key(0), jnp.ones((1, 16)))["params"]
    with pytest.raises(InputError, match="features: None given"):
        connect.settle_blocks(connect.BlockLinear(8, (2, 4), 2, POLICY), dict(params))


def test_kept_blocks_may_be_compressed():
    x = branches(a=16)["a"]
    module = connect.BlockLinear(8, (2, 4), 2, POLICY)
    params = fill(dict(module.init(jax.random.key(0), x)["params"]))
    scale = jnp.max(jnp.abs(params["kept"]), axis=-1, keepdims=True) / 127
    codes = QTensor.from_codes(jnp.round(params["kept"] / scale).astype(jnp.int32), scale, bits=8)
    got, want = (module.apply({"params": {**params, "kept": leaf}}, x) for leaf in (codes, codes.decode()))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
