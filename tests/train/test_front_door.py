"""`fit` takes what people have: arrays, pairs, lists, iterables of batches, bundles, their own
loss; and says what it wants.
"""

from __future__ import annotations

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodel import checkpoint, data, distributed, hub, losses, train, tree
from jaxmodel.data.given import Listed, Passed, as_batches, fill
from jaxmodel.errors import InputError
from jaxmodel.models import autoencoder, gpt2, mlp

MODEL = mlp.model(mlp.Config(4, (8,), 3))
X = np.random.default_rng(0).normal(size=(40, 4))  # float64, as people have it
Y = np.argmax(X[:, :3], axis=1)  # int64
CONFIG = train.TrainConfig(steps=6, log_every=1)
STREAM = data.Stream({"features": X.astype(np.float32), "labels": Y.astype(np.int32)}, 8)
WHOLE = [STREAM.batch(i) for i in range(5)]
UNCHECKED = inspect.unwrap(train.fit)  # without the check of types that tests have
PAIRS = [(batch["features"], batch["labels"]) for batch in WHOLE]


class Tensor:
    """What stands for a tensor of torch: no array, but one comes out of it."""

    def __init__(self, array):
        self._array = array
        self.shape = array.shape
        self.dtype = str(array.dtype)

    def detach(self):
        return self

    def cpu(self):
        return self

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self._array, dtype)


class Loader:
    """What stands for a DataLoader: it can be gone through again, and gives lists of tensors."""

    def __iter__(self):
        return ([Tensor(x), Tensor(y)] for x, y in PAIRS)


def curve(history):
    return [row["loss"] for row in history]


@pytest.fixture(scope="module")
def wanted():
    """The oracle: the same batches by a `Stream`, with the loss said."""
    return curve(
        train.fit(MODEL, STREAM, dataclasses.replace(CONFIG, steps=5), loss=losses.classification)[
            1
        ]
    )


FORMS = {
    "a list of dicts": WHOLE,
    "a list of pairs": PAIRS,
    "a generator": lambda: (batch for batch in WHOLE),
    "a loader": Loader(),
    "a loader of int64": [(x.astype(np.float64), y.astype(np.int64)) for x, y in PAIRS],
}


@pytest.mark.parametrize("form", FORMS)
def test_batches_in_any_form_train_as_a_stream(form, wanted):
    given = FORMS[form]
    _, history = train.fit(
        MODEL, given() if callable(given) else given, dataclasses.replace(CONFIG, steps=5)
    )
    assert curve(history) == wanted


@pytest.mark.parametrize(
    "given", [(X, Y), {"features": X, "labels": Y}, (jnp.float32(X), jnp.int32(Y))]
)
def test_arrays_are_a_shuffled_stream(given):
    config = dataclasses.replace(CONFIG, seed=3)
    same = data.Stream(STREAM.data, 16, seed=3)
    _, want = train.fit(MODEL, same, config, loss=losses.classification, heldout=STREAM)
    _, history = train.fit(MODEL, given, config, batch_size=16, heldout=given)
    assert curve(history) == curve(want)
    assert history[-1]["heldout_loss"] == pytest.approx(want[-1]["heldout_loss"], rel=1e-6)
    assert train.fit(MODEL, given, config)[1][0]["data_step"] == 0  # 32 rows by default


def test_a_loader_begins_again_and_a_generator_ends(capsys):
    state, history = train.fit(MODEL, Loader(), dataclasses.replace(CONFIG, steps=12))
    assert int(state.step) == 12 and len(history) == 12
    assert capsys.readouterr().err == ""
    state, history = train.fit(MODEL, iter(PAIRS), dataclasses.replace(CONFIG, steps=12))
    assert int(state.step) == 5 and len(history) == 5  # nothing is lost
    assert "ended after 5 of 12 steps; the run stops there" in capsys.readouterr().err


