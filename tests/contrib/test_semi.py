"""Semi-supervised losses: equal to their definition by hand, no gradient into targets, and rows
without labels help.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodel import data, losses, train
from jaxmodel.contrib import semi
from jaxmodel.errors import InputError
from jaxmodel.models import mlp
from jaxmodel.train.state import init_state
from jaxmodel.train.step import make_step

WIDTH = 16
LABELLED = 4
EACH = 8
MODEL = mlp.model(mlp.Config(WIDTH, (32,), 2))


def blobs(count: int, seed: int) -> dict[str, np.ndarray]:
    """Two clouds that one of many directions tells apart, which a few rows do not show."""
    random = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int32) % 2
    x = random.normal(size=(count, WIDTH))
    x[:, 0] += 5 * labels - 2.5
    return {"features": (x / 2).astype(np.float32), "labels": labels}


def jitter(deviation: float):
    noise = lambda key, x: x + deviation * jax.random.normal(key, x.shape)
    return lambda key, batch: {**batch, "features": noise(key, batch["features"])}


def shifted(by: float):
    """An augmentation without randomness."""
    return lambda key, batch: {**batch, "features": batch["features"] + jnp.float32(by)}


MANY = blobs(400, 0)
TEST = blobs(400, 1)
FEW = data.subset(MANY, np.arange(4))
PAIRS = data.WithUnlabelled(
    data.Stream(FEW, LABELLED), data.Stream({"features": MANY["features"]}, LABELLED * EACH)
)
RNG = jax.random.key(3)


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def batch():
    made = {**PAIRS.batch(0), "weights": np.array([1.0, 0.5, 0.0, 2.0], np.float32)}
    made["labels"][2] = -1  # of a row that fills the batch up
    return jax.device_put(made)


def said(params, features) -> np.ndarray:
    """Probabilities, in float64."""
    z = np.asarray(jax.jit(MODEL.apply)(params, features).logits, np.float64)
    return np.exp(z) / np.exp(z).sum(-1, keepdims=True)


def nats(p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return -np.log(np.take_along_axis(p, labels[:, None], -1)[:, 0])


def mean(values: np.ndarray, weights: np.ndarray) -> float:
    """Of the unlabelled rows of each labelled one, weighted as it is."""
    return float((values.reshape(LABELLED, EACH).mean(1) * weights).sum() / weights.sum())


def unlabelled(batch) -> jax.Array:
    return batch["unlabelled_features"].reshape(-1, WIDTH)


def labelled_part(params, batch, shift: float = 0.0) -> float:
    w = np.asarray(batch["weights"])
    t = np.maximum(np.asarray(batch["labels"]), 0)
    return float((nats(said(params, batch["features"] + shift), t) * w).sum() / w.sum())


def state_of(params, step: int = 0, average=None) -> train.TrainState:
    return train.TrainState(
        jnp.int32(step),
        jnp.int32(step),
        params,
        (),
        {} if average is None else {"average": average},
    )


@pytest.mark.parametrize("threshold", [0.0, 0.6, 1.0])
def test_fixmatch_is_its_definition(threshold, params, batch):
    loss = semi.fixmatch(shifted(0.1), shifted(-0.3), threshold=threshold, weight=0.7)
    value, metrics = jax.jit(lambda p: loss(MODEL, p, batch, RNG))(params)
    q = said(params, unlabelled(batch) + 0.1)
    p = said(params, unlabelled(batch) - 0.3)
    sure = q.max(-1) >= threshold
    w = np.asarray(batch["weights"])
    u = mean(sure * nats(p, q.argmax(-1)), w)
    np.testing.assert_allclose(value, labelled_part(params, batch, 0.1) + 0.7 * u, rtol=1e-5)
    found = [metrics[name] for name in ("unlabelled_loss", "confident", "weight")]
    np.testing.assert_allclose(found, [u, mean(sure, w), 3.5], rtol=1e-5)
    assert threshold in (0.0, 1.0) or 0 < metrics["confident"] < 1


def test_alignment_is_its_definition(params, batch):
    value, metrics = jax.jit(
        lambda p: semi.fixmatch(None, None, threshold=0.6, align=True)(MODEL, p, batch, RNG)
    )(params)
    p = said(params, unlabelled(batch))
    w = np.asarray(batch["weights"])
    q = p / p[np.repeat(w > 0, len(p) // len(w))].mean(
        0
    )  # rows that fill the batch up do not count
    q /= q.sum(-1, keepdims=True)
    assert np.any(q.argmax(-1) != p.argmax(-1))
    sure = q.max(-1) >= 0.6
    u = mean(sure * nats(p, q.argmax(-1)), w)
    np.testing.assert_allclose(
        [value, metrics["confident"]], [labelled_part(params, batch) + u, mean(sure, w)], rtol=1e-5
    )


def test_pseudo_labels_are_those_of_the_rows_as_they_stand(params, batch):
    ramp = functools.partial(semi.linear_ramp, begin=10, end=20)
    loss = semi.pseudo_label(shifted(0.2), ramp=ramp)
    run = jax.jit(lambda state: loss(MODEL, params, batch, RNG, state=state)[0])
    values = [run(state_of(params, step)) for step in (0, 15, 90)]
    p = said(params, unlabelled(batch) + 0.2)
    q = said(params, unlabelled(batch))
    u = mean(nats(p, q.argmax(-1)), np.asarray(batch["weights"]))
    np.testing.assert_allclose(
        values, labelled_part(params, batch, 0.2) + 3.0 * np.array([0, 0.5, 1]) * u, rtol=1e-5
    )


def test_the_mean_teacher_is_the_average(params, batch):
    other = jax.tree.map(lambda a: 2 * a, params)
    loss = semi.mean_teacher(
        shifted(0.2), weight=5.0, ramp=functools.partial(semi.sigmoid_ramp, steps=10)
    )
    value, metrics = loss(MODEL, params, batch, RNG, state=state_of(params, 5, other))
    x = unlabelled(batch) + 0.2
    p = said(params, x)
    q = said(other, x)
    w = np.asarray(batch["weights"])
    u = mean(((p - q) ** 2).mean(-1), w)
    np.testing.assert_allclose(metrics["unlabelled_loss"], u, rtol=1e-4)
    np.testing.assert_allclose(
        value, labelled_part(params, batch, 0.2) + 5 * np.exp(-1.25) * u, rtol=1e-5
    )
    np.testing.assert_allclose(metrics["agree"], mean(p.argmax(-1) == q.argmax(-1), w), rtol=1e-5)


def test_no_gradient_flows_into_targets(params, batch):
    """What the weak view says is a constant: the gradient is that of a loss whose labels were
    computed beforehand.
    """
    only = {**batch, "weights": jnp.ones(LABELLED)}

    def direct(p):
        q = jax.lax.stop_gradient(MODEL.apply(params, unlabelled(batch) + 0.1).logits)
        x = jnp.concatenate([batch["features"] + 0.1, unlabelled(batch) - 0.3])
        labels = jnp.concatenate([jnp.maximum(batch["labels"], 0), jnp.argmax(q, axis=-1)])
        each = optax.softmax_cross_entropy_with_integer_labels(MODEL.apply(p, x).logits, labels)
        return jnp.mean(each[:LABELLED]) + jnp.mean(each[LABELLED:])

    only["labels"] = jnp.maximum(batch["labels"], 0)
    loss = semi.fixmatch(shifted(0.1), shifted(-0.3), threshold=0.0)
    found, want = (
        jax.jit(jax.grad(fn))(params) for fn in (lambda p: loss(MODEL, p, only, RNG)[0], direct)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, want)
    # nor does a label that only the weak view could move have one
    blind = semi.fixmatch(None, lambda key, rows: {"features": 0 * rows["features"]}, threshold=0.0)
    slope = jax.jit(
        jax.grad(lambda x: blind(MODEL, params, {**only, "unlabelled_features": x}, RNG)[0])
    )
    assert not np.any(slope(only["unlabelled_features"]))


def test_no_gradient_flows_into_the_teacher(params, batch):
    """The state's own parameters may be what is differentiated, as in a step: as its average they
    are constant.
    """
    loss = semi.mean_teacher(weight=5.0)
    alone = jax.jit(
        jax.grad(lambda p: loss(MODEL, p, batch, RNG, state=state_of(params, 0, params))[0])
    )(params)
    labelled = {name: a for name, a in batch.items() if not name.startswith("unlabelled")}
    want = jax.jit(jax.grad(lambda p: losses.classification(MODEL, p, labelled)[0]))(params)
    # a teacher that says the same moves nothing, while one that moved along would
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), alone, want)


def test_held_out_losses_are_those_of_the_labels(params, batch):
    labelled = {name: a for name, a in batch.items() if not name.startswith("unlabelled")}
    want = losses.classification(MODEL, params, labelled, train=False)
    for loss in (
        semi.fixmatch(jitter(1.0), jitter(1.0)),
        semi.mean_teacher(jitter(1.0)),
        semi.pseudo_label(jitter(1.0)),
    ):
        for given in (batch, labelled):
            jax.tree.map(
                np.testing.assert_array_equal, loss(MODEL, params, given, train=False), want
            )


def step_of(loss, params, **options):
    optimizer = optax.sgd(0.1)
    average = options.pop("average", 0.0)
    step = jax.jit(make_step(MODEL, loss, optimizer, average=average, **options))
    return step, init_state(params, optimizer, average=average > 0)


@pytest.mark.parametrize(
    "loss",
    [
        semi.fixmatch(shifted(0.1), shifted(-0.3), threshold=0.6),
        semi.mean_teacher(
            shifted(0.1), weight=3.0, ramp=functools.partial(semi.sigmoid_ramp, steps=4)
        ),
    ],
    ids=["fixmatch", "mean_teacher"],
)
def test_micro_batches_give_the_gradient_of_the_whole_batch(loss, params, batch):
    ends = []
    for parts in (1, 2):
        step, state = step_of(loss, params, accumulate=parts, average=0.5)
        for _ in range(2):
            state, metrics = step(state, batch)
        ends.append((state.params, metrics))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *ends)


def test_a_step_hands_over_its_state(params, batch):
    """The average before the step, its number, and only to a loss that asks for them."""

    def loss(model, params, batch, rng, *, train=True, state=None):
        moved = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), params, state.extra["average"])
        return jnp.sum(params["head_bias"]), {
            "weight": jnp.float32(1),
            "at": state.step,
            "moved": sum(jax.tree.leaves(moved)),
        }

    step, state = step_of(functools.partial(loss), params, average=0.9)
    for i in range(3):
        behind = jax.tree.map(
            lambda a, b: float(jnp.sum((a - b) ** 2)), state.params, state.extra["average"]
        )
        state, metrics = step(state, batch)
        assert int(metrics["at"]) == i
        np.testing.assert_allclose(metrics["moved"], sum(jax.tree.leaves(behind)), rtol=1e-5)
    assert behind["head_bias"] > 0
    np.testing.assert_allclose(state.params["head_bias"], params["head_bias"] - 0.3, rtol=1e-5)


def test_rows_without_labels_help():
    config = train.TrainConfig(
        steps=80, learning_rate=1e-2, warmup_steps=10, weight_decay=0.0, ema_decay=0.95
    )
    heldout = data.Stream(TEST, 400)

    def accuracy(loss, stream=PAIRS, augment=None) -> float:
        _, history = train.fit(MODEL, stream, config, loss=loss, augment=augment, heldout=heldout)
        return history[-1]["heldout_accuracy"]

    alone = accuracy(losses.classification, PAIRS.stream, jitter(0.2))
    ramp = functools.partial(semi.linear_ramp, begin=10, end=40)
    assert alone < 0.94
    assert accuracy(semi.fixmatch(jitter(0.1), jitter(0.4), threshold=0.9)) > alone + 0.03
    assert (
        accuracy(semi.pseudo_label(jitter(0.2), threshold=0.8, weight=1.0, ramp=ramp))
        > alone + 0.03
    )
    ramp = functools.partial(semi.sigmoid_ramp, steps=40)
    assert accuracy(semi.mean_teacher(jitter(0.2), weight=40.0, ramp=ramp)) > alone + 0.02


def test_a_mesh_changes_nothing(devices8):
    """Labelled rows and what comes with them, and the teacher, cut over eight devices, in `fit`."""
    program = """
