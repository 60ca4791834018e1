"""Auto-encoders: divergences against Monte Carlo, gradients through samples, sparsity, noise, and
that each kind learns.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from jaxmodel import losses, ops
from jaxmodel.errors import InputError
from jaxmodel.layers import codes
from jaxmodel.models import autoencoder
from jaxmodel.train.state import init_state
from jaxmodel.train.step import make_step


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def data(rows=256, features=16, rank=3, seed=0):
    """Few positive factors."""
    rng = np.random.default_rng(seed)
    factors = np.maximum(rng.normal(size=(rows, rank)), 0) @ rng.normal(size=(rank, features))
    return jnp.asarray(factors / np.sqrt(np.mean(factors**2)), jnp.float32)


# ---------------------------------------------------------------------------------------- the parts


def test_the_divergence_from_a_normal_against_monte_carlo():
    mean = normal(3, 4)
    log_variance = 0.7 * normal(3, 4, seed=1)
    sample = jax.jit(jax.vmap(lambda key: codes.sample_normal(mean, log_variance, key)))
    z = np.asarray(sample(jax.random.split(jax.random.key(0), 40_000)))
    log_q = stats.norm.logpdf(z, np.asarray(mean), np.exp(0.5 * np.asarray(log_variance)))
    ratios = np.sum(log_q - stats.norm.logpdf(z), axis=-1)
    error = np.std(ratios, axis=0) / 40_000**0.5
    got = np.asarray(codes.kl_to_normal(mean, log_variance))
    assert np.all(np.abs(got - np.mean(ratios, axis=0)) < 4 * error)
    assert np.all(got > 0.5)
    np.testing.assert_allclose(
        codes.kl_to_normal(jnp.zeros((1, 4)), jnp.zeros((1, 4))), 0, atol=1e-7
    )


def test_gradients_pass_through_a_sample():
    """`E z^2 = mean^2 + variance`, whose derivatives are `2 mean` and `variance` (by the logarithm
    of it).
    """
    mean = jnp.asarray([[0.5, -1.0]])
    log_variance = jnp.asarray([[0.2, -0.8]])
    keys = jax.random.split(jax.random.key(0), 40_000)
    square = lambda m, v: jnp.mean(
        jax.vmap(lambda key: codes.sample_normal(m, v, key) ** 2)(keys), axis=0
    ).sum()
    by_mean, by_spread = jax.jit(jax.grad(square, argnums=(0, 1)))(mean, log_variance)
    np.testing.assert_allclose(by_mean, 2 * np.asarray(mean), atol=0.03)
    np.testing.assert_allclose(by_spread, np.exp(log_variance), atol=0.03)
    np.testing.assert_array_equal(codes.sample_normal(mean, log_variance, None), mean)


def test_the_divergence_of_rates():
    code = jax.nn.sigmoid(normal(50, 3))
    mean = np.asarray(code).mean(0).astype(np.float64)
    want = sum(0.1 * np.log(0.1 / m) + 0.9 * np.log(0.9 / (1 - m)) for m in mean)
    assert float(codes.kl_of_rates(code, 0.1)) == pytest.approx(want, rel=1e-5)
    assert float(codes.kl_of_rates(jnp.full((4, 3), 0.1), 0.1)) == pytest.approx(0, abs=1e-6)


def test_the_largest_entries_are_kept_if_they_are_positive():
    code = normal(40, 9)
    got = np.asarray(codes.keep_top(code, 3))
    for row, kept in zip(np.asarray(code), got, strict=True):
        want = [v if v > 0 and v in np.sort(row)[-3:] else 0 for v in row]
        np.testing.assert_array_equal(kept, want)
    grad = jax.jit(jax.grad(lambda c: jnp.sum(codes.keep_top(c, 3) ** 2)))(code)
    np.testing.assert_allclose(grad, 2 * got)
    with pytest.raises(InputError, match="k: 10 given; allowed: 1 to 9"):
        codes.keep_top(code, 10)


def test_of_equal_entries_no_more_than_k_are_kept():
    """In bfloat16 many entries are equal: the first ones count."""
    code = jnp.asarray([[2.0, 1, 1, 3, 1, 1], [1.0, 1, 1, 1, 1, 1]], jnp.bfloat16)
    assert codes.keep_top(code, 3).tolist() == [[2, 1, 0, 3, 0, 0], [1, 1, 1, 0, 0, 0]]
    wide = normal(50, 400).astype(jnp.bfloat16)
    assert np.all(np.sum(np.asarray(codes.keep_top(wide, 40)) > 0, axis=1) == 40)


# --------------------------------------------------------------------------------------- the models


def test_the_loss_of_a_variational_one_bounds_the_evidence():
    """A linear decoder has a normal as its evidence, known in closed form; the bound lies below it,
    by little when trained.
    """
    x = data(features=6, rank=2)
    config = autoencoder.Config(6, 2, kind="variational")
    model = autoencoder.model(config)
    optimizer = optax.adam(2e-2)
    step = make_step(model, losses.autoencoder, optimizer)

    @jax.jit
    def fit(key):
        start = init_state(model.init(key), optimizer)
        return start.params, jax.lax.scan(
            lambda state, _: step(state, {"features": x}), start, None, 400
        )[0].params

    @jax.jit
    def bound(params):
        one = lambda key: losses.autoencoder(model, params, {"features": x}, key)[0]
        return -jnp.mean(jax.vmap(one)(jax.random.split(jax.random.key(1), 200)))

    def evidence(params):
        out = jax.tree.map(np.asarray, params["decoder"]["out"])
        covariance = np.eye(6) + out["weight"] @ out["weight"].T
        logs = stats.multivariate_normal.logpdf(np.asarray(x), out["weight_bias"], covariance)
        return np.mean(logs) + 3 * np.log(2 * np.pi)  # the loss leaves that constant out

    before, after = fit(jax.random.key(0))
    assert float(bound(before)) < evidence(before) - 0.05
    assert 0 < evidence(after) - float(bound(after)) < 0.1
    assert float(bound(after)) > float(bound(before)) + 0.3


KINDS = [(kind, "squared") for kind in autoencoder.KINDS] + [
    ("plain", "bernoulli"),
    ("variational", "bernoulli"),
]


@pytest.mark.parametrize(("kind", "reconstruction"), KINDS)
def test_every_kind_learns(kind, reconstruction):
    sparse = kind in ("l1", "kl", "topk")
    hidden = () if sparse else (24,)
    config = autoencoder.Config(16, 24, hidden, kind, reconstruction, penalty=0.05, k=4)
    model = autoencoder.model(config)
    x = data()
    batch = {"features": (x > 0).astype(jnp.float32) if reconstruction == "bernoulli" else x}
    optimizer = optax.adam(1e-2)
    step = make_step(model, losses.autoencoder, optimizer)
    held = lambda params: losses.autoencoder(model, params, batch, train=False)[1]["reconstruction"]

    @jax.jit
    def curve(key):
        start = init_state(model.init(key), optimizer)
        trained = jax.lax.scan(lambda state, _: step(state, batch), start, None, 300)[0]
        return held(start.params), held(trained.params)

    before, after = curve(jax.random.key(0))
    assert float(after) < 0.25 * float(before)


@pytest.mark.parametrize("kind", ["denoising", "variational"])
def test_noise_is_in_training_only_and_of_the_key(kind):
    model = autoencoder.model(autoencoder.Config(16, 8, (12,), kind))
    x = {"features": data()}
    params = jax.jit(model.init)(jax.random.key(0))
    run = jax.jit(
        lambda key, train: model.apply(params, x, rng=key, train=train).logits, static_argnums=1
    )
    one = jax.random.key(1)
    two = jax.random.key(2)
    np.testing.assert_array_equal(run(one, True), run(one, True))
    assert np.abs(run(one, True) - run(two, True)).max() > 1e-2
    np.testing.assert_array_equal(run(one, False), run(None, True))


def test_a_denoising_one_hides_its_share_of_the_inputs():
    model = autoencoder.model(
        autoencoder.Config(400, 400, kind="denoising", noise=0.3, activation="identity")
    )
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(
        lambda a: np.eye(400, dtype=np.float32) if a.ndim == 2 else np.zeros(400, np.float32),
        shapes,
    )
    run = jax.jit(
        lambda params, x: model.hidden(params, x, rng=jax.random.key(0), train=True).hidden
    )
    code = np.asarray(run(params, np.ones((50, 400), np.float32)))
    assert set(np.unique(code)) == {0.0, 1.0}
    assert np.mean(code) == pytest.approx(0.7, abs=0.01)


def test_a_sparse_code_is_of_what_differs_from_the_centre():
    """Where the input is the decoder's bias, nothing is active and the reconstruction is exact."""
    model = autoencoder.model(autoencoder.Config(16, 64, kind="topk", k=4))
    params = jax.jit(model.init)(jax.random.key(0))
    params["decoder"]["out"]["weight_bias"] = normal(16)
    x = jnp.concatenate([normal(16)[None], normal(8, 16, seed=1)])
    out = jax.jit(model.apply)(params, x)
    np.testing.assert_array_equal(np.sum(np.asarray(out.hidden) > 0, axis=1), [0] + [4] * 8)
    assert float(out.aux["active"]) == pytest.approx(8 * 4 / 9)
    np.testing.assert_array_equal(out.logits[0], normal(16))


