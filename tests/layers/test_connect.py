"""Connection patterns: each layer equals its list of edges, forward and backward, and keeps what it
promises.
"""

from __future__ import annotations

import dataclasses
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
from jaxmodel.layers.connect.full import by_name
from jaxmodel.layers.connect.groups import weight_names
from jaxmodel.layers.connect.sparse import block_columns
from jaxmodel.leaves import BlockSparse, QTensor
from jaxmodel.ops.edges import EdgeBlock, edge_sum, edges_of
from jaxmodel.ops.probe import zeros_for

POLICY = ops.Policy()
PATTERN = (("a", "x"), ("b", "x"), ("b", "y"), ("c", "y"), ("c", "z"))
WIDTHS = (("x", 3), ("y", 2), ("z", 4))


def branches(**widths: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=(5, n)), jnp.float32) for name, n in widths.items()}


def fill(module, *args, seed=1):
    """Parameters of a module that are not zero anywhere, of the size that keeps results
    near one.
    """
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args))["params"]
    fresh = lambda leaf: jnp.asarray(
        rng.normal(size=leaf.shape) / leaf.shape[-1] ** 0.5, jnp.float32
    )
    return tree.map_leaves(lambda _, leaf: fresh(leaf), dict(shapes))


def one(xs: dict[str, jax.Array]) -> jax.Array:
    return jnp.concatenate([xs[name] for name in sorted(xs)], axis=1)


def run(module, params, *args):
    return jax.jit(lambda params: module.apply({"params": params}, *args))(params)


THREE = branches(a=4, b=6, c=5)
EQUAL = branches(a=4, b=4, c=4)


def groups(**kwargs) -> connect.Groups:
    return connect.Groups(PATTERN, WIDTHS, POLICY, **kwargs)


edges_of_all = lambda m, p: m.edges(p)

