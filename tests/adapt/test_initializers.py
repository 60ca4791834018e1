"""New weights by rules: each distribution against its formula, SciPy and `jax.nn.initializers`;
draws that depend on the path.
"""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import initializers as theirs
from scipy import stats

from jaxmodel import text_form, tree
from jaxmodel.adapt import initialize, initializers
from jaxmodel.models import Model, gpt2, llama, vit

OUT = 300
IN = 500


def toy(depth: int) -> Model:
    """A model whose own weights are quickly made; nothing here runs it."""

    def init(key):
        matrices = {"up": (64, 32), "down": (32, 64), "q": (32, 32)}
        own = jnp.sum(jax.random.key_data(key)).astype(
            jnp.float32
        )  # of the key, and cheaper to compile than draws
        blocks = {
            name: jnp.full((depth, *shape), own + i)
            for i, (name, shape) in enumerate(matrices.items(), 1)
        }
        blocks = {
            "attn": {"q": blocks.pop("q")},
            "mlp": blocks,
            "norm": {"weight": jnp.ones((depth, 32))},
        }
        if depth == 1:
            blocks = jax.tree.map(lambda a: a[0], blocks)
        return {
            "embed": jnp.full((256, 32), own),
            "blocks": {f"0-{depth - 1}" if depth > 1 else "0": blocks},
        }

    return dataclasses.replace(gpt2.model(gpt2.SIZES["tiny"]), init=init)


TINY = toy(3)
MATRICES = "blocks/.*/(attn|mlp)/.*"


def drawn(text: str, shape: tuple[int, ...] = (OUT, IN), seed: int = 0) -> np.ndarray:
    return np.asarray(initializers.initializer(text)(jax.random.key(seed), shape))


def cut(std: float) -> stats.rv_continuous:
    """What `truncated` means: cut at two deviations, then scaled to the deviation that was asked
    for.
    """
    return stats.truncnorm(-2, 2, scale=std / stats.truncnorm(-2, 2).std())


AXES = {"in_axis": -1, "out_axis": -2}
CASES = [
    ("uniform(0.3)", stats.uniform(-0.3, 0.6), None),
    ("uniform(0.3, 0.1)", stats.uniform(0.1, 0.2), None),
    ("uniform(0.4, 0)", stats.uniform(0, 0.4), theirs.uniform(0.4)),
    ("normal(0.05)", stats.norm(0, 0.05), theirs.normal(0.05)),
    ("truncated(0.05)", cut(0.05), None),
    (
        "truncated(0.05, cut=1.0)",
        stats.truncnorm(-1, 1, scale=0.05 / stats.truncnorm(-1, 1).std()),
        None,
    ),
    ("xavier", stats.norm(0, np.sqrt(2 / (OUT + IN))), None),
    (
        "xavier('uniform')",
        stats.uniform(-np.sqrt(6 / (OUT + IN)), 2 * np.sqrt(6 / (OUT + IN))),
        theirs.glorot_uniform(**AXES),
    ),
    ("xavier('truncated')", cut(np.sqrt(2 / (OUT + IN))), theirs.glorot_normal(**AXES)),
    (
        "he",
        stats.norm(0, np.sqrt(2 / IN)),
        theirs.variance_scaling(2.0, "fan_in", "normal", **AXES),
    ),
    (
        "he('uniform')",
        stats.uniform(-np.sqrt(6 / IN), 2 * np.sqrt(6 / IN)),
        theirs.he_uniform(**AXES),
    ),
    (
        "he('truncated', gain=0.5)",
        cut(0.5 * np.sqrt(2 / IN)),
        theirs.variance_scaling(0.5, "fan_in", "truncated_normal", **AXES),
    ),
    (
        "lecun",
        stats.norm(0, np.sqrt(1 / IN)),
        theirs.variance_scaling(1.0, "fan_in", "normal", **AXES),
    ),
    ("lecun('truncated')", cut(np.sqrt(1 / IN)), theirs.lecun_normal(**AXES)),
]


@pytest.mark.parametrize(("text", "law", "oracle"), CASES, ids=[text for text, _, _ in CASES])
def test_distributions(text, law, oracle):
    """150,000 draws:

    Kolmogorov and Smirnov's distance to the law, and the first two moments, within what chance
    allows.
    """
    values = drawn(text)
    assert values.shape == (OUT, IN) and values.dtype == np.float32
    assert stats.kstest(values.ravel(), law.cdf).pvalue > 1e-3
    assert values.mean() == pytest.approx(law.mean(), abs=4 * law.std() / np.sqrt(values.size))
    assert values.std() == pytest.approx(law.std(), rel=0.01)
    if oracle is not None:
        other = np.asarray(oracle(jax.random.key(1), (OUT, IN), jnp.float32))
        assert stats.ks_2samp(values.ravel(), other.ravel()).pvalue > 1e-3


