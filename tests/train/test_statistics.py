"""Batch statistics: those of all data together, in inference the same as in training, pure, on a
mesh, in scanned layers.
"""

from __future__ import annotations

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodel import axes, layers, losses, models, ops, train, tree
from jaxmodel.errors import InputError
from jaxmodel.layers.batch_norm import fold_batch_norm
from jaxmodel.models import cnn, resnet
from jaxmodel.train.state import init_state
from jaxmodel.train.step import make_step

CONFIG = resnet.Config((2, 1), 4, classes=3, size=8, small=True)
MODEL = resnet.model(CONFIG)
BEFORE = 5  # norms in front of the last block: the stem's, two in each of two others


@pytest.fixture(scope="module")
def params() -> tree.Params:
    return jax.jit(MODEL.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).normal(3.0, 1.0, (12, 8, 8, 3)).astype(np.float32)


def close(got, want, tolerance: float = 1e-5) -> None:
    chex.assert_trees_all_close(got, want, rtol=tolerance, atol=tolerance)


def logits(params, pixels, train=False):
    return jax.jit(lambda p, x: MODEL.apply(p, x, train=train).logits)(params, pixels)


def parts(pixels: np.ndarray, *sizes: int) -> list[np.ndarray]:
    return np.split(pixels, np.cumsum(sizes)[:-1])


def stem_moments(params, pixels) -> tuple[np.ndarray, np.ndarray]:
    """Of what the first norm reads, in double precision."""
    padded = np.pad(pixels.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2)).reshape(-1, 27)
    y = patches @ np.asarray(params["stem"], np.float64).T
    return y.mean(0), y.var(0)


def test_one_batch_makes_inference_equal_to_training(params, pixels):
    before = jax.tree.map(np.array, params)
    found = train.recalibrate_batch_norm(MODEL, params, [pixels])
    close(logits(found, pixels), logits(params, pixels, train=True))
    chex.assert_trees_all_equal(params, before)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, params)
    got = tree.flatten(found)
    old = tree.flatten(params)
    changed = {path for path in got if not np.array_equal(got[path], old[path])}
    assert changed == {path for path in got if re.search("/(mean|variance)$", path)}
    assert len(changed) == 2 * 6  # stem, two of the stacked blocks, two and `halve` of the last


@pytest.mark.parametrize("sizes", [(12,), (5, 4, 3), (1,) * 12])
def test_batches_of_any_sizes_merge_exactly(sizes, params, pixels):
    found = train.recalibrate_batch_norm(MODEL, params, iter(parts(pixels, *sizes)))
    mean, variance = stem_moments(params, pixels)
    close((found["stem_norm"]["mean"], found["stem_norm"]["variance"]), (mean, variance), 1e-6)


def test_the_variance_does_not_drown_in_a_large_mean(params, pixels):
    """A mean of 1e4 times the deviation: squares of x alone would leave float32 no digit of the
    variance.
    """
    norm = {name: jnp.ones(2) for name in ("weight", "bias", "mean", "variance")}
    x = np.random.default_rng(0).normal(1e4, 1.0, (60, 2)).astype(np.float32)
    model = models.wrap(
        MODEL,
        lambda parts: parts._replace(
            embed=lambda params, inputs, *_: (inputs["pixels"], {}),
            block=None,
            head=lambda params, x, *_: layers.BatchNorm(1e-5).apply({"params": params["norm"]}, x),
        ),
    )
    letters = (("norm/(weight|bias)", "D"), ("norm/(mean|variance)", "D measured"))
    model = dataclasses.replace(model, axes=axes.Axes(letters))
    found = train.recalibrate_batch_norm(
        model, {"norm": norm}, [{"pixels": rows} for rows in parts(x, 10, 20, 30)]
    )["norm"]
    np.testing.assert_allclose(found["variance"], x.astype(np.float64).var(0), rtol=1e-5)
    np.testing.assert_allclose(found["mean"], x.astype(np.float64).mean(0), rtol=1e-7)


def test_each_further_pass_makes_another_norm_exact(params, pixels):
    """Batches that differ: at the end a deep norm has the moments of what it reads in inference,
    over all the data.
    """
    batches = parts(
        pixels * np.linspace(0.2, 3, 12, dtype=np.float32)[:, None, None, None], 5, 4, 3
    )
    first, exact = (
        train.recalibrate_batch_norm(MODEL, params, batches, passes=n) for n in (1, BEFORE + 1)
    )

    def read(params):
        """What the first norm of the last block reads, and its statistics."""
        x, context = MODEL.parts.embed(params, {"pixels": jnp.concatenate(batches)})
        layers = tree.unstack(params)["blocks"]
        for i in range(2):
            x = MODEL.parts.block(layers[str(i)], x, context, None, i)[0]
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        y = np.asarray(
            ops.conv(x, layers["2"]["conv1"], kernel=(3, 3), stride=(2, 2), padding="VALID"),
            np.float64,
        )
        norm = layers["2"]["conv1_norm"]
        return (y.mean((0, 1, 2)), y.var((0, 1, 2))), (norm["mean"], norm["variance"])

    close(*reversed(read(exact)), 1e-5)
    close(first["stem_norm"], exact["stem_norm"])
    (mean, _), (claimed, _) = read(first)
    assert np.abs(mean - claimed).max() > 1e-3