# name -> the module, its arguments, its result as one array, its edges from its params
CASES = {
    "full": (connect.Full(7, POLICY), (one(THREE),), None, edges_of_all),
    "full without bias": (connect.Full(7, POLICY, bias=False), (one(THREE),), None, edges_of_all),
    "bilinear": (connect.Bilinear(7, POLICY), (THREE["a"], THREE["b"]), None, edges_of_all),
    "factorised": (connect.Factorised(7, 3, POLICY), (THREE,), None, edges_of_all),
    "groups": (groups(), (THREE,), one, edges_of_all),
    "a group for each branch": (
        connect.Groups((("a", "x"), ("b", "y"), ("c", "y")), (("x", 3), ("y", 2)), POLICY),
        (THREE,),
        one,
        edges_of_all,
    ),
    "names in another order": (
        connect.Groups(PATTERN[::-1], WIDTHS[::-1], POLICY, importance=True),
        (dict(reversed(THREE.items())),),
        one,
        edges_of_all,
    ),
    "products of groups": (groups(combine="product", importance=True), (THREE,), one, edges_of_all),
    "importance and sharing": (
        groups(importance=True, share=(("[bc]->y", "pair"), ("c->z", "z")), combine="sum"),
        (EQUAL,),
        one,
        edges_of_all,
    ),
    "shared": (connect.Shared(connect.Full(3, POLICY)), (EQUAL,), one, lambda m, p: m.edges(p, 3)),
    "blocks": (
        connect.BlockLinear(8, (2, 4), 2, POLICY),
        (branches(a=16)["a"], 1),
        None,
        lambda m, p: m.edges(p, 1, 16),
    ),
    "learnt blocks": (
        connect.BlockLinear(8, (2, 4), 2, POLICY, True),
        (branches(a=16)["a"],),
        None,
        edges_of_all,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_gather_and_segment_sum_forward_and_backward(name):
    module, args, join, edges = CASES[name]
    params = fill(module, *args)
    x = (
        one(args[0])
        if isinstance(args[0], dict)
        else jnp.concatenate([a for a in args if jnp.ndim(a)], axis=1)
    )
    layer = lambda params: (join or (lambda y: y))(module.apply({"params": params}, *args))
    listed = lambda params: edge_sum(x, edges(module, params))

    def result(f):
        def loss(params):
            y = f(params)
            return jnp.sum(jnp.sin(y)), y

        return jax.grad(loss, has_aux=True)

    got_grads, got = jax.jit(result(layer))(params)
    of_list = (
        result(listed) if name == "learnt blocks" else jax.jit(result(listed))
    )  # its list depends on the scores' values
    want_grads, want = of_list(params)
    assert np.abs(want).max() > 0.5
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    if (
        "scores" in got_grads
    ):  # the list has no edges that are not chosen, so it has no gradient for choosing them
        assert np.abs(got_grads.pop("scores")).max() > 0.01 and not np.any(want_grads.pop("scores"))
    chex.assert_trees_all_close(got_grads, want_grads, rtol=1e-5, atol=2e-6)


def test_branches_stand_in_the_order_of_their_names_in_jit_and_outside():
    """JAX sorts the keys of a dict on its way into a compiled function; nobody may be surprised by
    that.
    """
    xs = {"b": jnp.asarray([[2.0]]), "a": jnp.asarray([[1.0]])}
    assert connect.merged(xs).tolist() == jax.jit(connect.merged)(xs).tolist() == [[1.0, 2.0]]


# ----------------------------------------------------------------------------------- lists of edges


def test_an_edge_list_against_a_loop():
    rng = np.random.default_rng(0)
    x, w, v, b = (
        rng.normal(size=shape).astype(np.float32) for shape in ((3, 5), (2, 2, 3), (2, 4), 4)
    )
    blocks = [
        EdgeBlock(jnp.asarray(w), (0, 2), 1),
        EdgeBlock(jnp.asarray(v), (1,)),
        EdgeBlock(jnp.asarray(b)),
    ]
    want = np.zeros((3, 4))
    for o, i, j in itertools.product(range(2), range(2), range(3)):
        want[:, o + 1] += w[o, i, j] * x[:, i] * x[:, j + 2]
    for o, i in itertools.product(range(2), range(4)):
        want[:, o] += v[o, i] * x[:, i + 1]
    edges = edges_of(blocks, 5, 4)
    assert edges.sources.shape == (12 + 8 + 4, 2)
    np.testing.assert_allclose(edge_sum(jnp.asarray(x), edges), want + b, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        jax.jit(edge_sum)(jnp.asarray(x), edges), want + b, rtol=1e-5, atol=1e-6
    )


def test_edges_outside_are_refused():
    with pytest.raises(InputError, match="sources: 2 to 4 given; allowed: 0 to 3"):
        edges_of([EdgeBlock(jnp.ones((1, 3)), (2,))], 3, 1)
    with pytest.raises(InputError, match="targets: 1 to 2 given; allowed: 0 to 1"):
        edges_of([EdgeBlock(jnp.ones((2, 3)), (0,), 1)], 3, 2)
    with pytest.raises(InputError, match="has 4 features; the edges have 3"):
        edge_sum(jnp.ones((1, 4)), edges_of([EdgeBlock(jnp.ones((1, 3)), (0,))], 3, 1))


# ------------------------------------------------------------------------------------- second order


def test_factorised_with_one_hot_branches_is_a_factorisation_machine():
    """`sum over i < j of <v_i, v_j>` of what is set (Rendle, 2010), with P a row of ones."""
    rng = np.random.default_rng(0)
    params = {f"factor_{n}": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32) for n in "abc"}
    params["out"] = jnp.ones((1, 3))
    ids = {"a": 1, "b": 0, "c": 3}
    xs = {name: jax.nn.one_hot(jnp.asarray([i]), 4) for name, i in ids.items()}
    vectors = [np.asarray(params[f"factor_{name}"])[:, i] for name, i in ids.items()]
    want = sum(a @ b for a, b in itertools.combinations(vectors, 2))
    got = run(connect.Factorised(1, 3, POLICY), params, xs)
    np.testing.assert_allclose(got, [[want]], rtol=1e-5)


def test_bilinear_is_the_triple_sum():
    x = THREE["a"]
    z = THREE["b"]
    module = connect.Bilinear(7, POLICY)
    params = fill(module, x, z)
    want = np.einsum("dij,bi,bj->bd", np.asarray(params["pairs"]).reshape(7, 4, 6), x, z)
    np.testing.assert_allclose(run(module, params, x, z), want, rtol=1e-5, atol=1e-6)


def test_a_product_needs_two_branches():
    with pytest.raises(InputError, match=r"branches: \['a'\] given; allowed: at least two"):
        connect.Factorised(2, 2, POLICY).init(jax.random.key(0), {"a": jnp.ones((1, 2))})


# --------------------------------------------------------------------------- sharing and importance


def test_shared_edges_count_once_and_stay_equal_in_training():
    """Each edge has the gradient of its own use; the shared leaf has their sum, and after steps all
    its edges are it.
    """
    share = (("[bc]->y", "pair"),)
    tied = groups(share=share)
    loose = groups()
    params = fill(tied, EQUAL)
    apart = {name: params[tied_name] for name, tied_name in weight_names(PATTERN, share).items()}
    apart |= {name: leaf for name, leaf in params.items() if name.endswith("_bias")}
    assert tree.count(apart) - tree.count(params) == 2 * 4  # y is two wide, a branch four

    loss = lambda module: lambda p: jnp.sum(one(module.apply({"params": p}, EQUAL)) ** 2)
    both = jax.jit(jax.grad(loss(tied)))(params)
    each = jax.jit(jax.grad(loss(loose)))(apart)
    np.testing.assert_allclose(both["pair"], each["b->y"] + each["c->y"], rtol=1e-5, atol=1e-5)
    optimizer = optax.adam(1e-2)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss(tied))(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def trained(params):
        params, _ = jax.lax.scan(step, (params, optimizer.init(params)), None, 3)[0]
        return tied.edges(params).weights

    edges = dataclasses.replace(tied.edges(params), weights=np.asarray(trained(params)))
    assert np.abs(edges.weights - tied.edges(params).weights).max() > 1e-3
    of = lambda source: edges.weights[
        (edges.sources[:, 0] // 4 == source) & (edges.targets >= 3) & (edges.targets < 5)
    ]
    np.testing.assert_array_equal(of(1), of(2))


def test_edges_of_different_shapes_cannot_share():
    with pytest.raises(
        InputError,
        match=r"share: the edge c->y needs a weight \[2, 5\]; the shared one is \[2, 6\]",
    ):
        groups(share=(("[bc]->y", "pair"),)).init(jax.random.key(0), THREE)
    with pytest.raises(InputError, match="'q->.*' matches no leaf"):
        weight_names(PATTERN, (("q->.*", "q"),))
    for name in ("importance", "x_bias", "a/b"):
        with pytest.raises(
            InputError,
            match=f"share: '{name}' given; allowed: a name without '/' other than importance",
        ):
            weight_names(PATTERN, (("a->x", name),))


def test_importance_finds_the_edges_that_matter():
    """Of three branches one decides the target; a small L1 norm of the factors takes the others
    away.
    """
    pattern = tuple((name, "y") for name in "abc")
    module = connect.Groups(pattern, (("y", 1),), POLICY, importance=True)
    rng = np.random.default_rng(0)
    xs = {name: jnp.asarray(rng.normal(size=(64, 4)), jnp.float32) for name in "abc"}
    target = jnp.sum(xs["b"], axis=1, keepdims=True)
    params = dict(jax.jit(module.init)(jax.random.key(0), xs)["params"])
    before = module.importances(params)
    assert sum(before.values()) == pytest.approx(1) and max(before.values()) < 0.6
    optimizer = optax.adam(3e-2)

    @jax.jit
    def train(params):
        def loss(p):
            error = jnp.mean((module.apply({"params": p}, xs)["y"] - target) ** 2)
            return (
                error
                + 0.02 * sum(jnp.linalg.norm(p[f"{n}->y"]) for n in "abc")
                + 0.02 * jnp.sum(jnp.abs(p["importance"]))
            )

        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), None, 300)[0][0]

    after = module.importances(train(params))
    assert list(after) == ["a->y", "b->y", "c->y"]
    assert after["b->y"] > 0.95


