"""Fine-tuning: a new head and nothing else, rules of what trains and how fast, on every family that
has classes.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodel import data, losses, train, tree
from jaxmodel.adapt import finetune, scale_by_path
from jaxmodel.errors import InputError
from jaxmodel.models import bert, families, gpt2, mlp, sizes, stochastic_depth, vit
from jaxmodel.train.state import init_state
from jaxmodel.train.step import make_step


def classifiers() -> dict[str, object]:
    """A tiny config of every family with classes or labels."""
    found: dict[str, object] = {}
    for name, (_, config) in sizes().items():
        family, size = name.split("/")
        fields = {field.name for field in dataclasses.fields(config)}
        if size.startswith("tiny") and fields & {"classes", "labels"}:
            found.setdefault(family, config)
    return found


CLASSIFIERS = classifiers()


def test_families_with_classes_are_found():
    assert {"bert", "cnn", "connected", "densenet", "lenet", "mlp", "resnet", "vit"} <= set(
        CLASSIFIERS
    )


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_only_the_head_is_new(family):
    old = families()[family].model(CLASSIFIERS[family])
    params = jax.tree.map(
        lambda s: np.full(s.shape, 0.1, s.dtype), jax.eval_shape(old.init, jax.random.key(0))
    )
    model, new = finetune.replace_head(old, params, 7, jax.random.key(1))
    before = tree.flatten(params)
    after = tree.flatten(new)
    kept = {path for path in after if not path.startswith("head")}
    assert kept == {path for path in before if not path.startswith("head")}
    assert all(after[path] is before[path] for path in kept)
    changed = {path for path in after if path not in kept}
    assert changed and all(after[path] is not before.get(path) for path in changed)
    inputs = model.inputs(2, 8)
    logits = jax.eval_shape(
        lambda p: model.apply(p, {n: jnp.zeros(s.shape, s.dtype) for n, s in inputs.items()}), new
    ).logits
    assert logits.shape == (2, 7)
    tree.assign(model.rules, new)
    # the leaves are those of the model that the new config describes, from its own key
    for path, leaf in tree.flatten(jax.jit(model.init)(jax.random.key(1))).items():
        if path in changed:
            np.testing.assert_allclose(after[path], leaf, rtol=1e-6)


def test_an_encoder_of_masked_tokens_gets_classes_with_names():
    old = bert.model(bert.SIZES["tiny"])
    params = jax.jit(old.init)(jax.random.key(0))
    model, new = finetune.replace_head(old, params, ("bad", "good"), jax.random.key(1))
    assert model.config.head == "classify" and model.config.labels == ("bad", "good")
    assert new["head"].keys() == {"pool", "pool_bias", "classes", "classes_bias"}
    hidden = [
        jax.jit(m.hidden)(p, jnp.ones((1, 4), jnp.int32)).hidden
        for m, p in ((old, params), (model, new))
    ]
    np.testing.assert_array_equal(*hidden)


def test_a_split_body_stays_split():
    old = vit.model(vit.SIZES["tiny"])
    params = tree.unstack(jax.jit(old.init)(jax.random.key(0)))
    _, new = finetune.replace_head(old, params, 3, jax.random.key(1))
    assert list(new["blocks"]) == ["0", "1", "2"]


def test_what_trains():
    model = vit.model(vit.SIZES["tiny"])
    params = jax.eval_shape(model.init, jax.random.key(0))
    for count in range(4):
        trains = {
            path
            for path, value in tree.assign(
                finetune.last_layers(model, params, count), params
            ).items()
            if value
        }
        blocks = {path.split("/")[1] for path in trains if path.startswith("blocks/")}
        assert blocks == {str(i) for i in range(3 - count, 3)}
        tops = {path.split("/")[0] for path in trains} - {"blocks"}
        assert tops == ({"head", "norm"} if count else {"head"})


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_the_last_layer_is_the_only_one_that_trains(family):
    model = families()[family].model(CLASSIFIERS[family])
    params = jax.eval_shape(model.init, jax.random.key(0))
    count = min(1, tree.depth(params["blocks"]) if "blocks" in params else 0)
    trains = {
        path
        for path, value in tree.assign(finetune.last_layers(model, params, count), params).items()
        if value
    }
    last = f"blocks/{tree.depth(params['blocks']) - 1}/" if count else "head"
    assert all(path.startswith((last, "head", "norm/")) for path in trains)
    assert any(path.startswith(last) for path in trains) and any(
        path.startswith("head") for path in trains
    )


def test_statistics_never_train():
    model = families()["resnet"].model(CLASSIFIERS["resnet"])
    params = jax.eval_shape(model.init, jax.random.key(0))
    values = tree.assign(finetune.last_layers(model, params, tree.depth(params["blocks"])), params)
    measured = {path for path in values if path.endswith(("norm/mean", "norm/variance"))}
    assert measured and not any(values[path] for path in measured)
    assert values["blocks/0/conv1"] and not values["stem"]


def test_layer_rates_by_hand():
    model = vit.model(vit.SIZES["tiny"])
    params = jax.eval_shape(model.init, jax.random.key(0))
    values = tree.assign(finetune.layer_rates(model, params, 0.5), params)
    wanted = {
        "embed/patch": 1 / 16,
        "blocks/0/attn/q": 1 / 8,
        "blocks/2/mlp/up": 1 / 2,
        "head/classes": 1.0,
    }
    assert {path: values[path] for path in wanted} == wanted and values["norm/weight"] == 1
    model = bert.model(bert.SIZES["tiny"])
    params = jax.eval_shape(model.init, jax.random.key(0))
    tables = tree.assign(finetune.layer_rates(model, params, 0.5), params)
    assert {tables[path] for path in ("embed", "positions", "types", "embed_norm/weight")} == {
        1 / 16
    }


def test_rates_scale_the_steps_of_each_layer():
    """Plain gradient descent moves each layer by its factor times what it would have."""
    model = mlp.model(mlp.Config(4, (8, 8, 8), 2))
    params = jax.jit(model.init)(jax.random.key(0))
    batch = {
        "features": jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32),
        "labels": jnp.arange(6) % 2,
    }
    moved = {}
    for name, optimizer in (
        ("plain", optax.sgd(1.0)),
        (
            "decayed",
            optax.chain(optax.sgd(1.0), scale_by_path(finetune.layer_rates(model, params, 0.5))),
        ),
    ):
        step = make_step(model, losses.classification, optimizer)
        new, _ = jax.jit(step)(init_state(params, optimizer), batch)
        moved[name] = tree.flatten(
            tree.unstack(jax.tree.map(lambda a, b: a - b, new.params, params))
        )
    for path, by in moved["plain"].items():
        factor = (
            {"0": 1 / 8, "1": 1 / 4, "2": 1 / 2}[path.split("/")[1]]
            if path.startswith("blocks")
            else 1
        )
        np.testing.assert_allclose(moved["decayed"][path], factor * by, atol=1e-7)
    assert np.any(moved["plain"]["blocks/0/dense"])


def test_a_stage_of_fine_tuning_runs():
    """Rules of rates with frozen layers, in the loop."""
    model = mlp.model(mlp.Config(4, (8, 8, 8), 2))
    params = jax.jit(model.init)(jax.random.key(0))
    config = train.TrainConfig(
        steps=3, trainable=finetune.last_layers(model, params, 1), decay=((".*", False),)
    )
    optimizer = optax.chain(
        train.make_optimizer(config), scale_by_path(finetune.layer_rates(model, params, 0.5))
    )
    rows = {"features": np.ones((4, 4), np.float32), "labels": np.arange(4, dtype=np.int32) % 2}
    state, _ = train.fit(
        model,
        data.Stream(rows, 4),
        config,
        params=params,
        loss=losses.classification,
        optimizer=optimizer,
    )
    before, after = (tree.flatten(tree.unstack(p)) for p in (params, state.params))
    moved = {
        path.split("/")[1]
        for path in before
        if path.startswith("blocks") and np.any(before[path] != after[path])
    }
    assert moved == {"2"}


def test_bad_input_is_refused():
    model = gpt2.model(gpt2.SIZES["tiny"])
    params = jax.eval_shape(model.init, jax.random.key(0))
    key = jax.random.key(0)
    with pytest.raises(
        InputError,
        match="model: a config of jaxmodel.models.gpt2 given; allowed: a config with classes",
    ):
        finetune.replace_head(model, params, 2, key)
    small = vit.model(vit.SIZES["tiny"])
    mine = jax.eval_shape(small.init, key)
    with pytest.raises(InputError, match="model: a wrapped model given"):
        finetune.replace_head(stochastic_depth(small, 0.1), mine, 2, key)
    with pytest.raises(InputError, match="classes: 0 given; allowed: at least one"):
        finetune.replace_head(small, mine, 0, key)
    with pytest.raises(
        InputError,
        match="params: the leaf 'norm/bias' is missing; allowed: the parameters of the model's",
    ):
        finetune.replace_head(
            small, {name: node for name, node in mine.items() if name != "norm"}, 2, key
        )
    with pytest.raises(InputError, match="params: the leaf 'extra' is too many"):
        finetune.replace_head(small, {**mine, "extra": mine["norm"]["bias"]}, 2, key)
    with pytest.raises(InputError, match="count: 4 given; allowed: 0 to 3, the number of layers"):
        finetune.last_layers(small, mine, 4)
    with pytest.raises(InputError, match="decay: 0.0 given; allowed: above 0 and at most 1"):
        finetune.layer_rates(small, mine, 0.0)
    with pytest.raises(InputError, match="params: no layers under 'blocks'"):
        finetune.layer_rates(small, {"head": mine["head"]}, 0.5)


def test_a_new_head_on_a_trained_body_trains_alone():
    config = dataclasses.replace(vit.SIZES["tiny"], labels=("cat", "dog"))
    trained = jax.jit(vit.model(config).init)(jax.random.key(0))
    other = vit.model(dataclasses.replace(config, labels=("oak", "fir", "elm")))
    params, left = finetune.load_matching(jax.jit(other.init)(jax.random.key(1)), trained)
    assert left == ["head/classes", "head/classes_bias"]
    flat = tree.flatten(params)
    for path, leaf in tree.flatten(trained).items():
        if path not in left:
            np.testing.assert_array_equal(flat[path], leaf)
    trains, frozen = tree.partition(params, [*((path, True) for path in left), (".*", False)])
    assert set(tree.flatten(trains)) == set(left) and set(tree.flatten(frozen)).isdisjoint(left)
    with pytest.raises(InputError, match="no leaf has the path and shape"):
        finetune.load_matching(params, {"other": jnp.zeros(3)})