def test_a_new_dictionary_reads_what_it_writes():
    """Columns of length one, and their transpose in the encoder; in bfloat16 no more than k are
    active.
    """
    for kind in ("l1", "topk"):
        model = autoencoder.model(
            autoencoder.Config(16, 64, kind=kind, k=4),
            ops.Policy(compute_dtype="bfloat16", activation_dtype="bfloat16"),
        )
        params = jax.jit(model.init)(jax.random.key(0))
        writes = params["decoder"]["out"]["weight"]
        np.testing.assert_array_equal(params["encoder"]["code"]["weight"], writes.T)
        np.testing.assert_allclose(np.linalg.norm(writes, axis=0), 1, rtol=1e-5)
        out = jax.jit(model.apply)(params, normal(200, 16))
        active = np.sum(np.asarray(out.hidden) > 0, axis=1)
        assert np.all(active <= 4) if kind == "topk" else active.max() > 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "sparse"}, "kind: 'sparse' is not known"),
        ({"reconstruction": "l2"}, "reconstruction: 'l2' is not known"),
        ({"kind": "topk", "k": 9}, "k: 9 given; allowed: at most 8, the width of the code"),
        ({"noise": 1.0}, "noise, rate: 1.0, 0.05 given"),
        ({"rate": 0.0}, "noise, rate: 0.3, 0.0 given"),
        ({"hidden": (4, 0)}, "hidden: 0 given"),
        ({"code": 0}, "code: 0 given; allowed: a whole number of at least 1"),
        ({"penalty": -1.0}, "penalty: -1.0 given; allowed: a finite number of at least 0"),
    ],
)
def test_configs_that_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(autoencoder.Config(16, 8), **change)


def test_inputs_that_are_refused():
    model = autoencoder.model(autoencoder.Config(16, 8))
    params = jax.eval_shape(model.init, jax.random.key(0))
    with pytest.raises(
        InputError, match=r"features: the shape \[2, 4, 4\] given; allowed: \[B, N\]"
    ):
        jax.eval_shape(model.apply, params, jnp.ones((2, 4, 4)))
    with pytest.raises(InputError, match="inputs: pixels given; 'features' is needed"):
        jax.eval_shape(model.apply, params, {"pixels": jnp.ones((2, 16))})