def test_importance_does_not_depend_on_how_an_edge_is_split_into_factor_and_weight():
    module = groups(importance=True)
    params = fill(module, THREE)
    moved = {
        **params,
        "importance": params["importance"].at[1].mul(-4.0),
        "b->x": params["b->x"] / -4,
    }
    chex.assert_trees_all_close(module.importances(moved), module.importances(params), rtol=1e-5)
    apply = jax.jit(lambda params: module.apply({"params": params}, THREE))
    chex.assert_trees_all_close(apply(moved), apply(params), rtol=1e-5, atol=1e-6)
    sizes = {
        e: abs(float(f)) * np.linalg.norm(params["->".join(e)])
        for e, f in zip(PATTERN, params["importance"], strict=True)
    }
    want = {"->".join(edge): size / sum(sizes.values()) for edge, size in sizes.items()}
    chex.assert_trees_all_close(module.importances(params), want, rtol=1e-5)


def test_edges_that_are_multiplied_count_as_their_product():
    """Of b -> x and a -> x only the product matters: what one gains and the other loses changes
    nothing.
    """
    module = groups(importance=True, combine="product")
    params = fill(module, THREE)
    moved = {**params, "importance": params["importance"] * jnp.asarray([5.0, 0.2, 1, 1, 1])}
    before = module.importances(params)
    after = module.importances(moved)
    chex.assert_trees_all_close(after, before, rtol=1e-5)
    assert after["a->x"] == after["b->x"] != after["b->y"] == after["c->y"] and sum(
        after.values()
    ) == pytest.approx(1)
    off = module.importances({**params, "importance": params["importance"].at[0].set(0.0)})
    assert (
        off["a->x"] == off["b->x"] == 0 < off["c->z"]
    )  # one factor of zero leaves nothing of the group


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ((("a", "x"), ("b", "x"), ("d", "x")), "group of inputs: 'd' is not known"),
        ((("a", "x"), ("b", "x"), ("c", "w")), "group of outputs: 'w' is not known"),
        ((("a", "x"), ("a", "x"), ("b", "x"), ("c", "x")), "each edge once"),
        ((("a", "x"), ("b", "x")), "the group 'c' has none"),
        ((("a", "x"), ("b", "x"), ("c", "x"), ("c/d", "x")), "group of inputs: 'c/d' is not known"),
    ],
)
def test_patterns_that_are_refused(pattern, message):
    with pytest.raises(InputError, match=message):
        fill(connect.Groups(pattern, (("x", 2),), POLICY), THREE)


