"""Dead features get a new start, living ones keep everything."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodel import contrib, losses, tree
from jaxmodel.errors import InputError
from jaxmodel.leaves import Sparse
from jaxmodel.models import autoencoder
from jaxmodel.train.state import init_state
from jaxmodel.train.step import make_step

CONFIG = autoencoder.Config(16, 32, kind="topk", k=4)
MODEL = autoencoder.model(CONFIG)
DEAD = np.arange(32) % 4 == 0


def data(rows=512):
    rng = np.random.default_rng(0)
    x = np.maximum(rng.normal(size=(rows, 8)) - 0.5, 0) @ rng.normal(size=(8, 16))
    return {"features": jnp.asarray(x, jnp.float32)}


@pytest.fixture(scope="module")
def state():
    """Some steps on, then a quarter of the features switched off."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
    step = jax.jit(make_step(MODEL, losses.autoencoder, optimizer))
    state = init_state(jax.jit(MODEL.init)(jax.random.key(0)), optimizer)
    for _ in range(5):
        state, _ = step(state, data())
    params = jax.tree.map(jnp.copy, state.params)
    params["encoder"]["code"]["weight_bias"] = jnp.where(
        DEAD, -100.0, params["encoder"]["code"]["weight_bias"]
    )
    return dataclasses.replace(state, params=params), step


def test_active_features_are_counted(state):
    code = np.asarray(MODEL.hidden(state[0].params, data()).hidden)
    got = contrib.count_active(MODEL, state[0].params, data())
    np.testing.assert_array_equal(got, (code > 0).sum(0))
    assert not np.any(np.asarray(got)[DEAD])


def test_columns_of_length_one(state):
    scaled = tree.map_leaves(
        lambda path, leaf: 3 * leaf if path.startswith("decoder") else leaf, state[0].params
    )
    unit = contrib.unit_dictionary(scaled)
    np.testing.assert_allclose(
        jnp.linalg.norm(unit["decoder"]["out"]["weight"], axis=0), np.ones(32), rtol=1e-5
    )
    chex.assert_trees_all_equal(unit["encoder"], scaled["encoder"])
    np.testing.assert_array_equal(
        unit["decoder"]["out"]["weight_bias"], scaled["decoder"]["out"]["weight_bias"]
    )


def test_only_dead_features_and_their_moments_change(state):
    before, _ = state
    after = jax.jit(
        lambda s, key: contrib.revive(s, MODEL, data(), jnp.asarray(DEAD), key, scale=0.5)
    )(before, jax.random.key(3))
    old, new = (tree.flatten(s.params) for s in (before, after))
    reads = "encoder/code/weight"
    bias = "encoder/code/weight_bias"
    writes = "decoder/out/weight"
    np.testing.assert_array_equal(new[reads][~DEAD], old[reads][~DEAD])
    np.testing.assert_array_equal(new[writes][:, ~DEAD], old[writes][:, ~DEAD])
    np.testing.assert_array_equal(new[bias], np.where(DEAD, 0, old[bias]))
    np.testing.assert_array_equal(new["decoder/out/weight_bias"], old["decoder/out/weight_bias"])
    living = np.linalg.norm(np.asarray(old[reads])[~DEAD], axis=1).mean()
    np.testing.assert_allclose(
        np.asarray(new[reads])[DEAD], 0.5 * living * np.asarray(new[writes]).T[DEAD], rtol=1e-5
    )
    np.testing.assert_allclose(
        np.linalg.norm(np.asarray(new[writes])[:, DEAD], axis=0), 1, rtol=1e-5
    )
    # each new direction is what the reconstruction of some row misses
    missed = np.asarray(data()["features"] - jax.jit(MODEL.apply)(before.params, data()).logits)
    missed = missed / np.linalg.norm(missed, axis=1, keepdims=True)
    assert np.all((np.asarray(new[writes]).T[DEAD] @ missed.T).max(axis=1) > 0.9999)
    for moments, were in zip(after.opt_state[1][0][1:], before.opt_state[1][0][1:], strict=True):
        for path, leaf in tree.flatten(moments).items():
            dead = {reads: DEAD[:, None], bias: DEAD, writes: DEAD[None]}.get(
                path, np.zeros(leaf.shape, bool)
            )
            np.testing.assert_array_equal(leaf, np.where(dead, 0, tree.flatten(were)[path]))
            assert np.any(np.asarray(leaf) != 0)
    assert int(after.step) == int(before.step)


