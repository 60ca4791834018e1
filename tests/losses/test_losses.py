"""Losses against optax, SciPy and float64 by hand; extreme logits; limits in which they are each
other; what a batch weighs.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special, stats

from jaxmodel import losses
from jaxmodel.errors import InputError
from jaxmodel.losses import views as contrasts
from jaxmodel.losses.labels import class_sums, distribution, online_label_smoothing
from jaxmodel.models import mlp, transformer
from jaxmodel.train.state import init_state
from jaxmodel.train.step import make_step

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 2, (7, 5)).astype(np.float32)
LABELS = np.array([0, 4, 1, 3, 2, 2, 0], np.int32)
SOFT = RNG.dirichlet(np.ones(5), 7).astype(np.float32)
MODEL = mlp.model(mlp.Config(6, (8,), 5))
PAIRS = transformer.model(transformer.SIZES["tiny"])

EACH = {
    "cross entropy": losses.softmax_cross_entropy,
    "focal": losses.focal,
    "focal, small gamma": functools.partial(losses.focal, gamma=0.5),
    "generalised": losses.generalized_cross_entropy,
    "symmetric": losses.symmetric_cross_entropy,
}


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


def hard_or_soft(labels) -> np.ndarray:
    return np.eye(5)[labels] if labels.ndim == 1 else np.asarray(labels, np.float64)


def run(loss, params, rows, **options):
    """As one program: a quarter of the time of one for each operation."""
    return jax.jit(lambda params, rows: loss(MODEL, params, rows, **options))(params, rows)


def close(found, wanted, rtol=2e-5):
    np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), rtol=rtol, atol=1e-6)


# ----------------------------------------------------------------------------- a value for each row


@pytest.mark.parametrize("labels", [LABELS, SOFT], ids=["classes", "distributions"])
def test_losses_of_classes_equal_their_definitions(labels):
    p = special.softmax(LOGITS.astype(np.float64), axis=1)
    t = hard_or_soft(labels)
    wanted = {
        "cross entropy": -np.sum(t * np.log(p), 1),
        "focal": -np.sum(t * (1 - p) ** 2 * np.log(p), 1),
        "focal, small gamma": -np.sum(t * (1 - p) ** 0.5 * np.log(p), 1),
        "generalised": np.sum(t * (1 - p**0.7) / 0.7, 1),
        "symmetric": -0.1 * np.sum(t * np.log(p), 1)
        - np.sum(p * np.log(np.maximum(t, np.exp(-4))), 1),
    }
    for name, each in EACH.items():
        close(jax.jit(each)(LOGITS, labels), wanted[name])


def test_they_equal_optax():
    close(
        losses.softmax_cross_entropy(jnp.asarray(LOGITS), jnp.asarray(LABELS)),
        optax.losses.softmax_cross_entropy_with_integer_labels(
            jnp.asarray(LOGITS), jnp.asarray(LABELS)
        ),
    )
    close(
        losses.kl_divergence(jnp.asarray(LOGITS), jnp.log(SOFT)),
        optax.losses.kl_divergence(jax.nn.log_softmax(LOGITS), jnp.asarray(SOFT)),
    )
    two = jnp.stack(
        [jnp.zeros(7), jnp.asarray(LOGITS[:, 0])], axis=1
    )  # a sigmoid is a softmax of two
    binary = jnp.asarray(LABELS % 2, jnp.float32)
    close(
        losses.focal(two, binary.astype(jnp.int32), 2.0),
        optax.losses.sigmoid_focal_loss(two[:, 1], binary, gamma=2.0),
    )


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_distillation_equals_scipy_times_the_squared_temperature(temperature):
    teacher = RNG.normal(size=(7, 5))
    q, p = (special.softmax(z / temperature, axis=1) for z in (LOGITS.astype(np.float64), teacher))
    found = losses.kl_divergence(
        jnp.asarray(LOGITS), jnp.asarray(teacher, jnp.float32), temperature
    )
    close(found, temperature**2 * stats.entropy(p, q, axis=1), rtol=1e-4)


def test_losses_that_are_each_other_in_a_limit():
    z = jnp.asarray(LOGITS)
    y = jnp.asarray(LABELS)
    plain = losses.softmax_cross_entropy(z, y)
    p = jax.nn.softmax(z)[np.arange(7), LABELS]
    close(losses.focal(z, y, 0.0), plain)
    close(losses.focal(z, y, 1e-6), plain)
    close(losses.generalized_cross_entropy(z, y, 0.0), plain)
    close(losses.generalized_cross_entropy(z, y, 1e-6), plain, rtol=1e-4)
    close(losses.generalized_cross_entropy(z, y, 1.0), 1 - p)
    close(losses.symmetric_cross_entropy(z, y, 2.0, 0.0), 2 * plain)
    close(losses.symmetric_cross_entropy(z, y, 0.0, 1.0, -3.0), 3 * (1 - p))


@pytest.mark.parametrize("each", EACH.values(), ids=EACH.keys())
def test_extreme_logits_have_finite_gradients(each):
    z = jnp.asarray(
        [[1e4, 0, 0], [-1e4, 0, 1e4], [0, 0, 0], [80, -80, 0], [-1e4, 1e4, 1e4]], jnp.float32
    )
    for labels in (jnp.zeros(5, jnp.int32), jnp.asarray(np.eye(3)[[0, 1, 2, 0, 1]], jnp.float32)):
        value, slope = jax.jit(jax.value_and_grad(lambda z, labels: jnp.sum(each(z, labels))))(
            z, labels
        )
        assert np.isfinite(value) and np.isfinite(slope).all()


def test_logits_in_half_precision_are_compared_in_float32():
    z = jnp.asarray(LOGITS, jnp.bfloat16)
    assert all(each(z, jnp.asarray(LABELS)).dtype == jnp.float32 for each in EACH.values())
    close(
        losses.focal(z, jnp.asarray(LABELS)),
        losses.focal(z.astype(jnp.float32), jnp.asarray(LABELS)),
    )


@pytest.mark.parametrize("label", [-1, 5])
def test_a_label_that_is_no_class_is_loud(label):
    assert all(
        np.isnan(each(jnp.asarray(LOGITS[:1]), jnp.asarray([label]))).all()
        for each in EACH.values()
    )


def test_values_equal_optax():
    x, y = (jnp.asarray(3 * RNG.normal(size=(4, 2, 3)), jnp.float32) for _ in range(2))
    mean = lambda a: np.asarray(a).mean((1, 2))
    close(jax.jit(losses.squared_error)(x, y), mean(optax.losses.squared_error(x, y)))
    close(jax.jit(losses.absolute_error)(x, y), np.abs(np.asarray(x) - np.asarray(y)).mean((1, 2)))
    for delta in (0.3, 1.0):
        close(losses.huber(x, y, delta), mean(optax.losses.huber_loss(x, y, delta=delta)))
    assert np.isfinite(
        jax.jit(jax.grad(lambda x: jnp.sum(losses.huber(x, y) + losses.absolute_error(x, y))))(y)
    ).all()


# ------------------------------------------------------------------------------------------- labels


def test_smoothing_equals_optax_and_the_mean_of_the_class():
    t = np.eye(5, dtype=np.float32)[LABELS]
    close(losses.smooth(jnp.asarray(t), 0.3), optax.losses.smooth_labels(jnp.asarray(t), 0.3))
    means = RNG.dirichlet(np.ones(5), 5).astype(np.float32)
    close(losses.smooth(jnp.asarray(t), 0.3, jnp.asarray(means)), 0.7 * t + 0.3 * means[LABELS])
    close(
        losses.smooth(jnp.asarray(SOFT), 0.3, jnp.asarray(means)), 0.7 * SOFT + 0.3 * SOFT @ means
    )


def test_means_of_classes_are_those_of_rows_predicted_right_and_batches_add_up():
    z = RNG.normal(size=(40, 4)).astype(np.float32)
    z[:, 3] -= 9  # never predicted
    labels = RNG.integers(0, 4, 40).astype(np.int32)
    p = special.softmax(z.astype(np.float64), axis=1)
    right = z.argmax(1) == labels
    wanted = np.stack([p[right & (labels == c)].mean(0) for c in range(3)] + [np.full(4, 0.25)])
    sums = jax.jit(class_sums)
    parts = [np.asarray(sums(z[s], labels[s])) for s in (slice(0, 15), slice(15, 40))]
    close(online_label_smoothing(jnp.asarray(parts[0] + parts[1])), wanted, rtol=1e-4)


def test_class_weights_by_hand():
    counts = np.array([1, 10, 1000])
    close(losses.balanced_weights(counts), 1011 / (3 * counts))
    raw = [(1 - 0.99) / (1 - 0.99**n) for n in counts.tolist()]
    close(losses.effective_weights(counts, 0.99), 3 * np.array(raw) / sum(raw))
    close(losses.effective_weights(counts, 0.0), np.ones(3))
    near = losses.effective_weights(counts, 1 - 1e-9)
    close(near, 3 / counts / np.sum(1 / counts), rtol=1e-4)


# ------------------------------------------------------------------------------------- whole losses


def batch(labels=LABELS, **more) -> dict[str, jax.Array]:
    x = np.random.default_rng(1).normal(size=(len(labels), 6)).astype(np.float32)
    return {
        "features": jnp.asarray(x),
        "labels": jnp.asarray(labels),
        **{k: jnp.asarray(v) for k, v in more.items()},
    }


def test_class_and_row_weights_make_a_weighted_mean(params):
    rows = np.array([1, 1, 0, 2, 1, 1, 1], np.float32)
    of_classes = np.array([1, 2, 3, 0.5, 1], np.float32)
    value, metrics = run(
        losses.supervised(losses.focal, class_weights=of_classes), params, batch(weights=rows)
    )
    z = jax.jit(MODEL.apply)(params, batch()["features"]).logits
    w = rows * of_classes[LABELS]
    close(value, np.sum(w * np.asarray(losses.focal(z, jnp.asarray(LABELS)))) / w.sum())
    close(metrics["weight"], w.sum())
    close(metrics["accuracy"], np.sum(w * (np.asarray(z).argmax(1) == LABELS)) / w.sum())
    soft, _ = run(losses.supervised(losses.focal, class_weights=of_classes), params, batch(SOFT))
    w = SOFT @ of_classes
    close(soft, np.sum(w * np.asarray(losses.focal(z, jnp.asarray(SOFT)))) / w.sum())


@pytest.mark.parametrize("parts", [1, 3])
def test_parts_of_a_batch_join_to_the_whole(parts, params):
    rows = {**batch(np.tile(LABELS, 3)), "weights": jnp.asarray(np.arange(21) % 4, jnp.float32)}
    loss = losses.supervised(smoothing=0.1, class_weights=np.arange(1, 6, dtype=np.float32))
    each = [
        run(loss, params, {k: np.asarray(a)[i::parts] for k, a in rows.items()})
        for i in range(parts)
    ]
    weights = np.array([metrics["weight"] for _, metrics in each])
    value, metrics = run(loss, params, rows)
    close(metrics["weight"], weights.sum())
    close(value, weights @ np.array([v for v, _ in each]) / weights.sum())
    close(metrics["accuracy"], weights @ np.array([m["accuracy"] for _, m in each]) / weights.sum())


def test_a_step_in_parts_is_the_step(params):
    """Through the step that trains: weights of rows and classes, a penalty, and what each
    micro-batch weighs.
    """
    rows = {**batch(np.tile(LABELS, 2)), "weights": jnp.asarray(1 + np.arange(14) % 3, jnp.float32)}
    plain = losses.supervised(losses.focal, class_weights=np.arange(1, 6, dtype=np.float32))
    loss = losses.regularized(plain, [(".*_bias", None), (".*", "l2(0.1)")])
    found = []
    for parts in (1, 2):
        step = jax.jit(make_step(MODEL, loss, optax.sgd(1.0), accumulate=parts))
        state, metrics = step(init_state(params, optax.sgd(1.0)), rows)
        found.append(
            (
                state.params,
                {name: metrics[name] for name in ("loss", "weight", "accuracy", "penalty")},
            )
        )
    jax.tree.map(functools.partial(close, rtol=1e-4), *found)


def test_rows_without_weight_do_not_matter(params):
    loss = losses.supervised()
    filled = batch(np.append(LABELS, -1), weights=np.append(np.ones(7, np.float32), np.float32(0)))
    whole = {name: np.asarray(a)[:7] for name, a in filled.items()}
    both = jax.jit(jax.value_and_grad(lambda params, rows: loss(MODEL, params, rows)[0]))
    (one, slopes), (two, wanted) = both(params, filled), both(params, whole)
    close(one, two)
    jax.tree.map(close, slopes, wanted)
    assert float(both(params, {**filled, "weights": jnp.zeros(8)})[0]) == 0


def test_smoothing_is_for_training(params):
    rows = batch()
    plain = run(losses.classification, params, rows)[0]
    close(run(losses.classification, params, rows, train=False, smoothing=0.5)[0], plain)
    towards = run(
        losses.supervised(smoothing=1.0, means=jnp.asarray(np.eye(5)[::-1], jnp.float32)),
        params,
        rows,
    )[0]
    close(towards, run(losses.classification, params, batch(4 - LABELS))[0])
    assert run(losses.classification, params, rows, smoothing=0.5)[0] != plain


def test_accuracy_of_a_distribution_is_that_of_its_largest(params):
    rows = batch(SOFT)
    z = np.asarray(jax.jit(MODEL.apply)(params, rows["features"]).logits)
    close(
        run(losses.classification, params, rows)[1]["accuracy"],
        np.mean(z.argmax(1) == SOFT.argmax(1)),
    )


def test_regression_and_distillation(params):
    y = RNG.normal(size=(7, 5)).astype(np.float32)
    weights = np.array([1, 0, 1, 1, 3, 1, 1], np.float32)
    rows = {
        "features": batch()["features"],
        "targets": jnp.asarray(y),
        "weights": jnp.asarray(weights),
    }
    z = np.asarray(jax.jit(MODEL.apply)(params, rows["features"]).logits, np.float64)
    value, metrics = run(losses.regression(), params, rows)
    close(value, np.sum(weights * ((z - y) ** 2).mean(1)) / 8)
    assert set(metrics) == {"weight"} and float(metrics["weight"]) == 8
    distil = losses.regression(
        functools.partial(losses.kl_divergence, temperature=3.0), target="teacher"
    )
    value, _ = run(distil, params, {"features": rows["features"], "teacher": jnp.asarray(y)})
    close(
        value,
        np.mean(
            9
            * stats.entropy(special.softmax(y / 3, axis=1), special.softmax(z / 3, axis=1), axis=1)
        ),
        rtol=1e-4,
    )


# -------------------------------------------------------------------------------------------- views


def views(rows=6) -> tuple[jax.Array, jax.Array]:
    return tuple(jnp.asarray(RNG.normal(size=(rows, 4)), jnp.float32) for _ in range(2))  # pyright: ignore


def unit(x) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def nt_xent(a, b, temperature=0.5) -> np.ndarray:
    z = np.concatenate([unit(a), unit(b)])
    rows = len(a)
    s = z @ z.T / temperature
    np.fill_diagonal(s, -np.inf)
    each = -special.log_softmax(s, axis=1)[np.arange(2 * rows), np.roll(np.arange(2 * rows), rows)]
    return (each[:rows] + each[rows:]) / 2


def info_nce(a, b, temperature=0.1) -> np.ndarray:
    s = unit(a) @ unit(b).T / temperature
    rows, columns = (-np.diag(special.log_softmax(z, axis=1)) for z in (s, s.T))
    return (rows + columns) / 2


BY_HAND = {"info_nce": info_nce, "nt_xent": nt_xent}


def test_nt_xent_equals_optax():
    a, b = views()
    of_optax = jax.jit(functools.partial(optax.losses.ntxent, temperature=0.3))
    with jax.numpy_dtype_promotion("standard"):
        wanted = of_optax(jnp.concatenate([a, b]), jnp.tile(jnp.arange(6), 2))
    found = jax.jit(functools.partial(losses.nt_xent, temperature=0.3))(a, b)
    close(np.mean(found), wanted, rtol=1e-4)


@pytest.mark.parametrize("name", BY_HAND)
def test_contrastive_losses_by_hand_and_rows_that_fill_up_are_not_compared(name):
    a, b = views()
    each = jax.jit(getattr(contrasts, name))
    close(each(a, b), BY_HAND[name](a, b), rtol=1e-4)
    close(each(a, b, counts=np.arange(6) < 4)[:4], BY_HAND[name](a[:4], b[:4]), rtol=1e-4)
    slopes = jax.jit(jax.grad(lambda x: jnp.sum(each(x, jnp.zeros((3, 4))))))(
        np.zeros((3, 4), np.float32)
    )
    assert np.isfinite(slopes).all()


def test_contrastive_reads_both_views(params):
    x = RNG.normal(size=(5, 2, 6)).astype(np.float32)
    value, metrics = run(losses.contrastive(contrasts.info_nce), params, {"views": x})
    out = np.asarray(jax.jit(MODEL.apply)(params, jnp.asarray(x.reshape(10, 6))).logits).reshape(
        5, 2, 5
    )
    close(value, np.mean(info_nce(out[:, 0], out[:, 1])), rtol=1e-4)
    assert float(metrics["weight"]) == 5
    value, metrics = run(
        losses.contrastive(), params, {"views": x, "weights": np.array([1, 1, 1, 1, 0], np.float32)}
    )
    close(value, np.mean(nt_xent(out[:4, 0], out[:4, 1])), rtol=1e-4)
    assert float(metrics["weight"]) == 4


# ---------------------------------------------------------------------------------------- bad input

Z = jnp.asarray(LOGITS)
BAD = {
    "gamma: -1.0 given; allowed: a finite number of at least 0": lambda: losses.focal(
        Z, jnp.asarray(LABELS), -1.0
    ),
    "q: 2.0 given; allowed: 0 to 1": lambda: losses.generalized_cross_entropy(
        Z, jnp.asarray(LABELS), 2.0
    ),
    "alpha, beta, log_zero: 1.0, 1.0, 0.0 given": lambda: losses.symmetric_cross_entropy(
        Z, jnp.asarray(LABELS), 1.0, 1.0, 0.0
    ),
    "temperature: 0.0 given; allowed: a finite number above 0": lambda: losses.kl_divergence(
        Z, Z, 0.0
    ),
    "temperature: -1.0 given; allowed: a finite number above 0": lambda: contrasts.info_nce(
        Z, Z, -1.0
    ),
    "delta: 0.0 given; allowed: a finite number above 0": lambda: losses.huber(Z, Z, 0.0),
    "targets: the shape [7] given with outputs [7, 1]": lambda: losses.squared_error(
        Z[:, :1], Z[:, 0]
    ),
    "labels: distributions of shape [7, 4] given; allowed: 5": lambda: distribution(Z[:, :4], 5),
    "labels: the shape [7, 1] given with logits [7, 5]": lambda: losses.focal(
        Z, jnp.asarray(LABELS)[:, None]
    ),
    "smoothing: 1.5 given; allowed: 0 to 1": lambda: losses.smooth(Z, 1.5),
    "means: the shape [4, 4] given; allowed: [5, 5]": lambda: losses.smooth(Z, 0.5, jnp.eye(4)),
    "counts: [2.0, 0.0] given; allowed: at least one row": lambda: losses.balanced_weights(
        np.array([2, 0])
    ),
    "beta: 1.0 given; allowed: at least 0 and below 1": lambda: losses.effective_weights(
        np.array([2, 1]), 1.0
    ),
    "batch: features, labels given; 'targets' is needed": lambda: losses.regression()(
        MODEL, {}, batch()
    ),
    "model: a model that reads source, tokens given": lambda: losses.contrastive()(
        PAIRS, {}, {"views": jnp.ones((2, 2, 3))}
    ),
    "views: the shape [2, 3] given; allowed: [B, 2, ...]": lambda: losses.contrastive()(
        MODEL, {}, {"views": jnp.ones((2, 3))}
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises(InputError) as error:
        BAD[message]()
    assert message in str(error.value)


def test_class_weights_of_another_number(params):
    with pytest.raises(InputError, match=r"class_weights: the shape \[3\] given; allowed: \[5\]"):
        losses.supervised(class_weights=np.ones(3, np.float32))(MODEL, params, batch())
