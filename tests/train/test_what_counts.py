"""What does not count does not: targets of -100, rows of weight 0 wherever rows meet, rows that
fill a held-out batch up.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import contrib, data, losses, train
from jaxmodel.data import augment
from jaxmodel.errors import InputError
from jaxmodel.models import autoencoder, densenet, gpt2, mlp, resnet

RANDOM = np.random.default_rng(5)
KEY = jax.random.key(3)


def log_softmax(z):
    z = np.asarray(z, np.float64)
    return (
        z
        - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - z.max(-1, keepdims=True)
    )


# ------------------------------------------------------------------------------------------ targets

TEXT = gpt2.model(gpt2.Config(150, 16, 1, 2, 16))
TOKENS = RANDOM.integers(0, 150, (3, 6)).astype(np.int32)
TARGETS = RANDOM.integers(0, 150, (3, 6)).astype(np.int32)
COUNTS = RANDOM.random((3, 6)) < 0.5


@functools.cache
def text_params():
    return jax.jit(TEXT.init)(jax.random.key(1))


@functools.cache
def text_program(chunk):
    loss = functools.partial(losses.next_token, chunk=chunk)
    return jax.jit(jax.value_and_grad(lambda p, batch: loss(TEXT, p, batch), has_aux=True))


@functools.cache
def text_logp():
    return log_softmax(jax.jit(TEXT.apply)(text_params(), jnp.asarray(TOKENS)).logits)


def text_loss(batch, chunk=None):
    (value, metrics), grads = text_program(chunk)(text_params(), jax.tree.map(jnp.asarray, batch))
    return float(value), float(metrics["weight"]), grads


@pytest.mark.parametrize("chunk", [None, 2])
def test_targets_of_minus_100_are_left_out(chunk):
    logp = text_logp()
    want = -np.take_along_axis(logp, TARGETS[..., None], -1)[..., 0][COUNTS].mean()
    left_out = np.where(COUNTS, TARGETS, -100)
    value, weight, grads = text_loss({"tokens": TOKENS, "targets": left_out}, chunk)
    assert value == pytest.approx(want, rel=1e-5) and weight == COUNTS.sum()
    for filler in (-100, -1, 10**6):  # behind a weight of 0 any number may stand
        batch = {
            "tokens": TOKENS,
            "targets": np.where(COUNTS, TARGETS, filler),
            "weights": COUNTS.astype(np.float32),
        }
        other, _, theirs = text_loss(batch, chunk)
        assert other == value
        jax.tree.map(np.testing.assert_array_equal, grads, theirs)
    rows = {"tokens": TOKENS, "targets": TARGETS, "weights": np.array([1, 0, 2], np.float32)}
    each = -np.take_along_axis(logp, TARGETS[..., None], -1)[..., 0].mean(1)
    assert text_loss(rows)[0] == pytest.approx((each[0] + 2 * each[2]) / 3, rel=1e-5)


@pytest.mark.parametrize(("name", "wrong"), [("targets", -1), ("targets", -99), ("tokens", -1)])
def test_a_token_that_is_none_is_named_in_whatever_batch(name, wrong):
    rows = {"tokens": np.repeat(TOKENS, 8, 0), "targets": np.repeat(TARGETS, 8, 0)}
    rows[name] = rows[name].copy()
    rows[name][17, 2] = wrong
    with pytest.raises(
        InputError, match=rf"data: {name} hold {wrong} in row 17; allowed: 0 to 149"
    ):
        train.fit(TEXT, data.Stream(rows, 4), train.TrainConfig(steps=12))


# ------------------------------------------------------------------------------------------- labels

CLASSES = mlp.model(mlp.Config(4, (6,), 3))
ROWS = {
    "features": RANDOM.normal(size=(40, 4)).astype(np.float32),
    "labels": RANDOM.integers(0, 3, 40).astype(np.int32),
}


@pytest.mark.parametrize(
    "loss",
    [
        losses.classification,
        losses.supervised(smoothing=0.1),
        losses.regularized(losses.classification, [("head", "l2(1e-3)"), (".*", None)]),
    ],
)
@pytest.mark.parametrize("wrong", [3, -1, 255])
def test_a_label_that_is_none_is_named(loss, wrong):
    labels = ROWS["labels"].copy()
    labels[23] = wrong
    with pytest.raises(
        InputError, match=rf"data: labels hold {wrong} in row 23; allowed: 0 to 2, or -100"
    ):
        train.fit(
            CLASSES,
            data.Stream({**ROWS, "labels": labels}, 8),
            train.TrainConfig(steps=6),
            loss=loss,
        )
    with pytest.raises(InputError, match=rf"heldout: labels hold {wrong} in row 23"):
        held = data.Stream({**ROWS, "labels": labels}, 16)
        train.fit(
            CLASSES, data.Stream(ROWS, 8), train.TrainConfig(steps=1), loss=loss, heldout=held
        )


def test_labels_of_minus_100_and_behind_a_weight_of_0():
    params = jax.jit(CLASSES.init)(KEY)
    logp = log_softmax(jax.jit(CLASSES.apply)(params, jnp.asarray(ROWS["features"])).logits)
    want = -logp[np.arange(20), ROWS["labels"][:20]].mean()
    labels = np.where(np.arange(40) < 20, ROWS["labels"], -100).astype(np.int32)
    batch = jax.tree.map(jnp.asarray, {**ROWS, "labels": labels})
    value, metrics = jax.jit(lambda p, batch: losses.classification(CLASSES, p, batch))(
        params, batch
    )
    assert float(value) == pytest.approx(want, rel=1e-5) and metrics["weight"] == 20


@pytest.mark.parametrize(
    "labels", [np.array(["a", "b"] * 4), np.array([True, False] * 4), np.array([None, 1] * 4)]
)
def test_labels_that_are_no_numbers(labels):
    rows = {"features": ROWS["features"][:8], "labels": labels}
    with pytest.raises(InputError, match="allowed: ") as error:
        train.fit(
            CLASSES, data.Stream(rows, 8), train.TrainConfig(steps=1), loss=losses.classification
        )
    assert "labels" in str(error.value) and "\n" not in str(error.value)


def test_a_bad_step_that_no_label_explains_stays_one():
    rows = {**ROWS, "features": ROWS["features"].copy()}
    rows["features"][3] = np.inf
    _, found = train.fit(
        CLASSES,
        data.Stream(rows, 8),
        train.TrainConfig(steps=5, log_every=1),
        loss=losses.classification,
    )
    assert sum(row["bad"] for row in found) == 1


def test_targets_that_are_not_known_may_be_nan():
    values = RANDOM.normal(size=(6, 3)).astype(np.float32)
    batch = {
        "features": ROWS["features"][:6],
        "targets": values,
        "weights": np.array([1, 1, 0, 1, 0, 1], np.float32),
    }
    blank = {**batch, "targets": np.where(batch["weights"][:, None] > 0, values, np.nan)}
    run = jax.jit(jax.value_and_grad(lambda p, batch: losses.regression()(CLASSES, p, batch)[0]))
    params = jax.jit(CLASSES.init)(KEY)
    jax.tree.map(np.testing.assert_array_equal, run(params, batch), run(params, blank))


def test_an_autoencoder_reads_weights():
    model = autoencoder.model(autoencoder.Config(4, 3, kind="variational"))
    params = jax.jit(model.init)(KEY)
    x = ROWS["features"][:6]
    filled = {
        "features": np.concatenate([x, 9 + x[:2]]),
        "weights": np.repeat([1, 0], [6, 2]).astype(np.float32),
    }
    run = jax.jit(lambda batch: losses.autoencoder(model, params, batch, train=False)[1])
    want = run({"features": x})
    got = run(filled)
    assert got["weight"] == 6 and float(got["reconstruction"]) == pytest.approx(
        float(want["reconstruction"]), rel=1e-5
    )


# ---------------------------------------------------------------------------------- where rows meet

FAMILIES = {
    "resnet": resnet.model(resnet.Config((1, 1), 4, classes=3, size=8, channels=1, small=True)),
    "densenet": densenet.model(
        densenet.Config((1, 1), 4, classes=3, size=8, channels=1, small=True)
    ),
}
PIXELS = RANDOM.random((6, 8, 8, 1)).astype(np.float32)
LABELS = np.array([0, 1, 2, 0, 1, 2], np.int32)


@functools.cache
def whole(family):
    """Parameters, a program of loss and gradients, what it makes of whole rows, and their
    statistics.
    """
    model = FAMILIES[family]
    params = jax.jit(model.init)(KEY)
    run = jax.jit(jax.value_and_grad(lambda p, batch: losses.classification(model, p, batch)[0]))
    return (
        params,
        run,
        run(params, {"pixels": PIXELS, "labels": LABELS}),
        train.recalibrate_batch_norm(model, params, [PIXELS]),
    )


@pytest.mark.parametrize("places", [(6, 7), (0, 3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_batch_norms_do_not_see_rows_without_weight(family, places):
    params, run, want, alone = whole(family)
    keep = [i for i in range(8) if i not in places]
    pixels = np.full((8, 8, 8, 1), 50, np.float32)
    labels = np.full(8, -1, np.int32)
    pixels[keep], labels[keep] = PIXELS, LABELS
    weights = np.isin(np.arange(8), keep).astype(np.float32)
    got = run(params, {"pixels": pixels, "labels": labels, "weights": weights})
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-5), got, want)
    found = train.recalibrate_batch_norm(
        FAMILIES[family], params, [{"pixels": pixels, "weights": weights}]
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), found, alone)


@pytest.mark.parametrize("text", ["mixup(3, alpha=1.0)", "cut_mix(3)"])
@pytest.mark.parametrize("filler", [-1, 0, -100])
def test_mixing_leaves_out_rows_without_weight(text, filler):
    change = augment.parse(text)
    marked = np.broadcast_to(
        np.arange(6, dtype=np.float32)[:, None, None, None] / 10, (6, 8, 8, 1)
    ).copy()
    marked[[2, 5]] = 7.0
    labels = np.where(np.isin(np.arange(6), [2, 5]), filler, LABELS).astype(np.int32)
    batch = {"pixels": marked, "labels": labels}
    if filler != -100:
        batch["weights"] = np.array([1, 1, 0, 0.5, 1, 0], np.float32)
    out = jax.jit(change)(KEY, batch)
    for i in (0, 1, 3, 4):
        assert np.asarray(out["pixels"][i]).max() < 1, "something of a row that does not count"
        assert np.asarray(out["labels"][i]).sum() == pytest.approx(1)
    np.testing.assert_array_equal(out["weights"] > 0, [True, True, False, True, True, False])
    np.testing.assert_array_equal(out["pixels"][np.array([2, 5])], marked[[2, 5]])
    params, run, *_ = whole("resnet")
    assert np.isfinite(float(run(params, out)[0]))
    if filler != -100:  # row 3 is mixed with row 1, the last before it that counts
        assert np.asarray(out["labels"][3])[2] == 0


def test_tasks_keep_the_weight_of_rows():
    weights = jnp.array([1.0, 0.0, 0.5])
    patches = jax.jit(contrib.masked_patches(2))(
        KEY, {"pixels": jnp.ones((3, 4, 4, 1)), "weights": weights}
    )["weights"]
    assert patches[1].max() == 0 and patches[2].max() == 0.5
    for text in ("span_masking(9, 10, rate=0.9)", "span_corruption(30)"):
        task = jax.jit(augment.parse(text))
        made = task(KEY, {"tokens": jnp.ones((3, 8), jnp.int32), "weights": weights})["weights"]
        assert made[1].max() == 0 and made[0].max() == 1


# ------------------------------------------------------------------------------------ held-out rows


def judged(model, rows, batch, seed, params, loss=losses.classification, **settings):
    config = train.TrainConfig(steps=1, learning_rate=0.0, **settings)
    held = data.Stream(rows, batch, seed)
    _, found = train.fit(
        CLASSES if model is None else model,
        data.Stream(ROWS, 8),
        config,
        params=params,
        loss=loss,
        heldout=held,
    )
    return found[-1]


@pytest.mark.parametrize("batch", [1, 7, 40, 64])
@pytest.mark.parametrize("seed", [0, 9])
def test_each_held_out_row_is_judged_once(batch, seed):
    params = jax.jit(CLASSES.init)(KEY)
    logp = log_softmax(jax.jit(CLASSES.apply)(params, jnp.asarray(ROWS["features"])).logits)
    row = judged(None, ROWS, batch, seed, params)
    assert row["heldout_loss"] == pytest.approx(
        -logp[np.arange(40), ROWS["labels"]].mean(), rel=1e-5
    )
    assert row["heldout_accuracy"] == pytest.approx((logp.argmax(1) == ROWS["labels"]).mean())


def test_a_loss_that_reads_no_weights_gets_no_row_that_fills_up():
    def mine(model, params, batch, rng=None, *, train=True):
        value = jnp.mean(batch["features"][:, 0])
        return value + 0 * jnp.sum(params["head"]), {"weight": jnp.float32(len(batch["features"]))}

    row = judged(None, ROWS, 9, 0, jax.jit(CLASSES.init)(KEY), loss=mine)
    assert row["heldout_loss"] == pytest.approx(ROWS["features"][:, 0].mean(), abs=1e-6)


def test_tokens_and_rows_with_weights_of_their_own():
    windows = {"tokens": TOKENS, "targets": TARGETS, "weights": COUNTS.astype(np.float32)}
    logp = text_logp()
    want = -np.take_along_axis(logp, TARGETS[..., None], -1)[..., 0][COUNTS].mean()
    config = train.TrainConfig(steps=1, learning_rate=0.0)
    _, found = train.fit(
        TEXT, data.Stream(windows, 3), config, params=text_params(), heldout=data.Stream(windows, 2)
    )
    assert found[-1]["heldout_loss"] == pytest.approx(want, rel=1e-5)


def test_a_limit_takes_the_same_rows_whatever_the_batch():
    params = jax.jit(CLASSES.init)(KEY)
    found = {
        judged(None, ROWS, batch, 4, params, eval_rows=18)["heldout_loss"]
        for batch in (3, 8, 18, 30)
    }
    assert max(found) - min(found) < 1e-5
    first = data.Stream(ROWS, 18, 4).batch(0)
    logp = log_softmax(jax.jit(CLASSES.apply)(params, jnp.asarray(first["features"])).logits)
    assert found.pop() == pytest.approx(-logp[np.arange(18), first["labels"]].mean(), rel=1e-5)


def test_a_stream_without_an_end_is_judged_by_its_first_batches():
    both = data.Mixture([(data.Stream(ROWS, 5), 1), (data.Stream(ROWS, 5, 1), 1)], 10)
    config = train.TrainConfig(steps=1, learning_rate=0.0, eval_batches=3)
    params = jax.jit(CLASSES.init)(KEY)
    _, rows = train.fit(
        CLASSES,
        data.Stream(ROWS, 8),
        config,
        params=params,
        loss=losses.classification,
        heldout=both,
    )
    want = [
        float(
            losses.classification(
                CLASSES, params, jax.tree.map(jnp.asarray, both.batch(i)), train=False
            )[0]
        )
        for i in range(3)
    ]
    assert rows[-1]["heldout_loss"] == pytest.approx(np.mean(want), rel=1e-5)