def test_what_is_no_dict_of_branches_is_refused():
    module = connect.Groups((("a", "x"),), (("x", 2),), POLICY)
    for given, message in (
        (THREE["a"], "branches: .* given; allowed: a dict"),
        ({}, "branches: none given"),
        ({"a/b": THREE["a"]}, "branches: 'a/b' has a slash"),
    ):
        with pytest.raises(InputError, match=message):
            by_name(given)
    with pytest.raises(InputError, match="edges: 'x/y' has a slash"):
        fill(
            dataclasses.replace(module, pattern=(("a", "x/y"),), widths=(("x/y", 2),)),
            {"a": THREE["a"]},
        )


# ------------------------------------------------------------------------------- a shared extractor


@pytest.mark.parametrize(("how", "function"), [("sum", np.sum), ("mean", np.mean), ("max", np.max)])
def test_a_shared_extractor_merged(how, function):
    module = connect.Shared(connect.Full(3, POLICY))
    params = fill(module, EQUAL)
    assert tree.count(params) == 3 * 4 + 3  # once, for three branches
    found = run(module, params, EQUAL)
    weight, bias = (np.asarray(params["extractor"][name]) for name in ("weight", "weight_bias"))
    each = [np.asarray(EQUAL[name]) @ weight.T + bias for name in "abc"]
    np.testing.assert_allclose(
        connect.merged(found, how), function(np.stack(each), axis=0), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        connect.merged(found), np.concatenate(each, axis=1), rtol=1e-5, atol=1e-6
    )


def test_what_a_shared_extractor_refuses():
    with pytest.raises(InputError, match="branches: a 4, b 6, c 5 features given"):
        fill(connect.Shared(connect.Full(3, POLICY)), THREE)
    with pytest.raises(InputError, match="merge: 'avg' is not known"):
        connect.merged(EQUAL, "avg")
    with pytest.raises(InputError, match="merge: 'sum' given for branches of several widths"):
        connect.merged(THREE, "sum")


# ------------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize(("rows", "columns", "kept"), [(4, 8, 2), (16, 5, 2), (3, 3, 3), (1, 7, 1)])
def test_a_fixed_mask_uses_every_column_as_often(rows, columns, kept):
    places = block_columns(rows, columns, kept, seed=3)
    assert all(len(set(row)) == kept for row in places.tolist())
    counts = np.bincount(places.reshape(-1), minlength=columns)
    assert counts.max() - counts.min() <= 1
    np.testing.assert_array_equal(places, block_columns(rows, columns, kept, seed=3))
    if kept < columns and rows > 1:
        assert (places != block_columns(rows, columns, kept, seed=4)).any()


@pytest.mark.parametrize("learnt", [False, True])
def test_settled_blocks_are_the_same_function(learnt):
    x = branches(a=16)["a"]
    module = connect.BlockLinear(8, (2, 4), 2, POLICY, learnt)
    params = fill(module, x)
    settled = connect.settle_blocks(module, params, 0, 16)
    assert isinstance(settled["weight"], BlockSparse) and settled["weight"].values.shape == (
        4,
        2,
        2,
        4,
    )
    assert float(jnp.mean(settled["weight"].keep())) == 0.5
    want = run(module, params, x)
    np.testing.assert_allclose(run(module, settled, x), want, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        jax.jit(edge_sum)(x, module.edges(settled)), want, rtol=1e-6, atol=1e-6
    )