def test_the_test_above_would_see_a_wrong_fan():
    assert stats.kstest(drawn("he").ravel(), stats.norm(0, np.sqrt(2 / OUT)).cdf).pvalue < 1e-9


def test_constants():
    assert (
        np.all(drawn("zeros") == 0)
        and np.all(drawn("ones") == 1)
        and np.all(drawn("constant(0.25)") == 0.25)
    )


@pytest.mark.parametrize("shape", [(6, 6), (8, 3), (3, 8), (2, 5, 4)])
def test_orthogonal(shape):
    w = drawn("orthogonal(2.0)", shape) / 2
    w = w if shape[-2] <= shape[-1] else np.swapaxes(w, -1, -2)
    gram = w @ np.swapaxes(w, -1, -2)
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(w.shape[-2]), gram.shape), atol=1e-5)


def test_orthogonal_is_uniform_over_the_rotations():
    """Any entry of a uniform rotation of n axes has mean 0 and variance 1 / n; QR alone gives a
    diagonal of one sign.
    """
    w = np.asarray(
        jax.vmap(lambda key: initializers.Orthogonal()(key, (4, 4)))(
            jax.random.split(jax.random.key(0), 2000)
        )
    )
    other = np.asarray(
        jax.vmap(lambda key: theirs.orthogonal()(key, (4, 4)))(
            jax.random.split(jax.random.key(1), 2000)
        )
    )
    for values in (w, other):
        np.testing.assert_allclose(values.mean(axis=0), 0, atol=4 * 0.5 / np.sqrt(2000))
        np.testing.assert_allclose((values**2).mean(axis=0), 0.25, atol=0.03)
    assert stats.ks_2samp(w[:, 0, 0], other[:, 0, 0]).pvalue > 1e-3


def test_experts_are_matrices_of_their_own():
    w = drawn("he", (3, 200, 50))
    assert w.std() == pytest.approx(np.sqrt(2 / 50), rel=0.02)
    np.testing.assert_allclose(np.corrcoef(w.reshape(3, -1)), np.eye(3), atol=0.05)


# -------------------------------------------------------------------------------------------- rules


def new(model, rules, seed=0):
    return jax.device_get(jax.jit(lambda key: initialize(model, key, rules))(jax.random.key(seed)))


def test_what_the_rules_leave_out_is_the_models_own():
    own = jax.jit(TINY.init)(jax.random.key(3))
    chex.assert_trees_all_equal(new(TINY, [(".*", None)], 3), own)
    got = new(
        TINY,
        [
            ("embed", "ones"),
            ("blocks/1/.*/up", "zeros"),
            ("blocks/2/.*/up", "own(2)"),
            (".*", None),
        ],
        3,
    )
    leaves = tree.flatten(tree.unstack(got))
    before = tree.flatten(tree.unstack(jax.device_get(own)))
    for path, leaf in leaves.items():
        want = {
            "embed": 1.0,
            "blocks/1/mlp/up": 0.0,
            "blocks/2/mlp/up": 2 * before["blocks/2/mlp/up"],
        }.get(path, before[path])
        np.testing.assert_array_equal(leaf, np.broadcast_to(want, leaf.shape), err_msg=path)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, own)  # stacked as the model stacks