def test_a_short_batch_is_filled_with_rows_that_do_not_count():
    short = [*PAIRS[:1], (PAIRS[1][0][:3], PAIRS[1][1][:3])]
    stream = as_batches(short, input_name="features")
    batch = stream.batch(1)
    assert batch["weights"].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    params = jax.jit(MODEL.init)(jax.random.key(0))
    value, metrics = losses.classification(MODEL, params, jax.device_put(batch))
    alone, _ = losses.classification(
        MODEL, params, {"features": jnp.asarray(short[1][0]), "labels": jnp.asarray(short[1][1])}
    )
    assert float(value) == pytest.approx(float(alone), rel=1e-6) and float(metrics["weight"]) == 3
    tokens = fill({"tokens": np.ones((2, 5), np.int32), "targets": np.ones((2, 5), np.int32)}, 3)
    assert tokens["weights"].shape == (3, 5) and tokens["weights"].sum() == 10


def test_held_out_iterables_are_read_once_and_judged_each_time():
    config = dataclasses.replace(CONFIG, steps=4, eval_every=2, eval_batches=2)
    _, history = train.fit(MODEL, PAIRS, config, heldout=iter(PAIRS))
    _, want = train.fit(MODEL, PAIRS, config, heldout=PAIRS[:2])
    assert [row.get("heldout_loss") for row in history] == [row.get("heldout_loss") for row in want]


def test_what_an_iterable_cannot_do_is_said(tmp_path):
    with pytest.raises(
        InputError, match=r"checkpoints: given with an iterable .* allowed: a data.Stream"
    ):
        train.fit(MODEL, iter(PAIRS), CONFIG, checkpoints=tmp_path)
    state, _ = train.fit(MODEL, PAIRS, dataclasses.replace(CONFIG, steps=2))
    with pytest.raises(InputError, match="state: at batch 2, given with an iterable"):
        train.fit(MODEL, iter(PAIRS), CONFIG, state=state)
    passed = Passed(iter(PAIRS * 300), "features")
    for step in (0, 5, 400, 395):
        assert passed.batch(step)["features"].tolist() == PAIRS[step % 5][0].tolist()
    with pytest.raises(InputError, match="step 200 was read before"):
        passed.batch(200)


def test_a_list_resumes_to_the_same_bits(tmp_path):
    whole, _ = train.fit(MODEL, PAIRS, CONFIG)
    stop = distributed.RunMonitor(stop=lambda step: step == 3)
    train.fit(MODEL, PAIRS, CONFIG, checkpoints=tmp_path, supervisor=stop)
    state, _ = train.fit(MODEL, PAIRS, CONFIG, checkpoints=tmp_path)
    assert checkpoint.fingerprint(state) == checkpoint.fingerprint(whole)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("text", "data: 'text' given; allowed: a data.Stream, a dict of arrays"),
        ([[1, 2, 3]], "data: list given; .*data.windows and data.pack"),
        (3, "data: int given; allowed"),
        ([], "data: list given"),
        (iter(()), "gave no batch"),
        (iter([3]), "a int given as a batch; allowed: a dict of arrays, or a pair"),
        ((X, Y[:3]), "the same number of rows"),
        ([PAIRS[0], {"features": X}], "batch 1 differs from batch 0 in .*labels"),
        ((X, np.array(list("abcd" * 10))), "an array of <U1 given; allowed: numbers"),
    ],
)
def test_what_is_no_data_is_refused_in_one_line(given, said):
    with pytest.raises(InputError, match=said) as caught:
        train.fit(MODEL, given, CONFIG)
    assert "\n" not in str(caught.value)


def test_a_stream_has_its_own_batch_size():
    with pytest.raises(InputError, match="batch_size: 4 given; data already has batches of 8 rows"):
        train.fit(MODEL, STREAM, CONFIG, batch_size=4)


def test_a_bundle_is_trained_from_its_parameters():
    params = jax.jit(MODEL.init)(jax.random.key(7))
    state, _ = train.fit(hub.Bundle(MODEL, params), PAIRS, CONFIG)
    want, _ = train.fit(MODEL, PAIRS, CONFIG, params=params)
    assert tree.fingerprint(state.params) == tree.fingerprint(want.params)
    with pytest.raises(InputError, match="model: dict given; allowed: a Model, a Bundle"):
        UNCHECKED(params, PAIRS, CONFIG)