def test_the_gradient_of_a_score_is_that_of_its_blocks_use():
    """By a factor of each block, of the chosen ones at 1 and of the others at 0 (Ramanujan et al.,
    2020).
    """
    x = branches(a=16)["a"]
    module = connect.BlockLinear(8, (2, 4), 2, POLICY, True)
    params = fill(module, x)
    use = np.argsort(np.argsort(-params["scores"].reshape(4, 4), axis=1), axis=1) < 2

    def by_hand(use):
        tiles = params["all"].reshape(4, 2, 4, 4) * use[:, None, :, None]
        return jnp.sum(jnp.sin(x @ tiles.reshape(8, 16).T + params["weight_bias"][None]))

    want = jax.jit(jax.grad(by_hand))(jnp.asarray(use, jnp.float32))
    layer = lambda scores: jnp.sum(
        jnp.sin(module.apply({"params": {**params, "scores": scores}}, x))
    )
    got = jax.jit(jax.grad(layer))(params["scores"])
    assert np.abs(want)[~use].max() > 0.01
    np.testing.assert_allclose(got.reshape(4, 4), want, rtol=1e-4, atol=1e-5)


def test_a_mask_is_learnt():
    """The target reads one block of inputs for each row of blocks; the scores find them, from a
    choice that is wrong.
    """
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(256, 16)), jnp.float32)
    wanted = np.array([1, 3])
    weight = np.zeros((4, 16), np.float32)
    for row, column in enumerate(wanted):
        weight[2 * row : 2 * row + 2, 4 * column : 4 * column + 4] = rng.normal(size=(2, 4))
    target = x @ jnp.asarray(weight).T
    module = connect.BlockLinear(4, (2, 4), 1, POLICY, True)
    params = dict(jax.jit(module.init)(jax.random.key(0), x)["params"])
    params["scores"] = jnp.asarray([0.1, 0, 0, 0, 0, 0.1, 0, 0])
    optimizer = optax.adam(2e-2)
    loss = lambda p: jnp.mean((module.apply({"params": p}, x) - target) ** 2)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    def fit(params):
        trained = jax.lax.scan(step, (params, optimizer.init(params)), None, 400)[0][0]
        return trained, loss(trained), loss(params)

    trained, after, before = jax.jit(fit)(params)
    np.testing.assert_array_equal(np.argmax(trained["scores"].reshape(2, 4), axis=1), wanted)
    assert float(after) < 0.01 * float(before)
    settled = connect.settle_blocks(module, trained)
    np.testing.assert_allclose(settled["weight"].decode(), weight, atol=0.05)


def test_blocks_that_do_not_fit_are_refused():
    x = jnp.ones((1, 16))
    for block, kept in (((3, 4), 1), ((2, 5), 1), ((2, 4), 5), ((2, 4), 0), ((0, 4), 1)):
        with pytest.raises(InputError, match="block, kept: .* given; a block must divide 8 x 16"):
            fill(connect.BlockLinear(8, block, kept, POLICY), x)
    module = connect.BlockLinear(8, (2, 4), 2, POLICY)
    with pytest.raises(InputError, match="features: None given"):
        connect.settle_blocks(module, fill(module, x))


@pytest.mark.parametrize("learnt", [False, True])
def test_blocks_may_be_compressed_and_measured(learnt):
    x = branches(a=16)["a"]
    name = "all" if learnt else "kept"
    module = connect.BlockLinear(8, (2, 4), 2, POLICY, learnt)
    params = fill(module, x)
    weight = np.asarray(params[name])
    scale = np.abs(weight).max(axis=-1, keepdims=True) / 127
    codes = QTensor.from_codes(
        jnp.asarray(np.round(weight / scale), jnp.int32), jnp.asarray(scale), bits=8
    )
    got, want = (run(module, {**params, name: leaf}, x) for leaf in (codes, codes.decode()))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

    def measured(zeros):
        return jnp.sum(module.apply({"params": {**params, name: ops.Probe(codes, zeros)}}, x))

    found = jax.jit(jax.grad(measured))(zeros_for(codes.shape, ("square",)))
    squares = np.square(np.asarray(x)).sum(axis=0)
    if learnt:  # what the whole map reads
        np.testing.assert_allclose(found["square"], squares, rtol=1e-5)
    else:  # what each row of blocks reads
        places = block_columns(4, 4, 2, seed=0)
        np.testing.assert_allclose(
            found["square"], squares.reshape(4, 4)[places].reshape(4, 8), rtol=1e-5
        )