def test_layers_and_leaves_draw_for_themselves_and_the_key_decides():
    rules = [(MATRICES, "normal(1)"), (".*", None)]
    params = new(TINY, rules)
    layers = tree.unstack(params)["blocks"]
    rows = [
        np.asarray(leaf).ravel()[:1024]
        for layer in layers.values()
        for leaf in jax.tree.leaves(layer)
        if leaf.ndim == 2
    ]
    assert len(rows) == 9
    np.testing.assert_allclose(np.corrcoef(rows), np.eye(9), atol=0.15)
    assert tree.fingerprint(params) == tree.fingerprint(new(TINY, rules))
    assert tree.fingerprint(params) != tree.fingerprint(new(TINY, rules, 1))
    chex.assert_trees_all_close(
        initialize(TINY, jax.random.key(0), rules), params, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("text", ["he", "truncated(0.1)", "orthogonal", "xavier('uniform')"])
def test_draws_do_not_depend_on_stacking_depth_or_other_rules(text):
    whole = tree.flatten(tree.unstack(new(TINY, [(MATRICES, text), (".*", None)])))
    apart = tree.flatten(
        tree.unstack(
            new(TINY, [("blocks/0/(attn|mlp)/.*", "ones"), (MATRICES, text), (".*", None)])
        )
    )
    alone = tree.flatten(new(toy(1), [(MATRICES, text), (".*", None)]))
    for name in ("attn/q", "mlp/up", "mlp/down"):
        np.testing.assert_array_equal(alone[f"blocks/0/{name}"], whole[f"blocks/0/{name}"])
        np.testing.assert_array_equal(apart[f"blocks/2/{name}"], whole[f"blocks/2/{name}"])
        assert np.all(apart[f"blocks/0/{name}"] == 1)


def test_the_fan_of_a_convolution_counts_its_places():
    model = vit.model(vit.SIZES["tiny"])
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    zeros = dataclasses.replace(
        model, init=lambda key: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    )
    params = new(zeros, [("embed/patch", "he"), (".*", None)])
    patch = params["embed"]["patch"]  # [width, channels * 4 * 4]
    assert patch.shape == (32, 48)
    assert np.asarray(patch).std() == pytest.approx(np.sqrt(2 / 48), rel=0.05)


def test_a_callable_gets_the_shape_of_one_layer():
    seen = []

    def mine(key, shape, dtype):
        seen.append((shape, dtype))
        return jnp.full(shape, 7, dtype)

    params = new(TINY, [(".*/up", mine), ("embed", theirs.normal(1.0)), (".*", None)])
    assert seen == [((64, 32), jnp.float32)] and np.all(params["blocks"]["0-2"]["mlp"]["up"] == 7)
    assert np.asarray(params["embed"]).std() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        (
            [("embed", "kaiming")],
            "initializer: 'kaiming' is not known; allowed: constant, he, lecun",
        ),
        ([("embed", "he(")], "cannot be read; write it as 'normal(0.02)'"),
        ([("embed", "he(std=1)")], "he takes the settings distribution, gain"),
        ([("embed", "zeros(1)")], "zeros takes no settings"),
        ([("embed", "normal('a')")], "normal: std is 'a'; allowed: a number of at least 0"),
        ([("embed", "normal(-1)")], "normal: std is -1; allowed: a number of at least 0"),
        (
            [("embed", "he('gauss')")],
            'he: distribution is \'gauss\'; allowed: "normal", "truncated", "uniform"',
        ),
        ([("embed", "uniform(0.1, 0.2)")], "allowed: a low below the high"),
        ([("embed", "truncated(1, cut=0)")], "truncated: cut is 0; allowed: a number above 0"),
        ([("embed", 3)], "rules: 3 is not an initialiser; allowed: constant"),
        (
            [("embed", initializers.He)],
            "initializers.He'> is not an initialiser; allowed: constant",
        ),
        ([("embed", "orthogonal('a')")], "orthogonal: gain is 'a'; allowed: a number"),
        (
            [("blocks/0/norm/weight", "he")],
            "rules: blocks/0/norm/weight: he: the shape [32] has no fan-in; allowed: a leaf of "
            "two axes or more",
        ),
        (
            [("blocks/.*/norm/weight", "orthogonal")],
            "rules: blocks/0/norm/weight: orthogonal: the shape [32] has no",
        ),
        (
            [("embed", lambda key, shape, dtype: jnp.zeros(3))],
            "made float32[3]; needed: float32[256, 32]",
        ),
        ([("embd", "he")], "rules: 'embd' matches no leaf"),
    ],
)
def test_bad_rules_are_one_line(rules, says):
    with pytest.raises(ValueError) as error:
        jax.eval_shape(lambda key: initialize(TINY, key, [*rules, (".*", None)]), jax.random.key(0))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_leaf_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match="no rule covers the leaf"):
        jax.eval_shape(lambda key: initialize(TINY, key, [("embed", "he")]), jax.random.key(0))


def test_every_initialiser_has_a_text_form_that_rules_take():
    model = llama.model(dataclasses.replace(llama.SIZES["tiny"], depth=1))
    names = text_form.members(initializers.Initializer)
    assert {
        "zeros",
        "ones",
        "constant",
        "uniform",
        "normal",
        "truncated",
        "xavier",
        "he",
        "lecun",
        "orthogonal",
        "own",
    } == set(names)
    for name, cls in names.items():
        value = initializers.initializer(f"{name}(0.5)" if name == "constant" else name)
        assert type(value) is cls
        params = jax.eval_shape(
            lambda key, v=value: initialize(model, key, [("blocks/.*/up", v), (".*", None)]),
            jax.random.key(0),
        )
        assert tree.count(params) == tree.count(jax.eval_shape(model.init, jax.random.key(0)))