# ------------------------------------------------------------------------------------------- losses


def test_the_loss_is_what_the_batch_asks_for():
    tokens = gpt2.model(gpt2.SIZES["tiny"])
    image = autoencoder.model(autoencoder.SIZES["tiny"])
    assert losses.default_loss(MODEL, WHOLE[0]) is losses.classification
    assert losses.default_loss(tokens, {"tokens": X, "targets": Y}) is losses.next_token
    assert losses.default_loss(image, {"features": X}) is losses.autoencoder
    _, history = train.fit(
        mlp.model(mlp.Config(4, (8,), 2)), (X, X[:, :2]), CONFIG, batch_size=40
    )  # values: squared error
    assert curve(history)[-1] < curve(history)[0] and "accuracy" not in history[0]
    with pytest.raises(
        InputError, match=r"the batch holds features; allowed: a batch with labels .* or a loss"
    ):
        train.fit(MODEL, {"features": X}, CONFIG)
    with pytest.raises(InputError, match="the batch holds tokens; .*data.windows"):
        train.fit(tokens, {"tokens": Y.astype(np.int32)[:, None]}, CONFIG)


def test_a_loss_may_give_its_mean_alone(wanted):
    def alone(model, params, batch, rng, *, train=True):
        logits = model.apply(params, {"features": batch["features"]}).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()

    five = dataclasses.replace(CONFIG, steps=5)
    assert curve(train.fit(MODEL, STREAM, five, loss=alone)[1]) == pytest.approx(wanted, rel=1e-5)
    parts = train.fit(
        MODEL,
        STREAM,
        dataclasses.replace(five, gradient_accumulation_steps=2),
        loss=alone,
        heldout=STREAM,
    )[1]
    assert curve(parts) == pytest.approx(wanted, rel=1e-5)


def of_two(params, batch):
    return jnp.float32(0)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (
            "cross_entropy",
            "loss: 'cross_entropy' given; allowed: a function, such as losses.classification",
        ),
        (
            of_two,
            r"loss: of_two\(params, batch\) given .* allowed: loss\(model, params, batch, rng",
        ),
        (
            lambda model, params, batch, rng, train=True: batch["labels"],
            r"returns int32\[8\].*allowed: a scalar",
        ),
        (
            lambda model, params, batch, rng, train=True: batch["y"],
            "features, labels given; the loss <lambda> reads 'y'",
        ),
    ],
)
def test_a_loss_that_is_none_is_refused(loss, said):
    with pytest.raises(InputError, match=said) as caught:
        UNCHECKED(MODEL, STREAM, CONFIG, loss=loss)
    assert "\n" not in str(caught.value)


def test_an_optimizer_by_name_is_a_value_of_the_config():
    with pytest.raises(
        InputError, match=r"optimizer: 'adam' given; .*TrainConfig\(optimizer=...\)"
    ):
        UNCHECKED(MODEL, STREAM, CONFIG, optimizer="adam")


def test_the_rate_search_takes_the_same():
    found = train.find_lr(MODEL, (X, Y), steps=8)
    assert len(found.losses) and isinstance(as_batches(PAIRS), Listed)


def test_a_real_data_loader():
    """Where torch is installed; else the stand-in above has its form."""
    torch = pytest.importorskip("torch")
    from torch.utils.data import DataLoader, TensorDataset

    x = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    y = np.arange(20) % 3
    loader = DataLoader(TensorDataset(torch.tensor(x), torch.tensor(y)), batch_size=8, shuffle=True)
    model = mlp.model(mlp.Config(4, (8,), 3))
    state, history = train.fit(model, loader, train.TrainConfig(steps=7, log_every=1))
    assert int(state.step) == 7 and all(np.isfinite(row["loss"]) for row in history)
