"""Training: the step is pure, the loop repeats exactly, rules decide what trains, losses equal
their definition.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import numpy as np
import optax
import pytest

from jaxmodel import data, losses, ops, train, tree
from jaxmodel.errors import InputError
from jaxmodel.models import gpt2
from jaxmodel.train.state import init_state
from jaxmodel.train.step import make_step

MODEL = gpt2.model(gpt2.SIZES["tiny"])
ROWS = data.windows(np.random.default_rng(0).integers(0, 256, 4000), 17, stride=16)
STREAM = data.Stream(ROWS, 8, seed=1)


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


def test_next_token_is_the_mean_cross_entropy(params):
    batch = jax.device_put(STREAM.batch(0))
    batch["weights"] = batch["weights"].at[:, -3:].set(0.0)
    loss, metrics = jax.jit(lambda p, batch: losses.next_token(MODEL, p, batch))(params, batch)
    logits = np.asarray(jax.jit(MODEL.apply)(params, batch["tokens"]).logits, np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_probs, np.asarray(batch["targets"])[..., None], -1)[..., 0]
    np.testing.assert_allclose(loss, -chosen[:, :-3].mean(), rtol=1e-5)
    assert metrics["weight"] == 8 * 13


@functools.cache
def gradient(chunk=None):
    """Of parameters and a batch: loss and gradients, one program for all tests."""
    return jax.jit(
        jax.value_and_grad(lambda p, batch: losses.next_token(MODEL, p, batch, chunk=chunk)[0])
    )


@pytest.mark.parametrize(
    "chunk", [1, 5, 99]
)  # 5: the 16 positions are padded to 20; 99: there are fewer
def test_chunked_loss_has_the_same_value_and_gradient(chunk, params):
    batch = jax.device_put(STREAM.batch(3))
    whole = gradient()(params, batch)
    parts = gradient(chunk)(params, batch)
    np.testing.assert_allclose(whole[0], parts[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), whole[1], parts[1])


def test_a_chunk_bounds_the_logits_that_exist_at_once(params):
    batch = jax.device_put(STREAM.batch(0))

    def largest(chunk):
        """Elements of the largest array with an axis of the vocabulary, and not the embedding, in
        the gradient's program.
        """
        text = str(
            jax.make_jaxpr(jax.grad(lambda p: losses.next_token(MODEL, p, batch, chunk=chunk)[0]))(
                params
            )
        )
        shapes = [
            tuple(map(int, found.split(","))) for found in re.findall(r"f32\[([\d,]+)\]", text)
        ]
        return max(
            np.prod(shape) for shape in shapes if len(shape) > 2 and MODEL.config.vocab in shape
        )

    assert largest(None) == 8 * 16 * MODEL.config.vocab
    assert largest(5) == 8 * 5 * MODEL.config.vocab


def test_many_logits_are_chunked_without_being_asked(params, monkeypatch):
    """Also where the rows are cut: then a device has fewer."""
    batch = jax.device_put(STREAM.batch(0))
    monkeypatch.setattr("jaxmodel.losses.tokens.LOGITS", 4 * 8 * 5 * MODEL.config.vocab)
    text = str(jax.make_jaxpr(jax.grad(lambda p: losses.next_token(MODEL, p, batch)[0]))(params))
    assert (
        f"f32[8,5,{MODEL.config.vocab}]" in text and f"f32[8,16,{MODEL.config.vocab}]" not in text
    )


def test_a_chunk_of_nothing_is_refused(params):
    with pytest.raises(InputError, match="chunk: 0 given; allowed: a whole number of at least 1"):
        losses.next_token(MODEL, params, jax.device_put(STREAM.batch(0)), chunk=0)


def test_options_are_the_config_without_its_rules():
    names = {f.name for f in dataclasses.fields(train.TrainConfig)} - {
        f.name for f in dataclasses.fields(train.TrainOptions)
    }
    assert names == {"decay", "trainable", "eval_rows"}
    assert set(train.__all__) == set(dir(train)) and all(
        hasattr(train, name) for name in train.__all__
    )
    with pytest.raises(AttributeError, match="attribute fitt"):
        train.fitt  # noqa: B018


def test_step_equals_optax_by_hand(params):
    optimizer = optax.sgd(0.5)
    state = init_state(params, optimizer)
    step = jax.jit(make_step(MODEL, losses.next_token, optimizer))
    for i in range(3):
        batch = jax.device_put(STREAM.batch(i))
        new, metrics = step(state, batch)
        value, grads = gradient()(state.params, batch)
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
        want = jax.tree.map(
            lambda leaf, grad: np.asarray(leaf) - 0.5 * np.asarray(grad), state.params, grads
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), new.params, want)
        assert (int(new.step), int(new.data_step)) == (i + 1, i + 1)
        state = new
    assert step._cache_size() == 1, "one compilation for all steps"


def test_rules_decide_what_trains(params):
    rules = ((r"blocks/2/.*", True), (".*", False))
    config = train.TrainConfig(steps=3, trainable=rules, decay=((".*", False),))
    state, _ = train.fit(MODEL, STREAM, config, params=params)
    before = tree.flatten(tree.unstack(params))
    after = tree.flatten(tree.unstack(state.params))
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed == {path for path in before if path.startswith("blocks/2/")}
    states = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in states) == 2 * tree.count({"2": params["blocks"]["0-2"]}) // 3


def test_fit_learns_and_repeats_exactly():
    # half of the vocabulary never comes, so that there is something to learn
    rows = data.windows(np.random.default_rng(1).integers(0, 16, 4000), 17, stride=16)
    stream = data.Stream(rows, 8, seed=1)
    config = train.TrainConfig(steps=30, learning_rate=1e-2, log_every=10)
    runs = [train.fit(MODEL, stream, config, heldout=stream) for _ in range(2)]
    losses = [[row["loss"] for row in history] for _, history in runs]
    assert losses[0] == losses[1]
    assert tree.fingerprint(runs[0][0].params) == tree.fingerprint(runs[1][0].params)
    assert losses[0][0] > 5.4 and losses[0][-1] < 3.2  # from log 256 towards log 16 = 2.77
    assert [row["step"] for row in runs[0][1]] == [1, 10, 20, 30]
    assert runs[0][1][-1]["heldout_loss"] == pytest.approx(losses[0][-1], abs=0.2)


def test_going_on_from_a_state_is_the_run_without_a_stop(params):
    config = train.TrainConfig(steps=6, log_every=1)
    whole, history = train.fit(MODEL, STREAM, config, params=params)
    optimizer = train.make_optimizer(config)
    state = init_state(params, optimizer)
    step = jax.jit(make_step(MODEL, losses.next_token, optimizer, seed=config.seed))
    for i in range(3):
        state, _ = step(state, jax.device_put(STREAM.batch(i)))
    rest, tail = train.fit(MODEL, STREAM, config, state=state)
    assert [row["loss"] for row in tail] == [row["loss"] for row in history[3:]]
    assert tree.fingerprint(rest.params) == tree.fingerprint(whole.params)
    assert (
        int(state.step) == 3 and np.isfinite(np.asarray(state.params["embed"])).all()
    )  # still usable


def test_a_seed_gives_other_parameters():
    prints = [
        tree.fingerprint(train.fit(MODEL, STREAM, train.TrainConfig(steps=1, seed=s))[0].params)
        for s in (0, 1)
    ]
    assert prints[0] != prints[1]


def test_weights_decay_by_rules(params):
    config = train.TrainConfig(steps=1, warmup_steps=0, weight_decay=0.5, learning_rate=0.1)
    optimizer = train.make_optimizer(config)
    zero = jax.tree.map(np.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    for path, update in tree.flatten(updates).items():
        plain = "norm" in path or path.endswith("_bias")
        assert bool(np.any(np.asarray(update) != 0)) == (
            not plain and bool(np.any(tree.flatten(params)[path] != 0))
        ), path


def test_decay_may_differ_by_layer(params):
    rules = ((r"blocks/0/.*", True), (".*", False))
    config = train.TrainConfig(
        steps=1, warmup_steps=0, weight_decay=0.5, learning_rate=0.1, decay=rules
    )
    with pytest.raises(InputError, match="the layers of 'blocks/0-2/"):
        train.make_optimizer(config).init(params)
    state, _ = train.fit(MODEL, STREAM, config, params=params)
    assert list(state.params["blocks"]) == ["0", "1-2"]


def test_no_steps_is_an_error():
    with pytest.raises(InputError, match="steps: 0 given; allowed: a whole number of at least 1"):
        train.fit(MODEL, STREAM, train.TrainConfig(steps=0))


def test_state_is_a_pytree_that_keeps_its_fields(params):
    state = init_state(params, optax.sgd(0.1))
    again = jax.tree.map(lambda a: a, state)
    assert isinstance(again, train.TrainState) and dataclasses.fields(again) == dataclasses.fields(
        state
    )


def test_eight_devices_train_as_one(devices8):
    program = """
        import jax, numpy as np
        from jaxmodel import data, errors, ops, sharding, train
        from jaxmodel.models import gpt2

        try:
            train.fit(
                gpt2.model(gpt2.SIZES["tiny"]),
                data.Stream(np.zeros((16, 17), np.int32), 6),
                mesh=sharding.make_mesh("data=2,fsdp=2"),
            )
        except errors.InputError as error:
            print(error)
        model = gpt2.model(gpt2.SIZES["tiny"], ops.Policy(axes=ops.MESH_AXES))
        rows = data.windows(np.random.default_rng(0).integers(0, 256, 4000), 17, stride=16)
        config = train.TrainConfig(steps=4, log_every=1)
        out = []
        for mesh in (
            None,
            sharding.make_mesh("fsdp=4,tensor=2"),
            sharding.make_mesh("data=2,fsdp=2"),
        ):
            state, history = train.fit(model, data.Stream(rows, 8, 1), config, mesh=mesh)
            out.append([row["loss"] for row in history])
            if mesh is not None:
                q = state.params["blocks"]["0-2"]["attn"]["q"]
                moment = [a for a in jax.tree.leaves(state.opt_state) if a.shape == q.shape][0]
                assert moment.sharding == q.sharding, (moment.sharding, q.sharding)
                assert q.sharding.shard_shape(q.shape)[2] * mesh.shape["fsdp"] == q.shape[2]
        np.testing.assert_allclose(out[1], out[0], rtol=1e-5)
        np.testing.assert_allclose(out[2], out[0], rtol=1e-5)
        print("same")
    """
    said = devices8(program)
    assert (
        "batch: 6 rows cannot be divided among the 4 devices" in said and said.split()[-1] == "same"
    )


def test_remat_policies_give_the_same_gradients(params):
    batch = jax.device_put(STREAM.batch(0))
    grads = {}
    for remat in ("none", "full", "dots"):
        model = gpt2.model(gpt2.SIZES["tiny"], ops.Policy(remat=remat))
        grads[remat] = jax.jit(jax.grad(lambda p, m=model: losses.next_token(m, p, batch)[0]))(
            params
        )
    for remat in ("full", "dots"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads["none"], grads[remat]
        )