def test_rows_are_drawn_by_their_squared_loss():
    """Of three rows with losses 0, 1 and 4, the last is drawn sixteen times as often as the second,
    the first never.
    """
    model = autoencoder.model(dataclasses.replace(CONFIG, features=3, code=4000, k=1))
    params = tree.map_leaves(
        lambda _, leaf: jnp.zeros_like(leaf), jax.jit(model.init)(jax.random.key(0))
    )
    state = init_state(params, optax.sgd(0.1))
    x = jnp.diag(jnp.asarray([0.0, 1.0, 2.0]))
    after = contrib.revive(state, model, {"features": x}, jnp.ones(4000, bool), jax.random.key(0))
    drawn = np.asarray(after.params["decoder"]["out"]["weight"]).argmax(0)
    assert np.bincount(drawn, minlength=3)[0] == 0
    assert np.mean(drawn == 2) == pytest.approx(16 / 17, abs=0.015)


def test_nothing_changes_where_nothing_is_dead(state):
    after = contrib.revive(state[0], MODEL, data(), jnp.zeros(32, bool), jax.random.key(0))
    chex.assert_trees_all_equal(after, state[0])


def test_revived_features_live_and_the_loss_is_lower():
    """Against the same steps without it, where they stay dead: the data has more factors than
    features are left.
    """
    rng = np.random.default_rng(0)
    active = (rng.random((512, 32)) < 0.1) * np.abs(rng.normal(size=(512, 32)) + 1)
    directions = rng.normal(size=(32, 16))
    batch = {
        "features": jnp.asarray(
            active @ (directions / np.linalg.norm(directions, axis=1, keepdims=True)), jnp.float32
        )
    }
    dead = jnp.arange(32) % 4 != 0
    optimizer = optax.adam(3e-3)
    step = make_step(MODEL, losses.autoencoder, optimizer)
    run = jax.jit(lambda state: jax.lax.scan(lambda s, _: step(s, batch), state, None, 100))
    params = jax.jit(MODEL.init)(jax.random.key(0))
    params["encoder"]["code"]["weight_bias"] = jnp.where(dead, -100.0, 0.0)
    left, _ = run(init_state(params, optimizer))
    revived = contrib.revive(left, MODEL, batch, dead, jax.random.key(0))
    (left, before), (revived, after) = run(left), run(revived)
    living = lambda state: int(
        jnp.sum((contrib.count_active(MODEL, state.params, batch) > 0) & dead)
    )
    assert living(left) == 0
    assert living(revived) >= 20  # of 24
    assert float(after["loss"][-1]) < 0.7 * float(before["loss"][-1])


def test_other_params_are_refused(state):
    deep = autoencoder.model(autoencoder.Config(16, 32, (8,), "l1"))
    with pytest.raises(
        InputError, match="params: .*hidden_0.* is missing, compressed or superfluous"
    ):
        contrib.unit_dictionary(jax.jit(deep.init)(jax.random.key(0)))
    params = state[0].params
    packed = {
        **params,
        "decoder": {
            "out": {**params["decoder"]["out"], "weight": Sparse.from_dense(jnp.ones((16, 32)))}
        },
    }
    with pytest.raises(InputError, match="params: decoder/out/weight is missing, compressed or"):
        contrib.revive(
            dataclasses.replace(state[0], params=packed),
            MODEL,
            data(),
            jnp.asarray(DEAD),
            jax.random.key(0),
        )
