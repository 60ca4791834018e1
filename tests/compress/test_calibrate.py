"""Calibration block by block against brute force: measure the whole model, and compress by hand."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import compress, generation, hub, losses, tree
from jaxmodel.compress import Recipe
from jaxmodel.compress.observe import probed
from jaxmodel.compress.recipes import ByRole
from jaxmodel.compress.stats import usable
from jaxmodel.errors import InputError
from jaxmodel.leaves import Turned, decode
from jaxmodel.models import bert, clip, lenet, llama, mlp, t5
from jaxmodel.ops.probe import zeros_for

# all matrices of bert and of the experts have one shape, so that they share their programs
TINY = {
    "llama": (llama, llama.SIZES["tiny"], {}),
    "bert": (bert, bert.SIZES["tiny"], {"mlp_width": 32}),
    "experts": (llama, llama.SIZES["tiny-moe"], {"mlp_width": 32, "kv_heads": 4}),
}
MODELS = {
    name: module.model(dataclasses.replace(config, depth=2, **square))
    for name, (module, config, square) in TINY.items()
}
ADD = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))
DENSE = jax.jit(
    lambda params: tree.map_leaves(lambda _, leaf: decode(leaf, jnp.float32), tree.unstack(params))
)
UPS = [(".*/mlp/up", "wanda(0.5)"), (".*", "")]
_T5 = dataclasses.replace(t5.SIZES["tiny"], depth=1, encoder_depth=2)
_CLIP = clip.SIZES["tiny"]
_TOWERS = {"text": 1, "image": 2}
_SHORT = {k: dataclasses.replace(getattr(_CLIP, k), depth=depth) for k, depth in _TOWERS.items()}
STACKS = {
    "t5": (t5.model(_T5), ["encoder/blocks/0", "encoder/blocks/1", "blocks/0"]),
    "clip": (
        clip.model(dataclasses.replace(_CLIP, **_SHORT)),
        ["(text|image)/blocks/0", "image/blocks/1"],
    ),
}
LENET = lenet.model(lenet.SIZES["tiny"])
CHAINS = ByRole(compress.parse("wanda(0.5) | rtn(4)"), compress.parse("rtn(8)"))
RECIPE = Recipe(((".*", CHAINS),))
GPTQ = [("blocks/.*/(up|o)", "gptq(3)"), (".*", "")]


def inputs(model, seed, rows=2):
    rng = np.random.default_rng(seed)

    def one(a):
        whole = jnp.issubdtype(a.dtype, jnp.integer)
        drawn = rng.integers(0, model.config.vocab, a.shape) if whole else rng.normal(size=a.shape)
        return jnp.asarray(drawn, a.dtype)

    return {name: one(a) for name, a in model.inputs(rows, 8).items()}


@functools.cache
def given(name):
    model = MODELS[name]
    return jax.jit(model.init)(jax.random.key(0)), [inputs(model, seed) for seed in range(3)]


@functools.cache
def done(name, order):
    params, batches = given(name)
    held = 0.3 if name == "llama" else 0.0
    return compress.calibrate(MODELS[name], params, RECIPE, batches, order=order, held_out=held)


def plain(params):
    return jax.device_get(tree.flatten(DENSE(params)))


def same(got, want):
    """But for what a sum in another order rounds, or prunes, differently."""
    got, want = plain(got), plain(want)
    assert got.keys() == want.keys()
    for path, value in want.items():
        off = np.abs(got[path] - value) > 1e-4 * np.abs(value).max()
        assert np.mean(off) <= 0.02, path


def measured(model, paths=".*"):
    """Return a function of plain params: the squares of the inputs of matrices, by probes."""

    @jax.jit
    def measure(params, inputs):
        leaves = tree.flatten(params)
        zeros = {
            path: zeros_for(leaf.shape, ["square"])
            for path, leaf in leaves.items()
            if leaf.ndim > 1 and re.fullmatch(paths, path)
        }
        run = lambda zeros: model.apply(probed(params, zeros), inputs).logits.sum()
        return jax.grad(run)(zeros)

    return measure


@pytest.mark.parametrize("name", ["llama", "bert", "experts"])
def test_sequential_is_one_part_after_another_by_hand(name):
    model = MODELS[name]
    params, batches = given(name)
    measure = measured(model)
    batches = batches[:2] if name == "llama" else batches
    parts = [f"blocks/{i}/.*" for i in range(2)] + ["head/.*"] * (name == "bert")
    tables = (tree.optional("embed|positions|types|head"), CHAINS)
    hand = DENSE(compress.apply([tables, (".*", "")], params, axes=model.axes)[0])
    for part in parts:  # of the whole model, in which what is in front is compressed already
        found = [measure(hand, inputs) for inputs in batches]
        stats = functools.reduce(ADD, found)
        hand, _ = compress.apply([(part, CHAINS), (".*", "")], hand, stats, model.axes)
        hand = DENSE(hand)
    same(done(name, "sequential")[0], hand)


@pytest.mark.parametrize("name", STACKS)
def test_layers_of_encoders_and_towers_have_their_turns(name):
    model, parts = STACKS[name]
    params, batch = jax.jit(model.init)(jax.random.key(0)), inputs(model, 0)
    small, _ = compress.calibrate(model, params, UPS, [batch], order="sequential", held_out=0.0)
    measure = measured(model, ".*/mlp/up")
    hand = tree.unstack(params)
    once, _ = compress.apply(UPS, hand, measure(hand, batch))
    for part in parts:
        hand, _ = compress.apply(
            [(f"{part}/mlp/up", UPS[0][1]), UPS[1]], hand, measure(hand, batch)
        )
        hand = tree.map_leaves(lambda _, leaf: decode(leaf), tree.unstack(hand))
    same(small, hand)
    assert any(np.any(leaf != plain(small)[path]) for path, leaf in plain(once).items())


def test_once_is_with_the_statistics_of_the_model_as_it_is():
    params, batches = given("llama")
    model = MODELS["llama"]
    stats = compress.observe(model, params, batches[:2])
    small, report = done("llama", "once")
    same(small, compress.apply(RECIPE, params, stats, model.axes)[0])
    assert np.any(
        plain(small)["blocks/1/mlp/up"] != plain(done("llama", "sequential")[0])["blocks/1/mlp/up"]
    )
    assert report.protocol["tokens"] == 32 and report.protocol["held_out_tokens"] == 16
    row = next(row for row in report.leaves if row["path"] == "blocks/1/mlp/down")
    assert row["tokens"] == 32 and row["zeros"] == pytest.approx(0.5, abs=0.1)


def test_the_error_of_the_output_is_that_on_held_out_tokens():
    params, batches = given("llama")
    small, report = done("llama", "once")
    gram = compress.observe(MODELS["llama"], params, batches[2:], ".*/down", ["gram"])
    for row in report.leaves:
        if row["path"].endswith("down"):
            layer = int(row["path"].split("/")[1])
            found = np.asarray(gram["blocks/0-1/mlp/down"]["gram"][layer], np.float64)
            was, now = (plain(of)[row["path"]].astype(np.float64) for of in (params, small))
            size = lambda weight, found=found: np.trace(weight @ found @ weight.T)
            want = np.sqrt(size(now - was) / size(was))
            assert row["output_error"] == pytest.approx(want, rel=1e-3)


def test_the_loss_before_and_after_is_that_of_held_out_tokens():
    params, batches = given("llama")
    small, report = done("llama", "sequential")
    loss = report.loss
    assert loss is not None

    @jax.jit
    def mean(params):
        tokens = batches[2]["tokens"]
        logits = MODELS["llama"].apply(params, tokens[:, :-1]).logits
        return losses.softmax_cross_entropy(logits, tokens[:, 1:]).mean()

    assert loss["predictions"] == 14
    before, after = float(mean(params)), float(mean(DENSE(small)))
    assert loss["before"]["mean"] == pytest.approx(before, rel=1e-3)
    assert loss["after"]["mean"] == pytest.approx(after, rel=1e-3)
    assert loss["change"]["mean"] == pytest.approx(after - before, abs=1e-3)
    low, high = loss["change"]["interval"]
    assert low <= loss["change"]["mean"] <= high


def test_leaves_are_measured_in_groups_that_fit(monkeypatch):
    model = mlp.model(mlp.Config(8, (8, 8), 8))
    params = jax.jit(model.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    batch = {"features": jnp.asarray(rng.normal(size=(12, 8)), jnp.float32)}
    batches = [{**batch, "labels": jnp.asarray(rng.integers(0, 8, 12), jnp.int32)}] * 3
    recipe = [(".*", CHAINS)]
    whole, _ = compress.calibrate(model, params, recipe, batches)
    module = importlib.import_module("jaxmodel.compress.calibrate")
    monkeypatch.setattr(module, "BUDGET", 1)
    small, report = compress.calibrate(model, params, recipe, batches)
    same(small, whole)
    loss = report.loss
    assert loss is not None and loss["before"]["mean"] > 0 and loss["predictions"] is None


def test_gradients_are_collected_for_methods_that_want_them():
    params, batches = given("llama")

    @dataclasses.dataclass(frozen=True)
    class _Uses(compress.Rtn):
        needs = ("square", "fisher")

        def step(self, draft, stats, key):
            return draft.to(jnp.sqrt(stats["fisher"]) * stats["square"][None])

    rules = [("blocks/.*/mlp/up", (_Uses(),)), (".*", ())]
    small, _ = compress.calibrate(MODELS["llama"], params, rules, batches, held_out=0.0)
    fisher = compress.observe_gradients(MODELS["llama"], params, batches, "blocks/.*/mlp/up")
    square = compress.observe(MODELS["llama"], params, batches, "blocks/.*/mlp/up")
    path = "blocks/0-1/mlp/up"
    want = np.sqrt(fisher[path]["fisher"]) * np.asarray(square[path]["square"])[:, None]
    for i in range(2):
        np.testing.assert_allclose(plain(small)[f"blocks/{i}/mlp/up"], want[i], rtol=1e-3)


def test_padding_is_left_out_block_by_block():
    model = MODELS["bert"]
    params, _ = given("bert")
    tokens = inputs(model, 5)["tokens"][:, :6]
    mask = jnp.ones(tokens.shape, jnp.bool_)
    short = {"tokens": tokens, "mask": mask}
    long = {name: jnp.pad(a, ((0, 0), (0, 2))) for name, a in short.items()}
    (want, _), (got, report) = (
        compress.calibrate(model, params, RECIPE, [one], order="sequential", held_out=0.0)
        for one in (short, long)
    )
    same(got, want)
    assert {row["tokens"] for row in report.leaves if "tokens" in row} == {0, 12}  # 0: looked up
    assert report.protocol["tokens"] == 12


def test_statistics_that_cannot_be_used_are_those_of_equal_inputs():
    """As for an expert that no token reached, or a Gram matrix with a NaN."""
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.normal(size=(3, 4, 16)), jnp.float32)
    x = rng.normal(size=(3, 50, 16))
    gram = np.einsum("eti,etj->eij", x, x).astype(np.float32)
    gram[1], gram[2, 0, 5] = 0, np.nan
    stats = {
        "gram": gram,
        "square": np.repeat(np.float32([[50], [0], [50]]), 16, axis=1),
        "count": np.float32([50, 0, 50]),
    }
    stats = {name: jnp.asarray(array) for name, array in stats.items()}
    for text, without in (("gptq(3)", None), ("wanda(0.5)", "magnitude(0.5)")):
        small, report = compress.apply([("w", text)], {"w": weight}, {"w": stats})
        (row,) = report.leaves
        bad = "1 of 3: no inputs" + "; 1 of 3: statistics not finite" * (text == "gptq(3)")
        assert row["fallback"] == bad and row["tokens"] == 0
        made = np.asarray(decode(small["w"], jnp.float32))
        assert np.all(np.isfinite(made))
        if without:
            (alone,) = compress.parse(without)
            np.testing.assert_array_equal(made[1], decode(alone(weight[1]), jnp.float32))
    fixed, said = usable({"square": stats["square"][0], "count": stats["count"][0]})
    np.testing.assert_array_equal(fixed["square"], stats["square"][0])
    assert said == ""


def test_statistics_of_parts_of_the_data_add_up_in_any_order():
    params, batches = given("llama")
    model = MODELS["llama"]
    names = ["gram", "square", "histogram", "norms"]
    one, two, three = (
        compress.observe(model, params, [batch], "blocks/1/mlp/.*", names) for batch in batches
    )
    add = lambda a, b: jax.tree.map(np.add, a, b)
    whole = compress.observe(model, params, batches, "blocks/1/mlp/.*", names)
    for total in (add(add(one, two), three), add(one, add(three, two))):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), total, whole
        )


def test_a_compressed_model_is_measured_as_what_it_stands_for():
    """Also behind a turned input, whose statistics are those of the contraction's own input."""
    params, batches = given("llama")
    scale = np.tile(np.linspace(0.5, 2, 32, dtype=np.float32), (2, 1, 1))
    up = params["blocks"]["0-1"]["mlp"]["up"]
    turned = Turned(up, jnp.asarray(scale), hadamard=8)
    layer = params["blocks"]["0-1"]
    of = lambda leaf: {**params, "blocks": {"0-1": {**layer, "mlp": {**layer["mlp"], "up": leaf}}}}
    one, two = (
        compress.observe(MODELS["llama"], of(leaf), batches[:1], ".*/(up|down)", ["gram"])
        for leaf in (turned, jax.jit(lambda leaf: leaf.decode())(turned))
    )
    for path in one:
        np.testing.assert_allclose(one[path]["gram"], two[path]["gram"], rtol=1e-3, atol=1e-4)