def test_stacked_and_single_layers_have_the_same_statistics(params, pixels):
    stacked = train.recalibrate_batch_norm(MODEL, params, parts(pixels, 7, 5))
    single = train.recalibrate_batch_norm(MODEL, tree.unstack(params), parts(pixels, 7, 5))
    close(tree.unstack(stacked), single)
    again = MODEL.with_policy(ops.Policy(remat="full"))
    close(train.recalibrate_batch_norm(again, params, parts(pixels, 7, 5)), stacked)


def test_statistics_of_bfloat16_parameters_keep_their_dtype(params, pixels):
    narrow = tree.cast(params, jnp.bfloat16)
    found = train.recalibrate_batch_norm(MODEL, narrow, [pixels])
    chex.assert_trees_all_equal_shapes_and_dtypes(found, narrow)


def test_on_a_mesh(devices8):
    printed = devices8("""
        import jax, numpy as np
        from jaxmodel import ops, sharding, train
        from jaxmodel.models import resnet

        config = resnet.Config((2,), 8, classes=4, size=8, small=True)
        alone, placed = resnet.model(config), resnet.model(config, ops.Policy(axes=ops.MESH_AXES))
        params = jax.jit(alone.init)(jax.random.key(0))
        rows = np.random.default_rng(0).normal(size=(16, 8, 8, 3)).astype(np.float32)
        want = train.recalibrate_batch_norm(alone, params, [rows[:8], rows[8:]], passes=2)
        mesh = sharding.make_mesh("fsdp=4,tensor=2")
        on_mesh = sharding.place(alone.rules, params, mesh)
        lie = jax.NamedSharding(mesh, jax.P("fsdp"))
        with jax.set_mesh(mesh):
            got = train.recalibrate_batch_norm(
                placed, on_mesh, [jax.device_put(x, lie) for x in (rows[:8], rows[8:])], passes=2
            )
        for a, b, old in zip(*map(jax.tree.leaves, (got, want, on_mesh)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
            assert a.sharding == old.sharding
        print("equal")
    """)
    assert printed.split()[-1] == "equal"


def test_training_leaves_them_and_folding_takes_them(params, pixels):
    """A run of training, then statistics, then a net without norms: what the life of a small net
    is.
    """
    batch = jax.device_put({"pixels": pixels, "labels": np.arange(12, dtype=np.int32) % 3})
    optimizer = optax.adamw(
        1e-2, weight_decay=0.1
    )  # decays whatever trains, so what it does not move does not train
    step = make_step(MODEL, losses.classification, optimizer)

    @jax.jit
    def fit(params):
        state, metrics = jax.lax.scan(
            lambda state, _: step(state, batch),
            init_state(params, optimizer, axes.trainable(MODEL.axes)),
            None,
            30,
        )
        return state, metrics["accuracy"][-1]

    @jax.jit
    def judged(params):
        logits = MODEL.apply(params, batch["pixels"]).logits
        return logits, jnp.mean(
            (jnp.argmax(logits, axis=-1).astype(jnp.int32) == batch["labels"]).astype(jnp.float32)
        )

    state, accuracy = fit(params)
    assert accuracy == 1
    kept = {
        path: leaf
        for path, leaf in tree.flatten(params).items()
        if path.endswith(("/mean", "/variance"))
    }
    assert len(kept) == 2 * len(
        [path for path in tree.flatten(params) if path.endswith("norm/weight")]
    )
    chex.assert_trees_all_equal({path: tree.flatten(state.params)[path] for path in kept}, kept)
    assert not any(
        "variance" in jax.tree_util.keystr(path)
        for path, _ in jax.tree.leaves_with_path(state.opt_state)
    )
    assert judged(state.params)[1] < 1  # nobody set the statistics yet
    final = train.recalibrate_batch_norm(MODEL, state.params, [batch])
    want, accuracy = judged(final)
    assert accuracy == 1
    close(judged(fold_batch_norm(final, CONFIG.norm_eps))[0], want)


def test_a_rule_may_train_them(params):
    """Frozen as it stands; a rule that says otherwise is obeyed."""
    names = lambda rules: {
        path
        for path in tree.flatten(tree.partition(params, rules)[0])
        if path.endswith(("mean", "variance"))
    }
    assert names(axes.trainable(MODEL.axes)) == set()
    assert names([("stem_norm/mean", True), (".*", False)]) == {"stem_norm/mean"}


def test_what_cannot_be_measured_is_refused(params, pixels):
    with pytest.raises(InputError, match="batches: none in pass 1"):
        train.recalibrate_batch_norm(MODEL, params, [])
    with pytest.raises(
        InputError, match="batches: none in pass 2; allowed: a list of at least one"
    ):
        train.recalibrate_batch_norm(MODEL, params, iter([pixels]), passes=2)
    with pytest.raises(InputError, match="passes: 0 given"):
        train.recalibrate_batch_norm(MODEL, params, [pixels], passes=0)
    other = cnn.model(cnn.SIZES["tiny"])
    with pytest.raises(InputError, match="params: there is no batch norm"):
        train.recalibrate_batch_norm(other, jax.eval_shape(other.init, jax.random.key(0)), [pixels])
    lost = {**params, "lost_norm": params["stem_norm"]}
    rules = (*MODEL.axes.rules, ("lost_norm/.*", "C0 measured"))
    declared = dataclasses.replace(MODEL, axes=axes.Axes(rules))
    with pytest.raises(
        InputError, match="params: the norm 'lost_norm' was never reached; is it used"
    ):
        train.recalibrate_batch_norm(declared, lost, [pixels])
