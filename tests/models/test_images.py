"""The vision models: numbers of parameters as published, values and gradients of torch, dropout,
blocks, what is refused.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import layers, losses, models, ops, train, tree
from jaxmodel.errors import InputError
from jaxmodel.layers.batch_norm import fold_batch_norm
from jaxmodel.leaves import Sparse
from jaxmodel.models import cnn, lenet, mlp, resnet

GOLDENS = np.load(Path(__file__).parent / "goldens" / "images.npz")
CONFIGS = {
    "basic": (resnet, resnet.Config((2, 1), 4, False, 3, 21)),
    "bottleneck": (resnet, resnet.Config((1, 2), 4, True, 3, 8, small=True)),
    "group": (resnet, resnet.Config((1, 1), 4, False, 3, 7, norm="group", groups=2, small=True)),
    "lenet": (lenet, lenet.Config((3, 4), (10, 8), 16, 3, pad=2, pool="mean", activation="tanh")),
    "cnn": (cnn, cnn.Config((3, 4), 13, 3, dropout=0.0)),
}
BATCH_NORMS = ("basic", "bottleneck")


def golden(name: str, what: str) -> dict[str, jax.Array]:
    prefix = f"{name}/{what}/"
    return {
        key.removeprefix(prefix): jnp.asarray(GOLDENS[key])
        for key in GOLDENS.files
        if key.startswith(prefix)
    }


def load(name: str) -> tuple[models.Model, tree.Params, jax.Array]:
    module, config = CONFIGS[name]
    params = tree.unflatten(golden(name, "params"))
    return (
        module.model(config),
        tree.stack(params) if "blocks" in params else params,
        jnp.asarray(GOLDENS[f"{name}/pixels"]),
    )


def close(got, want, tolerance: float = 2e-5) -> None:
    chex.assert_trees_all_close(got, want, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------ numbers

COUNTS = {
    "lenet/lenet-300-100": 266_610,
    "lenet/lenet-5": 61_706,
    "lenet/lenet-5-wide": 431_080,
    "cnn/mnist": 34_826,
    "mlp/mnist": 669_706,
    "resnet/resnet-18": 11_689_512,
    "resnet/resnet-34": 21_797_672,
    "resnet/resnet-50": 25_557_032,
    "resnet/resnet-18-group": 11_689_512,
    "resnet/resnet-50-group": 25_557_032,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_without_statistics_are_those_published(name):
    module, config = models.sizes()[name]
    leaves = tree.flatten(jax.eval_shape(module.model(config).init, jax.random.key(0)))
    statistics = {path for path in leaves if path.endswith(("/mean", "/variance"))}
    assert (
        sum(math.prod(leaf.shape) for path, leaf in leaves.items() if path not in statistics)
        == COUNTS[name]
    )
    assert bool(statistics) == (name.startswith("resnet") and not name.endswith("group"))


# ------------------------------------------------------------------------------------ against torch


@pytest.mark.parametrize("name", CONFIGS)
def test_the_tree_is_that_of_torch(name):
    model, params, _ = load(name)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(model.init, jax.random.key(0)), params
    )


def gradients(model: models.Model, pixels: jax.Array):
    """params -> gradients of the loss whose gradients torch gave, and metrics."""
    batch = {"pixels": pixels, "labels": jnp.arange(len(pixels), dtype=jnp.int32) % 3}
    return jax.grad(
        lambda p: losses.classification(model, p, batch, jax.random.key(0)), has_aux=True
    )


def check_gradients(name: str, grads: tree.Params) -> None:
    want = golden(name, "grad")
    got = tree.flatten(tree.unstack(grads) if "blocks" in grads else grads)
    close({path: got[path] for path in want}, want)
    rest = {
        path: grad for path, grad in got.items() if path not in want
    }  # the statistics: nothing trains them
    assert all(
        path.endswith(("/mean", "/variance")) and not np.any(grad) for path, grad in rest.items()
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_of_torch(name):
    model, params, pixels = load(name)

    @jax.jit
    def run(params):
        return (
            model.apply(params, pixels).logits,
            model.apply(params, pixels, rng=jax.random.key(0), train=True).logits,
            gradients(model, pixels)(params),
        )

    inference, training, (grads, metrics) = run(params)
    close(inference, GOLDENS[f"{name}/logits"])
    close(training, GOLDENS[f"{name}/train"])
    if name in BATCH_NORMS:
        assert np.abs(training - inference).max() > 0.1
    check_gradients(name, grads)
    assert metrics["accuracy"] == np.mean(
        np.argmax(GOLDENS[f"{name}/train"], -1) == np.arange(len(pixels)) % 3
    )


@pytest.mark.parametrize("name", BATCH_NORMS)
def test_statistics_are_the_moments_of_torch(name):
    model, params, pixels = load(name)
    found = tree.flatten(
        tree.unstack(train.recalibrate_batch_norm(model, params, [{"pixels": pixels}]))
    )
    want = golden(name, "moments")
    close({path: found[path] for path in want}, want)


# ------------------------------------------------------------------------------------------ folding


@pytest.mark.parametrize("name", BATCH_NORMS)
@pytest.mark.parametrize("stacked", [True, False])
def test_a_folded_net_is_the_same_function_without_norms(name, stacked):
    model, params, pixels = load(name)
    folded = fold_batch_norm(params if stacked else tree.unstack(params), model.config.norm_eps)
    assert not any("norm" in path for path in tree.flatten(folded))
    tree.assign(model.rules, folded)  # covered: it can be placed, too
    close(jax.jit(lambda p: model.apply(p, pixels).logits)(folded), GOLDENS[f"{name}/logits"])
    assert set(tree.flatten(params)) & {"stem_norm/mean"}  # the tree that was given is as it was


def test_folding_is_in_float32_and_keeps_dtypes():
    """Statistics of bfloat16 parameters, whose products in bfloat16 would be off by a percent."""
    norm = {"weight": [1.7], "bias": [0.3], "mean": [2.1], "variance": [0.9]}
    given = {
        "conv": jnp.full((1, 2), 1.3),
        "conv_norm": {name: jnp.asarray(value) for name, value in norm.items()},
    }
    given = tree.cast(given, jnp.bfloat16)
    folded = fold_batch_norm(given, 1e-5)
    w, b, m, v = (float(given["conv_norm"][name][0]) for name in norm)
    scale = w / np.sqrt(v + 1e-5)
    assert {leaf.dtype for leaf in folded.values()} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(
        folded["conv"].astype(jnp.float32), np.full((1, 2), 1.3 * scale), rtol=2**-8
    )
    np.testing.assert_allclose(folded["conv_bias"].astype(jnp.float32), [b - m * scale], rtol=2**-8)


def test_what_cannot_be_folded_is_refused():
    norm = {name: jnp.ones(3) for name in ("weight", "bias", "mean", "variance")}
    packed = Sparse.from_dense(jnp.ones((3, 8)))
    with pytest.raises(
        InputError,
        match="the weight before the norm 'a/conv_norm' is Sparse; allowed: a plain array",
    ):
        fold_batch_norm({"a": {"conv": packed, "conv_norm": norm}}, 1e-5)
    for lonely in ({"a": {"conv_norm": norm}}, {"conv": jnp.ones((3, 2)), "norm": norm}):
        with pytest.raises(InputError, match="there is no batch norm to fold"):
            fold_batch_norm(lonely, 1e-5)
    module, config = models.sizes()["resnet/tiny-group"]
    with pytest.raises(InputError, match="there is no batch norm to fold"):
        fold_batch_norm(jax.eval_shape(module.model(config).init, jax.random.key(0)), 1e-5)


# -------------------------------------------------------------------------------------------- decay


@pytest.mark.parametrize(
    "name", ["resnet/tiny", "resnet/tiny-group", "lenet/tiny", "cnn/tiny", "mlp/tiny"]
)
def test_norms_and_biases_do_not_decay(name):
    """A step whose gradients are zero moves what decays and nothing else."""
    module, config = models.sizes()[name]
    shapes = tree.flatten(jax.eval_shape(module.model(config).init, jax.random.key(0)))
    params = {path: np.full(tree.layer_shape(path, a), 0.5, a.dtype) for path, a in shapes.items()}
    params = tree.unflatten(
        {tree.layer_paths(path)[0]: leaf for path, leaf in params.items()}
    )  # a layer of each segment
    optimizer = train.make_optimizer(train.TrainConfig(warmup_steps=0, steps=10))
    update = jax.jit(
        lambda p: optimizer.update(jax.tree.map(jnp.zeros_like, p), optimizer.init(p), p)[0]
    )
    for path, moved in tree.flatten(update(params)).items():
        assert bool(np.any(moved != 0)) == (moved.ndim >= 2), path


# ------------------------------------------------------------------------------------------ dropout


@pytest.mark.parametrize("name", ["mlp/tiny", "cnn/tiny"])
def test_dropout_follows_the_key_and_only_in_training(name):
    module, config = models.sizes()[name]
    model = module.model(dataclasses.replace(config, dropout=0.5))
    none = module.model(dataclasses.replace(config, dropout=0.0))
    params = jax.jit(model.init)(jax.random.key(0))
    rng = np.random.default_rng(1)
    inputs = {
        n: jnp.asarray(rng.normal(size=a.shape), jnp.float32) for n, a in model.inputs(4, 1).items()
    }

    @jax.jit
    def run(one, two):
        drawn = [model.apply(params, inputs, rng=key, train=True).logits for key in (one, one, two)]
        plain = [model.apply(params, inputs).logits, model.apply(params, inputs, rng=one).logits]
        return drawn, [*plain, none.apply(params, inputs, rng=one, train=True).logits]

    (first, again, other), plain = run(jax.random.key(2), jax.random.key(3))
    chex.assert_trees_all_equal(first, again)
    assert np.abs(first - other).max() > 1e-2 and np.abs(first - plain[0]).max() > 1e-2
    close(plain, [plain[0]] * 3, 1e-6)


def test_layers_of_an_mlp_drop_apart():
    """Equal layers with a key each: behind an identity, what is left is all or nothing, and not the
    same in each.
    """
    model = mlp.model(mlp.Config(64, (64, 64), 64, "identity", dropout=0.5))
    eye = jnp.eye(64)
    zero = jnp.zeros(64)
    layer = {"dense": eye, "dense_bias": zero}
    params = {"blocks": {"0": layer, "1": layer}, "head": eye, "head_bias": zero}
    run = jax.jit(
        lambda p: model.apply(p, jnp.ones((50, 64)), rng=jax.random.key(0), train=True).logits
    )
    kept = run(params)
    assert set(np.unique(kept)) == {0.0, 4.0}
    assert np.mean(kept == 4) == pytest.approx(0.25, abs=0.03)
    chex.assert_trees_all_equal(kept, run(tree.stack(params)))


# ---------------------------------------------------------------------------------------------- mlp


@pytest.mark.parametrize("name", ["relu", "gelu", "tanh", "identity", "mish"])
def test_an_mlp_of_widths_that_differ_by_hand(name):
    model = mlp.model(mlp.Config(5, (6, 6, 3), 2, name))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert list(shapes["blocks"]) == ["0", "1", "2"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), shapes)
    images = rng.normal(size=(4, 5, 1, 1)).astype(np.float32)
    x = images.reshape(4, 5)
    for layer in params["blocks"].values():
        x = np.asarray(
            layers.activation(name)(jnp.asarray(x @ layer["dense"].T + layer["dense_bias"]))
        )
    close(
        jax.jit(model.apply)(params, {"features": images}).logits,
        x @ params["head"].T + params["head_bias"],
    )


def test_activations_are_those_of_jax():
    x = jnp.linspace(-3, 3, 13)
    for name in ("silu", "elu", "softplus", "hard_silu"):
        chex.assert_trees_all_equal(layers.activation(name)(x), getattr(jax.nn, name)(x))
    close(layers.activation("gelu")(x), jax.nn.gelu(x, approximate=False))


# ------------------------------------------------------------------------------------------ refused

WRONG = [
    (lambda: mlp.Config(5, (), 2), r"widths: \(\) given; at least one is needed"),
    (
        lambda: mlp.Config(5, (3, 0), 2),
        r"widths: \(3, 0\) given; allowed: a tuple of whole numbers of at least 1",
    ),
    (lambda: mlp.Config(5, (3,), 2, "rellu"), r"activation: 'rellu' is not known; .*nearest: relu"),
    (
        lambda: mlp.Config(5, (3,), 2, dropout=1.0),
        "dropout: 1.0 given; allowed: at least 0 and below 1",
    ),
    (
        lambda: lenet.Config((6, 16), (10,), size=12),
        "size: 12 given, with pad 0; an image must be large enough for 2 convolutions of 5 x 5",
    ),
    (
        lambda: lenet.Config((), (10,), pool="median"),
        "pool: 'median' is not known; allowed: max, mean",
    ),
    (lambda: cnn.Config(size=9), "size: 9 given, with pad 0; .*enough for 2 convolutions of 3 x 3"),
    (lambda: resnet.Config(()), r"stages: \(\) given; at least one is needed"),
    (
        lambda: resnet.Config((1,), norm="layer"),
        "norm: 'layer' is not known; allowed: batch, group",
    ),
    (
        lambda: resnet.Config((1,), 48, norm="group"),
        "groups: 32 given; allowed: a divisor of the width 48",
    ),
]


@pytest.mark.parametrize(("make", "message"), WRONG)
def test_configs_that_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("cnn/tiny", jnp.zeros((2, 28, 28, 1)), "features"),
        (
            "resnet/tiny",
            jnp.zeros((2, 16, 16, 1)),
            r"does not fit 1 channels and a kernel of \(7, 7\)",
        ),
        (
            "lenet/tiny",
            jnp.zeros((2, 16, 16)),
            r"pixels: the shape \[2, 16, 16\] given; allowed: \[B, Y, X, C\]",
        ),
        (
            "resnet/tiny",
            jnp.zeros((2, 16, 16, 3), jnp.uint8),
            "pixels: uint8 given; allowed: floating-point numbers, scaled as in",
        ),
        (
            "densenet/tiny",
            {"images": jnp.zeros((2, 8, 8, 3))},
            "inputs: images given; 'pixels' is needed",
        ),
        ("mlp/tiny", {"pixels": jnp.zeros((2, 16))}, "inputs: pixels given; 'features' is needed"),
        ("mlp/tiny", jnp.zeros((2, 15)), "has 15 features, the weight"),
    ],
)
def test_inputs_that_are_refused(name, inputs, message):
    module, config = models.sizes()[name]
    model = module.model(config)
    with pytest.raises(InputError, match=message):
        jax.eval_shape(model.apply, jax.eval_shape(model.init, jax.random.key(0)), inputs)


# ------------------------------------------------------------------------------------------- ResNet


def test_a_resnet_takes_images_of_any_size():
    model = resnet.model(resnet.SIZES["tiny"])
    params = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.eval_shape(model.apply, params, jnp.zeros((2, 40, 56, 3))).logits.shape == (2, 4)


def test_segments_of_resnet_50():
    shapes = jax.eval_shape(resnet.model(resnet.SIZES["resnet-50"]).init, jax.random.key(0))[
        "blocks"
    ]
    assert tree.segments(shapes) == ["0", "1-2", "3", "4-6", "7", "8-12", "13", "14-15"]
    assert {key for key, block in shapes.items() if "halve" in block} == {"3", "7", "13"}
    assert "widen" in shapes["0"]


def test_blocks_that_are_computed_again_have_the_same_gradients():
    """Scanned ones, and single ones that halve, whose number is traced then."""
    model, params, pixels = load("basic")
    again = model.with_policy(ops.Policy(remat="full"))
    check_gradients("basic", jax.jit(gradients(again, pixels))(params)[0])