def test_a_bundle_is_calibrated_and_says_so():
    params, batches = given("llama")
    bundle = hub.Bundle(MODELS["llama"], params)
    rows = []
    kept = []
    alive = lambda: sum(array.shape == (2, 8, 32) for array in jax.live_arrays())

    def on_row(row):
        rows.append(row)
        kept.append(alive())

    before = alive()  # what other tests keep
    small, report = compress.compress_bundle(
        bundle, RECIPE, batches=batches, order="sequential", held_out=0.3, on_row=on_row
    )
    assert rows == list(report.leaves)
    assert max(kept) - before == len(
        batches
    )  # activations: those in front of a block, not behind it too
    same(small.params, done("llama", "sequential")[0])
    assert report.protocol["order"] == "sequential" and len(report.protocol["data"]) == 64
    assert b"error of the output" in report.plot()
    assert "change" in report._repr_html_()


def test_what_is_wrong_is_said():
    params, batches = given("llama")
    model = MODELS["llama"]
    bundle = hub.Bundle(model, params)
    reader = hub.Bundle(MODELS["bert"], given("bert")[0])
    shapes = jax.eval_shape(LENET.init, jax.random.key(0))
    for call, message in (
        (lambda: compress.apply(GPTQ, params), "'gram' of the input of"),
        (lambda: compress.compress_bundle(bundle, GPTQ), "needs gram .* has no tokenizer"),
        (
            lambda: compress.calibrate(LENET, shapes, GPTQ, batches, order="sequential"),
            "order: 'sequential' given for a model without blocks; allowed: 'once'",
        ),
        (
            lambda: compress.calibrate(model, params, GPTQ, [batches[0]["tokens"] - 300]),
            "tokens: the token id -",
        ),
        (lambda: compress.calibrate(model, params, GPTQ, []), "batches: none given"),
        (lambda: compress.calibrate(model, params, GPTQ, batches, cap=0.0), "cap: 0.0 given"),
        (lambda: compress.calibrate(model, params, GPTQ, batches, held_out=1.0), "held_out: 1.0"),
        (
            lambda: compress.compress_bundle(bundle, [(".*", "")], order="sequential"),
            "given without batches",
        ),
        (
            lambda: generation.compare_speed(reader, reader),
            "bundle: bert does not continue texts; allowed: a decoder",
        ),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_a_model_of_texts_is_measured_by_itself():
    """As by hand on the text that is there by default; what reads no texts is refused."""
    params, _ = given("llama")
    bundle = hub.Bundle(MODELS["llama"], params, hub.train_bpe(["ab"], 257))
    recipe = compress.Recipe([("blocks/0/attn/q", "turn() | gptq(4)"), (".*", "")])
    small, told = compress.compress_bundle(bundle, recipe)
    batches = compress.text_batches(bundle)
    again, by_hand = compress.compress_bundle(bundle, recipe, batches=batches)
    assert tree.fingerprint(small.params) == tree.fingerprint(again.params)
    assert told.protocol["text"]["name"] == "english_train"
    assert told.protocol["data"] == by_hand.protocol["data"]
    assert isinstance(tree.flatten(small.params)["blocks/0/attn/q"], Turned)
    other = mlp.model(mlp.SIZES["tiny"])
    with pytest.raises(InputError, match="batches: none given; the recipe needs gram .*features"):
        compress.compress_bundle(
            hub.Bundle(other, jax.jit(other.init)(jax.random.key(0))), [(".*", "gptq(4)")]
        )
