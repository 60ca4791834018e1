"""The network of branches: every pattern learns, settled bodies are the same function, configs are
checked.
"""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodel import tree
from jaxmodel.errors import InputError
from jaxmodel.leaves import BlockSparse
from jaxmodel.models import connected

BASE = connected.Config(
    (("left", 8), ("right", 8)), 4, 16, 2, features=8, rank=4, block=(4, 4), kept=2
)
GROUPS = (("left", "x"), ("right", "x"), ("right", "y"))
MERGED = {"merge": "groups", "edges": GROUPS, "combine": "product"}


def inputs(seed=0, rows=6):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=(rows, n)), jnp.float32) for name, n in BASE.branches}


# each extractor, each merge and each body at least once, in few models
PATTERNS = [
    *itertools.zip_longest(connected.EXTRACT, connected.MERGE, connected.BODY, fillvalue="own"),
    ("shared", "groups", "learnt"),
]


@pytest.mark.parametrize(("extract", "merge", "body"), PATTERNS)
def test_every_pattern_learns(extract, merge, body):
    model = connected.model(
        dataclasses.replace(
            BASE, extract=extract, body=body, **(MERGED if merge == "groups" else {"merge": merge})
        )
    )
    xs = inputs()
    labels = jnp.arange(6, dtype=jnp.int32) % 4
    optimizer = optax.adam(1e-2)

    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(
            model.apply(params, xs).logits, labels
        ).mean()

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    def train(key):
        params = model.init(key)
        return jax.lax.scan(step, (params, optimizer.init(params)), None, 60)[1]

    losses = jax.jit(train)(jax.random.key(0))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("body", ["sparse", "learnt"])
def test_a_settled_body_is_the_same_function_in_fewer_bytes(body):
    config = dataclasses.replace(BASE, width=64, depth=2, body=body, kept=3)
    model = connected.model(config)
    apply = jax.jit(lambda params: model.apply(params, inputs()).logits)
    params = jax.jit(model.init)(jax.random.key(1))
    settled = connected.settle(config, params)
    leaf = settled["blocks"]["0-1"]["map"]["weight"]
    assert isinstance(leaf, BlockSparse) and leaf.shape == (2, 64, 64)
    keep = np.asarray(leaf.keep())
    assert keep.sum(-1).tolist() == [[3] * 16] * 2
    assert np.any(keep[0] != keep[1])  # the layers do not all read the same inputs
    want = apply(params)
    np.testing.assert_allclose(apply(settled), want, atol=1e-5)
    dense = tree.map_leaves(
        lambda _, leaf: leaf.decode() if isinstance(leaf, BlockSparse) else leaf, settled
    )
    np.testing.assert_allclose(apply(dense), want, atol=1e-5)
    assert tree.nbytes(settled) < 0.5 * tree.nbytes(dense)


def test_a_shared_extractor_and_shared_edges_count_once():
    own, shared = (dataclasses.replace(BASE, extract=extract) for extract in ("own", "shared"))
    count = lambda config: tree.count(
        jax.eval_shape(connected.model(config).init, jax.random.key(0))
    )
    assert count(own) - count(shared) == 8 * 8 + 8
    apart = dataclasses.replace(BASE, merge="groups", edges=GROUPS)
    tied = dataclasses.replace(apart, share=((".*->x", "both"),))
    assert count(apart) - count(tied) == 8 * 8


def test_importances_by_the_names_of_edges():
    config = dataclasses.replace(BASE, merge="groups", edges=GROUPS, importance=True)
    params = jax.jit(connected.model(config).init)(jax.random.key(0))
    params["merge"]["importance"] = jnp.asarray([1.0, 0.0, -2.0])
    found = connected.importances(config, params)
    assert list(found) == ["left->x", "right->x", "right->y"]
    assert found["right->x"] == 0 and sum(found.values()) == pytest.approx(1)
    with pytest.raises(InputError, match="merge: 'full' given"):
        connected.importances(BASE, params)


def test_layers_of_concatenation_read_all_before_them():
    config = dataclasses.replace(BASE, body="concat", depth=3, growth=5)
    params = jax.eval_shape(connected.model(config).init, jax.random.key(0))
    widths = [layer["map"]["weight"].shape for layer in tree.unstack(params)["blocks"].values()]
    assert widths == [(5, 16), (5, 21), (5, 26)]
    assert params["head"].shape == (4, 31)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge": "bilnear"}, "merge: 'bilnear' is not known; .* \\(nearest: bilinear"),
        ({"body": "dense"}, "body: 'dense' is not known"),
        ({"extract": "all"}, "extract: 'all' is not known"),
        ({"branches": (("a", 2), ("a", 2))}, "different names"),
        ({"branches": (("a", 2), ("b", 0))}, "branches: b: 0 given"),
        ({"branches": (("a", 2),), "merge": "bilinear"}, "two of them for a bilinear merge"),
        ({"merge": "groups", "edges": (("left", "x"),)}, "the group 'right' has none"),
        (
            {"merge": "groups", "edges": tuple((b, g) for b in ("left", "right") for g in "xyz")},
            "3 groups given; allowed: a divisor",
        ),
        ({"merge": "groups", "edges": GROUPS, "combine": "max"}, "combine: 'max' is not known"),
        (
            {"merge": "groups", "edges": GROUPS, "share": (("left->z", "q"),)},
            "'left->z' matches no leaf",
        ),
        (
            {"edges": GROUPS},
            "edges, share, importance: given with the merge 'full'; allowed: with 'groups'",
        ),
        ({"importance": True}, "edges, share, importance: given with the merge 'full'"),
        (
            {"branches": (("a", 2), ("b", 3)), "extract": "shared"},
            "for a shared extractor: the same number of features in each",
        ),
        (
            {"body": "sparse", "kept": 5},
            r"block, kept: \(4, 4\), 5 given; a block must divide 16 x 16, and a row of blocks "
            r"keeps 1 to 4",
        ),
        ({"body": "learnt", "width": 18}, "a block must divide 18 x 18"),
        ({"depth": 0}, "depth: 0 given"),
    ],
)
def test_configs_that_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(BASE, **change)


def test_inputs_go_by_name():
    """In any order, and a name that is missing is said."""
    config = dataclasses.replace(
        BASE, branches=(("right", 8), ("left", 8)), extract="shared", merge="bilinear"
    )
    model = connected.model(config)
    xs = inputs()
    params = jax.jit(model.init)(jax.random.key(0))
    apply = jax.jit(model.apply)
    want = apply(params, xs).logits
    in_turn = jax.jit(
        lambda a, b: model.apply(params, {"right": a, "left": b}).logits
    )  # not sorted inside of jit
    np.testing.assert_allclose(in_turn(xs["right"], xs["left"]), want, rtol=1e-5, atol=1e-5)
    assert (
        np.abs(apply(params, {"left": xs["right"], "right": xs["left"]}).logits - want).max() > 1e-2
    )
    with pytest.raises(InputError, match="inputs: left, rihgt given; 'right' is needed"):
        model.apply(params, {"left": xs["left"], "rihgt": xs["right"]})
    with pytest.raises(InputError, match=r"left: the shape \[8\] given; allowed: \[B, N\]"):
        model.apply(params, {"left": xs["left"][0], "right": xs["right"]})


def test_only_bodies_of_blocks_settle():
    with pytest.raises(InputError, match="body: 'full' given; allowed: 'sparse', 'learnt'"):
        connected.settle(BASE, {})
