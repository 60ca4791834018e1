"""Penalties equal the hand sum, bounds hold after the update, SAM is the gradient at the worst
point; all by rules.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st

from jaxmodel import leaves, tree
from jaxmodel.errors import InputError
from jaxmodel.losses import classification
from jaxmodel.losses.penalties import L1, L2, Elastic, Penalty, penalties, regularized
from jaxmodel.models import mlp
from jaxmodel.optim.projections import MaxMinNorm, MaxNorm, project
from jaxmodel.optim.sam import sam
from jaxmodel.text_form import read_one
from jaxmodel.train.state import init_state
from jaxmodel.train.step import make_step

MODEL = mlp.model(mlp.Config(4, (4, 4, 4), 3))
BATCH = {
    "features": jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32),
    "labels": jnp.arange(6) % 3,
}


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


# ---------------------------------------------------------------------------------------- penalties


def test_text_forms():
    assert read_one(Penalty, "l1(1e-4)") == L1(1e-4)
    assert read_one(Penalty, "elastic(1, l2=0.5)") == Elastic(1, 0.5)
    assert [read_one(Penalty, nothing) for nothing in (None, (), "", " ")] == [None] * 4
    assert read_one(Penalty, L2(0.1)) == L2(0.1)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("l3(1)", "penalty: 'l3' is not known; allowed: elastic, l1, l2"),
        ("l1", "penalty: 'l1' in 'l1': l1 takes the settings l1"),
        ("l1(", "penalty: 'l1(' cannot be read"),
        ("l1(1, 2)", "penalty: 'l1(1, 2)' in 'l1(1, 2)': l1 takes the settings l1"),
        ("l1(x)", "penalty: 'l1(x)' in 'l1(x)': l1 takes the settings l1"),
        ("l2(-1)", "l2: l2 is -1; allowed: a number of at least 0"),
        (0.1, "penalty: 0.1 given; allowed: one of l1(l1), l2(l2), elastic(l1, l2) as a text"),
        (MaxNorm(1), "penalty: MaxNorm(high=1.0) given; allowed: one of l1(l1), l2"),
    ],
)
def test_what_is_no_penalty(value, message):
    with pytest.raises(InputError) as error:
        regularized(classification, [(".*", value)])
    assert message in str(error.value)


def test_the_penalty_is_the_hand_sum_by_layer(params):
    rules = [
        ("blocks/0/dense", "l1(0.1)"),
        ("blocks/1/dense", L2(0.2)),
        ("head", "elastic(0.3, 0.4)"),
        (".*", None),
    ]
    layers = tree.flatten(tree.unstack(params))
    w = {
        path: np.asarray(layers[path], np.float64)
        for path in ("blocks/0/dense", "blocks/1/dense", "head")
    }
    wanted = 0.1 * np.abs(w["blocks/0/dense"]).sum() + 0.2 * (w["blocks/1/dense"] ** 2).sum()
    wanted += 0.3 * np.abs(w["head"]).sum() + 0.4 * (w["head"] ** 2).sum()
    assert any(tree.is_stacked(path) for path in tree.flatten(params))
    np.testing.assert_allclose(penalties(rules, params), wanted, rtol=1e-5)
    plain, _ = classification(MODEL, params, BATCH)
    loss = regularized(classification, rules)
    value, metrics = loss(MODEL, params, BATCH)
    np.testing.assert_allclose(value, plain + wanted, rtol=1e-5)
    np.testing.assert_allclose(metrics["penalty"], wanted, rtol=1e-5)
    assert float(metrics["weight"]) == 6
    heldout, metrics = loss(MODEL, params, BATCH, train=False)
    assert float(heldout) == float(plain) and "penalty" not in metrics


def test_a_uniform_penalty_does_not_split_and_has_its_gradient(params):
    grads = jax.grad(lambda p: penalties([(".*_bias", None), (".*", "l2(0.5)")], p))(params)
    for path, g in tree.flatten(grads).items():
        np.testing.assert_allclose(
            g, 0 if path.endswith("_bias") else tree.flatten(params)[path], rtol=1e-6
        )


def test_a_leaf_that_cannot_be_penalised():
    packed = leaves.Sparse.from_dense(jnp.eye(4), jnp.eye(4) > 0)
    with pytest.raises(
        InputError, match="the leaf 'w' is Sparse; allowed: plain floating-point weights, and None"
    ):
        penalties([("w", "l1(1)")], {"w": packed})
    with pytest.raises(InputError, match="the leaf 'n' is int32"):
        penalties([("n", "l1(1)")], {"n": jnp.arange(3)})
    assert float(penalties([(".*", None)], {"n": jnp.arange(3), "w": packed})) == 0


# -------------------------------------------------------------------------------------- projections


def norms(leaf) -> np.ndarray:
    return np.linalg.norm(np.asarray(leaf, np.float64), axis=-1)


@given(st.integers(0, 10**6), st.floats(0.0, 1.5), st.floats(0.0, 2.0), st.floats(1e-3, 30))
def test_norms_are_in_bounds_after_the_update(seed, low, more, size):
    rng = np.random.default_rng(seed)
    w, u = (jnp.asarray(size * rng.normal(size=(5, 4)), jnp.float32) for _ in range(2))
    high = low + more + 1e-3
    updates, _ = project([("w", MaxMinNorm(low, high))]).update(
        {"w": u}, optax.EmptyState(), {"w": w}
    )
    new = optax.apply_updates({"w": w}, updates)["w"]  # pyright: ignore
    slack = 1e-6 * float(jnp.max(jnp.abs(w)))  # of the sum p + (new - p)
    assert (norms(new) <= high * (1 + 1e-6) + slack).all() and (
        norms(new) >= low * (1 - 1e-6) - slack
    ).all()
    free = np.asarray(w + u)
    inside = (norms(free) < high * (1 - 1e-5)) & (norms(free) > low * (1 + 1e-5))
    np.testing.assert_array_equal(np.asarray(updates["w"])[inside], np.asarray(u)[inside])
    cosines = np.sum(np.asarray(new, np.float64) * free, -1) / (norms(new) * norms(free))
    assert cosines.min() > 1 - 1e-4  # the direction stays


def test_layers_of_a_segment_have_bounds_of_their_own(params):
    big = jax.tree.map(lambda a: 10 * a + 1, params)
    rules = [
        ("blocks/0/dense", "max_norm(1)"),
        ("blocks/1/dense", "max_min_norm(30, 40)"),
        ("head_bias", "max_norm(0.5)"),
    ]
    optimizer = optax.chain(optax.sgd(0.1), project([*rules, (".*", None)]))
    grads = jax.tree.map(jnp.ones_like, big)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(big), big)
    new = tree.flatten(tree.unstack(optax.apply_updates(big, updates)))  # pyright: ignore
    free = tree.flatten(tree.unstack(jax.tree.map(lambda p: p - 0.1, big)))
    np.testing.assert_allclose(norms(new.pop("blocks/0/dense")), 1, rtol=1e-5)
    np.testing.assert_allclose(norms(new.pop("blocks/1/dense")), 30, rtol=1e-5)
    np.testing.assert_allclose(norms(new.pop("head_bias")), 0.5, rtol=1e-5)
    for path, leaf in new.items():
        np.testing.assert_allclose(leaf, free[path], rtol=1e-6)


def test_training_keeps_the_bound(params):
    optimizer = optax.chain(optax.adam(0.1), project([(".*_bias", None), (".*", "max_norm(0.7)")]))
    step = jax.jit(make_step(MODEL, classification, optimizer))
    state = init_state(params, optimizer)
    for _ in range(5):
        state, _ = step(state, BATCH)
    found = np.concatenate(
        [
            norms(a).ravel()
            for path, a in tree.flatten(state.params).items()
            if not path.endswith("_bias")
        ]
    )
    assert found.max() <= 0.7 * (1 + 1e-6) and (found > 0.69).any()


def test_a_row_of_zeros_stays():
    w = {"w": jnp.zeros((2, 3))}
    updates, _ = project([("w", "max_min_norm(1, 2)")]).update(w, optax.EmptyState(), w)
    assert not np.any(np.asarray(updates["w"]))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("max_norm(0)", "max_norm: high is 0; allowed: a number above 0"),
        ("max_min_norm(2, 1)", "max_min_norm: low is 2.0; allowed: at most high, which is 1.0"),
        (
            "min_max_norm(1, 2)",
            "bound: 'min_max_norm' is not known; allowed: max_min_norm, max_norm",
        ),
    ],
)
def test_what_is_no_bound(value, message):
    with pytest.raises(InputError) as error:
        project([(".*", value)])
    assert message in str(error.value)


def test_a_projection_needs_params_and_rules_that_fit():
    w = {"w": jnp.ones((2, 3))}
    with pytest.raises(InputError, match="params: none given; a projection needs them"):
        project([("w", "max_norm(1)")]).update(w, optax.EmptyState())
    with pytest.raises(InputError, match="rules: 'v' matches no leaf"):
        project([("v", "max_norm(1)"), (".*", None)]).init(w)


# ---------------------------------------------------------------------------------------------- SAM


def test_sam_on_a_quadratic_by_hand():
    curved = np.array([[3.0, 1.0], [1.0, 2.0]])
    fn = lambda p, a: (
        0.5 * jnp.sum(p["x"] * (a @ p["x"])) + jnp.sum(p["y"] ** 2),
        {"seen": jnp.sum(p["x"])},
    )
    p = {"x": jnp.asarray([1.0, -2.0]), "y": jnp.asarray([0.5])}
    run = jax.value_and_grad(fn, has_aux=True)
    (value, metrics), grads = jax.jit(sam(run, 0.3))(p, jnp.asarray(curved, jnp.float32))
    g = np.concatenate([curved @ [1.0, -2.0], [1.0]])
    near = np.array([1.0, -2.0, 0.5]) + 0.3 * g / np.linalg.norm(g)
    np.testing.assert_allclose(grads["x"], curved @ near[:2], rtol=1e-5)
    np.testing.assert_allclose(grads["y"], 2 * near[2:], rtol=1e-5)
    np.testing.assert_allclose(value, 0.5 * np.array([1, -2]) @ curved @ [1, -2] + 0.25, rtol=1e-6)
    assert float(metrics["seen"]) == -1.0  # value and metrics are those of the point itself


def test_sam_where_the_gradient_is_zero_and_in_half_precision():
    run = jax.value_and_grad(lambda p: (jnp.sum(p.astype(jnp.float32) ** 2), {}), has_aux=True)
    assert not np.any(np.asarray(sam(run)(jnp.zeros(3))[1]))
    (_, _), grads = sam(run, 0.5)(jnp.ones(4, jnp.bfloat16))
    assert grads.dtype == jnp.bfloat16 and np.allclose(np.asarray(grads, np.float32), 2.5)
    with pytest.raises(InputError, match=r"radius: 0.0 given; allowed: a finite number above 0"):
        sam(run, 0.0)


def test_a_step_takes_sam_as_its_gradient(params):
    from jaxmodel.train.gradients import value_and_grad

    step = make_step(
        MODEL,
        classification,
        optax.sgd(1.0),
        gradients=lambda objective: sam(value_and_grad(objective), 0.1),
    )
    state = init_state(params, optax.sgd(1.0))
    new, _ = jax.jit(step)(state, BATCH)
    run = jax.value_and_grad(lambda p: classification(MODEL, p, BATCH), has_aux=True)
    wanted = jax.tree.map(lambda p, g: p - g, params, sam(run, 0.1)(params)[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), new.params, wanted)
