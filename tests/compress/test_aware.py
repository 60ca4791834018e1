"""Training with compressed weights in view."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import compress, data, leaves, losses, train, tree
from jaxmodel.errors import InputError
from jaxmodel.models import mlp

MODEL = mlp.model(mlp.SIZES["tiny"])
RECIPE = [
    ("blocks/1/dense", "magnitude(0.5) | ternary()"),
    (".*/dense", "stochastic(4)"),
    ("head", "binary()"),
    (".*", ""),
]


def test_fake_is_what_apply_stores_and_has_the_gradient_of_the_identity():
    params = MODEL.init(jax.random.key(0))
    key = jax.random.key(1)
    stored, _ = compress.apply(RECIPE, params, key=key)

    @jax.jit
    def run(params):
        seen = compress.fake(RECIPE, params, key=key)
        total = lambda params: sum(
            jnp.sum(leaf) for leaf in jax.tree.leaves(compress.fake(RECIPE, params, key=key))
        )
        return tree.unstack(seen), jax.grad(total)(params)

    seen, gradient = run(params)
    want = tree.map_leaves(lambda _, leaf: leaves.decode(leaf), tree.unstack(stored))
    for path, leaf in tree.flatten(want).items():
        np.testing.assert_allclose(tree.flatten(seen)[path], leaf, atol=1e-6, err_msg=path)
    jax.tree.map(lambda a: np.testing.assert_array_equal(a, np.ones_like(a)), gradient)


def test_a_network_of_bits_learns_what_rounding_afterwards_loses():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(256, 16)).astype(np.float32)
    labels = (features @ rng.normal(size=(16, 4))).argmax(-1).astype(np.int32)
    model = mlp.model(mlp.Config(16, (32,), 4))
    stream = data.Stream({"features": features, "labels": labels}, 64, 0)
    recipe = [(".*/dense|head", "binary()"), (".*", "")]
    config = train.TrainConfig(steps=300, learning_rate=1e-2)

    def right(loss):
        state, _ = train.fit(model, stream, config, loss=loss)
        stored, _ = compress.apply(recipe, state.params)
        assert isinstance(stored["head"], leaves.QTensor)
        logits = jax.jit(model.apply)(stored, {"features": jnp.asarray(features)}).logits
        return np.mean(np.asarray(logits).argmax(-1) == labels)

    aware = right(compress.aware(losses.classification, recipe))
    assert aware > 0.9
    assert right(losses.classification) < aware - 0.03


def test_a_recipe_by_role_takes_the_axes_of_the_model():
    loss = compress.aware(losses.classification, compress.get_recipe("int4-rtn"))
    params = MODEL.init(jax.random.key(0))
    batch = {"features": jnp.ones((2, 16)), "labels": jnp.zeros(2, jnp.int32)}
    stored, _ = compress.apply(loss.recipe, params, axes=MODEL.axes)
    got, want = jax.jit(
        lambda params, stored: (
            loss(MODEL, params, batch, train=False)[0],
            losses.classification(MODEL, stored, batch, train=False)[0],
        )
    )(params, stored)
    np.testing.assert_allclose(got, want, rtol=1e-4)
    with pytest.raises(InputError, match="axes: None given"):
        compress.fake(compress.get_recipe("int4-rtn"), params)