import jax, numpy as np
from jaxmodel import contrib, data, train
from jaxmodel.models import mlp

random = np.random.default_rng(0)
few = {
    "features": random.normal(size=(16, 6)).astype(np.float32),
    "labels": np.arange(16, dtype=np.int32) % 3,
}
pairs = data.WithUnlabelled(
    data.Stream(few, 8),
    data.Stream({"features": random.normal(size=(64, 6)).astype(np.float32)}, 16),
)
jitter = lambda key, rows: {
    "features": rows["features"] + 0.1 * jax.random.normal(key, rows["features"].shape)
}
config = train.TrainConfig(steps=3, log_every=1, ema_decay=0.5)
model = mlp.model(mlp.Config(6, (8,), 3))
losses = []
for mesh in (None, jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
    losses.append(
        [
            row["loss"]
            for row in train.fit(
                model, pairs, config, loss=contrib.mean_teacher(jitter), mesh=mesh
            )[1]
        ]
    )
np.testing.assert_allclose(*losses, rtol=1e-5)
print("same")
"""
    assert devices8(program).split() == ["same"]


def test_bad_input_is_refused(params, batch):
    with pytest.raises(InputError, match="threshold: 1.5 given; allowed: 0 to 1"):
        semi.fixmatch(None, None, threshold=1.5)
    with pytest.raises(
        InputError, match="weight: -1.0 given; allowed: a finite number of at least 0"
    ):
        semi.mean_teacher(weight=-1.0)
    with pytest.raises(InputError, match="average: 0 given; allowed: a decay such as 0.99"):
        semi.mean_teacher()(MODEL, params, batch, RNG, state=state_of(params))
    with pytest.raises(InputError, match="ramp: it needs the step of the training state"):
        semi.pseudo_label(ramp=functools.partial(semi.linear_ramp, begin=0, end=9))(
            MODEL, params, batch, RNG
        )
    with pytest.raises(InputError, match="rng: None given"):
        semi.fixmatch(None, None)(MODEL, params, batch)
    with pytest.raises(
        InputError, match="batch: features, labels given; 'labels' and 'unlabelled_...' are needed"
    ):
        semi.fixmatch(None, None)(MODEL, params, jax.device_put(FEW), RNG)
    with pytest.raises(InputError, match="begin, end: 9, 9 given"):
        semi.linear_ramp(jnp.int32(0), 9, 9)
    with pytest.raises(InputError, match="threshold: -1.0 given"):
        semi.pseudo_labels(np.zeros((2, 2)), -1.0)
