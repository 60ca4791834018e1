"""Self-supervised learning: tasks by their definition, losses that fall, bodies that keep what they
learnt.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import data, losses, train, tree
from jaxmodel.adapt import finetune
from jaxmodel.contrib import selfsupervised as alone
from jaxmodel.data import augment
from jaxmodel.errors import InputError
from jaxmodel.models import autoencoder, bert, lenet, mlp, resnet, t5, vit
from jaxmodel.ops import Policy

KEY = jax.random.key(5)
VIT = vit.model(vit.Config(8, 2, 16, 1, 2, 32, channels=1))


def bars(count: int, side: int = 8) -> dict[str, np.ndarray]:
    """Images of one bright row or column, which is the label, with noise."""
    random = np.random.default_rng(0)
    labels = np.arange(count, dtype=np.int32) % 2
    pixels = 0.1 * random.random((count, side, side, 1))
    at = random.integers(0, side, count)
    for i, label in enumerate(labels):
        pixels[i, at[i] if label else slice(None), slice(None) if label else at[i], 0] += 0.8
    return {"pixels": pixels.astype(np.float32), "labels": labels}


IMAGES = bars(64)


def fall(
    model, stream, loss, steps: int = 30, rate: float = 3e-3, **options
) -> tuple[float, float, train.TrainState]:
    """The held-out loss before and after some steps of `fit`."""
    config = train.TrainConfig(
        steps=steps, learning_rate=rate, warmup_steps=5, eval_batches=1, **options
    )
    start = jax.jit(model.init)(jax.random.key(0))
    batch = jax.device_put(stream.batch(0))
    first = float(jax.jit(lambda p: loss(model, p, batch, None, train=False)[0])(start))
    state, history = train.fit(model, stream, config, params=start, loss=loss, heldout=stream)
    return first, history[-1]["heldout_loss"], state


def test_a_task_is_drawn_in_training_and_stands_still_held_out():
    seen = []

    def loss(model, params, batch, rng=None, *, train=True):
        seen.append((np.asarray(batch["x"]), rng, train))
        return jnp.float32(0), {}

    made = alone.pretext(
        loss, lambda key, batch: {"x": jax.random.normal(key, batch["x"].shape)}, seed=7
    )
    for rng, training in [
        (KEY, True),
        (jax.random.key(6), True),
        (KEY, False),
        (None, False),
        (None, False),
    ]:
        made(VIT, {}, {"x": jnp.zeros(4)}, rng, train=training)
    (a, *_), (b, *_), (c, *_), (d, *_), (e, *_) = seen
    assert not np.array_equal(a, b) and not np.array_equal(a, c)
    np.testing.assert_array_equal(c, d)
    np.testing.assert_array_equal(d, e)
    np.testing.assert_array_equal(c, jax.random.normal(jax.random.key(7), (4,)))
    assert seen[0][1] is KEY and [training for *_, training in seen] == [
        True,
        True,
        False,
        False,
        False,
    ]


def test_masked_patches_by_hand():
    pixels = jnp.asarray(np.random.default_rng(1).random((5, 6, 4, 3)), jnp.float32) + 0.5
    made = jax.jit(alone.masked_patches(2, 0.4))(KEY, {"pixels": pixels, "other": jnp.ones(5)})
    assert made["targets"].shape == (5, 6, 12) and made["other"].shape == (5,)
    np.testing.assert_array_equal(made["weights"].sum(axis=1), 2)  # round(0.4 * 6)
    for image in range(5):
        for t in range(6):
            y = 2 * (t // 2)
            x = 2 * (t % 2)
            place = (image, slice(y, y + 2), slice(x, x + 2))
            np.testing.assert_array_equal(made["targets"][image, t], pixels[place].ravel())
            hidden = bool(made["weights"][image, t])
            np.testing.assert_array_equal(
                made["pixels"][place], jnp.zeros((2, 2, 3)) if hidden else pixels[place]
            )
    assert (
        len({tuple(row) for row in np.asarray(made["weights"]).tolist()}) > 1
    )  # rows for themselves


def test_two_views_are_drawn_apart_and_undo_keeps_the_clean_one():
    batch = {"pixels": jnp.ones((3, 4, 4, 1)), "labels": jnp.arange(3)}
    views = alone.two_views(augment.Noise(0.3))(KEY, batch)
    assert (
        not np.array_equal(views["views"][:, 0], views["views"][:, 1])
        and views["labels"] is batch["labels"]
    )
    np.testing.assert_array_equal(
        alone.two_views(lambda key, rows: rows)(KEY, batch)["views"][:, 1], batch["pixels"]
    )
    noise = augment.Noise(0.3)
    made = alone.restored(noise)(KEY, batch)
    np.testing.assert_array_equal(made["targets"], batch["pixels"])
    np.testing.assert_array_equal(made["pixels"], noise(KEY, batch)["pixels"])
    flat = alone.restored(noise, flat=True)(KEY, batch)
    np.testing.assert_array_equal(flat["features"], made["pixels"].reshape(3, -1))
    assert flat["targets"].shape == (3, 16) and "pixels" not in flat


def test_masked_tokens_of_an_encoder():
    """A text of one token again and again: a masked one can be known from its neighbours."""
    model = bert.model(bert.Config(vocab=6, width=16, depth=1, heads=2, mlp_width=32, context=8))
    rows = np.repeat(np.arange(64)[:, None] % 4, 9, axis=1)
    loss = alone.pretext(losses.next_token, augment.SpanMasking(token=4, vocab=4, rate=0.2))
    first, last, _ = fall(model, data.Stream(rows, 16), loss, steps=60, rate=2e-2)
    assert first > 1.5 and last < 1.0  # a guess among the four is 1.39


def test_spans_of_an_encoder_with_decoder():
    model = t5.model(t5.Config(8, 16, 1, 1, 2, 8, 32, buckets=8, distance=6))
    rows = (np.arange(9)[None] + np.arange(64)[:, None]) % 4 + 2
    loss = alone.pretext(losses.next_token, augment.SpanCorruption(first=7))
    first, last, _ = fall(model, data.Stream(rows, 16), loss, rate=1e-2)
    assert last < first / 2


def test_hidden_patches_of_an_image():
    """Only hidden patches count, and they can be told from the rest of the bar."""
    model = alone.with_projection(VIT, mlp.model(mlp.Config(16, (32,), 4)), tokens=16)
    loss = alone.pretext(losses.regression(alone.patch_error), alone.masked_patches(2, 0.5))
    batch = jax.device_put(data.Stream({"pixels": IMAGES["pixels"]}, 16).batch(0))
    params = jax.jit(model.init)(jax.random.key(0))
    value, metrics = jax.jit(lambda p: loss(model, p, batch, None, train=False))(params)
    made = alone.masked_patches(2, 0.5)(jax.random.key(0), batch)
    out = jax.jit(model.apply)(params, made["pixels"]).logits
    assert out.shape == (16, 16, 4) and metrics["weight"] == 16 * 8
    each = np.asarray((out - made["targets"]) ** 2).mean(-1)
    np.testing.assert_allclose(value, each[np.asarray(made["weights"]) > 0].mean(), rtol=1e-5)
    first, last, _ = fall(
        model, data.Stream({"pixels": IMAGES["pixels"]}, 16), loss, steps=40, rate=1e-2
    )
    assert last < 0.8 * first


def test_noise_taken_away_by_an_autoencoder():
    model = autoencoder.model(autoencoder.Config(64, 32))
    loss = alone.pretext(losses.regression(), alone.restored(augment.Noise(0.3), flat=True))
    first, last, _ = fall(model, data.Stream(IMAGES, 16), loss, steps=60, rate=1e-2)
    assert last < 0.6 * first


def test_two_views_teach_what_a_linear_head_reads():
    """SimCLR from start to end: views, projection, another head on a body that no longer trains."""
    body = lenet.model(lenet.Config((8,), (16,), 8, 2))
    head = mlp.model(mlp.Config(16, (16,), 8))
    model = alone.with_projection(body, head)
    views = alone.two_views(augment.parse("noise(0.1) | random_crop(2)"))
    loss = alone.pretext(
        losses.contrastive(functools.partial(losses.nt_xent, temperature=0.5)), views
    )
    stream = data.Stream(IMAGES, 32)
    first, last, state = fall(model, stream, loss, steps=40, rate=1e-2)
    assert last < first - 0.1
    learnt, params = finetune.replace_head(
        body, alone.without_projection(state.params), 2, jax.random.key(9)
    )
    rules = finetune.last_layers(learnt, params, 0)
    config = train.TrainConfig(
        steps=40, learning_rate=3e-2, warmup_steps=5, trainable=rules, weight_decay=0.0
    )
    probe, history = train.fit(
        learnt, stream, config, params=params, loss=losses.classification, heldout=stream
    )
    assert history[-1]["heldout_accuracy"] > 0.9
    np.testing.assert_array_equal(
        probe.params["conv1"], state.params["conv1"]
    )  # the body is as it was


@pytest.mark.parametrize(
    ("body", "width"),
    [(lenet.model(lenet.SIZES["tiny"]), 64), (resnet.model(resnet.SIZES["tiny"]), 32), (VIT, 16)],
    ids=["lenet", "resnet", "vit"],
)
def test_a_projection_reads_what_the_body_gives(body, width):
    head = mlp.model(mlp.Config(width, (8,), 3))
    model = alone.with_projection(body, head)
    assert alone.with_projection(body, head) is model  # so that nothing is traced twice
    params = jax.jit(model.init)(jax.random.key(0))
    assert not any(path.startswith("head") for path in tree.flatten(params))
    tree.assign(model.rules, params)
    pixels = jnp.asarray(
        np.random.default_rng(0).random(body.inputs(2, 1)["pixels"].shape), jnp.float32
    )
    hidden = jax.jit(body.hidden)(params, pixels).hidden
    mean = hidden.reshape(2, -1, hidden.shape[-1]).mean(axis=1)
    logits = jax.jit(model.apply)(params, pixels).logits
    np.testing.assert_allclose(logits, head.apply(params["projection"], mean).logits, atol=1e-5)
    half = model.with_policy(Policy(compute_dtype="bfloat16"))
    assert half.policy.compute_dtype == "bfloat16" and jax.eval_shape(
        half.apply, params, pixels
    ).logits.shape == (2, 3)


def test_bad_input_is_refused():
    shapes = jax.eval_shape(VIT.init, KEY)
    pixels = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
    with pytest.raises(InputError, match="rate: 1.0 given; allowed: above 0 and below 1"):
        alone.masked_patches(2, 1.0)
    with pytest.raises(
        InputError, match="patch: 3 given; allowed: a divisor of the image's 8 x 8 pixels"
    ):
        alone.masked_patches(3)(KEY, {"pixels": jnp.zeros((1, 8, 8, 1))})
    with pytest.raises(InputError, match="batch: labels given; 'pixels' is needed"):
        alone.two_views(augment.Noise())(KEY, {"labels": jnp.zeros(2)})
    with pytest.raises(InputError, match="head: it reads 5 numbers; allowed: 16"):
        narrow = alone.with_projection(VIT, mlp.model(mlp.Config(5, (8,), 3)))
        jax.eval_shape(narrow.apply, shapes, pixels)
    with pytest.raises(
        InputError, match="head: it reads source, tokens; allowed: a model of one input"
    ):
        alone.with_projection(VIT, t5.model(t5.SIZES["tiny"]))
    with pytest.raises(InputError, match="tokens: 99 given; the model's body gives"):
        wide = alone.with_projection(VIT, mlp.model(mlp.Config(16, (8,), 3)), tokens=99)
        jax.eval_shape(wide.apply, shapes, pixels)
