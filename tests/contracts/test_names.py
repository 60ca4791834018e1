"""No name of a leaf means anything: a family whose leaves are called otherwise, and misleadingly,
is treated as its axes say.
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import adapt, axes, compress, hub, losses, models, ops, optim, train, tree
from jaxmodel.axes import Axes
from jaxmodel.cli.training import _say_without
from jaxmodel.errors import InputError
from jaxmodel.leaves import QTensor
from jaxmodel.models.family import KNOWN
from jaxmodel.models.model import token_inputs
from jaxmodel.optim.optimizers import _matrices
from jaxmodel.train import flops, statistics
from jaxmodel.train.placing import check_batch


@dataclasses.dataclass(frozen=True)
class Config:
    symbols: int = 50
    units: int = 16
    inner: int = 32
    heads: int = 2
    layers: int = 3
    classes: int = 5


RULES = (
    ("lookup", "VD table"),
    ("blocks/.*/kernel", "D"),  # a norm
    ("blocks/.*/norm/mean", "D measured"),
    ("blocks/.*/mixer/(q|k|v)", "(Kh)D"),  # read by code of its own, which knows of no fused leaf
    ("blocks/.*/mixer/embed", "D(Kh)"),
    ("blocks/.*/norm/head", "FD"),
    ("blocks/.*/norm/positions", "DF"),
    ("stem", "D"),  # the last norm
    ("readout", "cD"),
    ("readout_shift", "c"),
)
MATRICES = {"mixer/q", "mixer/k", "mixer/v", "mixer/embed", "norm/head", "norm/positions"}


@models.family(Config, {"tiny": Config()}, name="misnamed")
def misnamed(config: Config, policy: ops.Policy = ops.Policy()) -> models.Model:
    c = config
    wide = dataclasses.replace(policy, activation_dtype="float32")

    def embed(params, inputs, cache=None, rng=None, train=False):
        return ops.embed(params["lookup"], inputs["tokens"], policy), {}

    def block(params, x, context, cache=None, layer=0, rng=None, train=False):
        mixer, inner = params["mixer"], params["norm"]
        level = jax.lax.stop_gradient(inner["mean"])
        x = x - level.astype(x.dtype)[None, None]
        y = ops.rms_norm(x, params["kernel"], 1e-5)
        q, k, v = (ops.einsum("BTD,(Kh)D->BTKh", y, mixer[n], policy, K=c.heads) for n in "qkv")
        x = x + ops.einsum("BTKh,D(Kh)->BTD", q * k + v, mixer["embed"], policy)
        y = jax.nn.silu(ops.einsum("BTD,FD->BTF", x, inner["head"], policy))
        return x + ops.einsum("BTF,DF->BTD", y, inner["positions"], policy), None, {}

    def head(params, x, rng=None, train=False):
        x = ops.rms_norm(x.mean(axis=1, keepdims=True), params["stem"], 1e-5)
        y = ops.einsum("BTD,VD->BTV", x, params["readout"], wide)[:, 0]
        return y + params["readout_shift"][None]

    def init(key):
        keys = iter(jax.random.split(key, 8))
        new = lambda *shape: 0.1 * jax.random.normal(next(keys), shape)
        d, f, n = c.units, c.inner, c.layers
        blocks = {
            "kernel": jnp.ones((n, d)),
            "mixer": {name: new(n, d, d) for name in ("q", "k", "v", "embed")},
            "norm": {"mean": jnp.ones((n, d)), "head": new(n, f, d), "positions": new(n, d, f)},
        }
        top = {"stem": jnp.ones(d), "readout": new(c.classes, d)}
        top["readout_shift"] = jnp.ones(c.classes)
        return {"lookup": new(c.symbols, d), "blocks": {f"0-{n - 1}": blocks}, **top}

    parts = models.Parts(embed, block, head)
    declared = Axes(RULES, (("K", c.heads),))
    return models.Model(c, policy, init, parts, token_inputs, None, declared)


MODEL = misnamed(Config())
FAMILY = KNOWN.pop("misnamed")  # known in this file only: other tests go through all families


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(KNOWN, "misnamed", FAMILY)


KEY = jax.random.key(0)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 6)), jnp.int32)


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


def layers_of(paths) -> set[str]:
    """Names inside of a layer, whichever it is."""
    return {path.split("/", 2)[2] if path.startswith("blocks/") else path for path in paths}


def test_what_trains_and_decays(params):
    trains, frozen = tree.partition(params, axes.trainable(MODEL.axes))
    assert layers_of(tree.flatten(frozen)) == {"norm/mean"}
    config = train.TrainConfig(steps=4, optimizer="sgd", weight_decay=0.5, schedule="constant")
    optimizer = optim.optimizer("sgd", 0.1, weight_decay=0.5, roles=axes.role_of(MODEL.axes))
    zero = jax.tree.map(jnp.zeros_like, trains)
    updates, _ = optimizer.update(zero, optimizer.init(trains), trains, value=0.0)
    moved = {path for path, u in tree.flatten(updates).items() if np.any(np.asarray(u) != 0)}
    assert layers_of(moved) == {*MATRICES, "lookup", "readout"}
    state = train.Program(MODEL, config, loss=losses.classification).shapes()
    named = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state.opt_state)]
    assert any("readout" in name for name in named) and not any("mean" in name for name in named)


def test_muon_takes_the_matrices_of_layers(params):
    is_leaf = lambda node: not isinstance(node, dict)
    routed = jax.tree.leaves_with_path(_matrices(axes.role_of(MODEL.axes), params), is_leaf=is_leaf)
    chosen = [jax.tree_util.keystr(path, simple=True, separator="/") for path, how in routed if how]
    assert layers_of(chosen) == MATRICES


def test_recipes(params):
    small, report = compress.compress_bundle(
        hub.Bundle(MODEL, params), compress.get_recipe("int4-rtn")
    )
    bits = {
        path: leaf.bits if isinstance(leaf, QTensor) else None
        for path, leaf in tree.flatten(small.params).items()
    }
    assert layers_of(path for path, n in bits.items() if n == 4) == MATRICES
    assert {path for path, n in bits.items() if n == 8} == {"lookup", "readout"}
    assert report.bytes_after < report.bytes_before


def test_operations(params):
    d, f = 16, 32
    layer = 4 * d * d + 2 * d * f
    assert flops.per_token(MODEL, params, 0) == 6 * (3 * layer + 5 * d)
    part = {"blocks": {"2": tree.unstack(params)["blocks"]["2"]}}
    cost = 2 * 2 * layer + (4 + 2) * layer + 4 * 5 * d  # the norm of layer 2 trains in front of all
    assert flops.per_token(MODEL, params, 0, trains=part) == cost


def test_adapters_of_every_matrix(params):
    model, adapted = adapt.lora(MODEL, params, adapt.LoRA(2), jax.random.key(0))
    beside = {path.rpartition("_lora/")[0] for path in tree.flatten(adapted) if "_lora/" in path}
    assert layers_of(beside) == MATRICES
    same = jax.jit(model.apply)(adapted, TOKENS).logits
    np.testing.assert_allclose(same, jax.jit(MODEL.apply)(params, TOKENS).logits, atol=1e-6)


def test_rates_and_last_layers(params):
    rates = tree.assign(adapt.layer_rates(MODEL, params, 0.5), params)
    found = [
        rates[p] for p in ("lookup", "blocks/0/norm/head", "blocks/2/kernel", "stem", "readout")
    ]
    assert found == [1 / 16, 1 / 8, 1 / 2, 1, 1]
    for count in range(4):
        values = tree.assign(adapt.last_layers(MODEL, params, count), params)
        top = {path for path, yes in values.items() if yes and not path.startswith("blocks")}
        assert top == {"readout", "readout_shift", *(["stem"] if count else [])}
        inside = {path for path, yes in values.items() if yes and path.startswith("blocks")}
        assert {path.split("/")[1] for path in inside} == {str(i) for i in range(3 - count, 3)}
        assert not any(path.endswith("mean") for path in inside)


def test_maximal_update():
    """Four times as wide: matrices and the readout learn at a quarter of the rate."""
    wide = misnamed(Config(units=64, inner=128, heads=8))
    factors = adapt.mup(wide, Config())
    shapes = jax.eval_shape(wide.init, jax.random.key(0))
    rates = tree.assign(factors.rates, shapes)
    assert layers_of(path for path, rate in rates.items() if rate == 0.25) == {*MATRICES, "readout"}
    assert {rate for rate in rates.values()} == {0.25, 1.0}
    first = tree.flatten(jax.jit(lambda k: adapt.initialize(wide, k, factors.init))(KEY))
    sizes = {path: float(jnp.std(leaf)) for path, leaf in first.items()}
    for path, size in (("lookup", 0.1), ("readout", 0.025), ("blocks/0-2/norm/head", 0.05)):
        np.testing.assert_allclose(sizes[path], size, rtol=0.1)
    with pytest.raises(InputError, match="base: heads of width 8 given, but the model's have 32"):
        adapt.mup(misnamed(Config(units=64, inner=128)), Config())


def test_positions_are_a_table_beside_that_of_the_words(params):
    """Whatever it is called, rows longer than it are refused; a table over something else is no
    limit.
    """
    batch = {"tokens": jnp.zeros((1, 9), jnp.int32)}
    for letter, refused in (("t", True), ("b", False)):
        declared = Axes((("head", f"{letter}D table"), *RULES), MODEL.axes.sizes)
        model = dataclasses.replace(MODEL, axes=declared)
        with_one = {**params, "head": jnp.ones((8, 16))}
        with pytest.raises(InputError, match="of 9 .* context of 8") if refused else nullcontext():
            check_batch(model, with_one, batch)


def test_who_gets_no_adapter_is_told_by_role(params, capsys):
    model, adapted = adapt.lora(MODEL, params, [(".*/(q|k|v)", adapt.LoRA(2)), (".*", None)], KEY)
    _say_without(model, adapted)
    told = capsys.readouterr().err
    assert "mixer/embed, norm/head, norm/positions have no adapters" in told


def test_another_head(params):
    model, new = adapt.replace_head(MODEL, params, 7, jax.random.key(1))
    before, after = tree.flatten(params), tree.flatten(new)
    changed = {path for path in after if after[path] is not before.get(path)}
    assert changed == {"readout", "readout_shift"} and new["readout"].shape == (7, 16)
    assert jax.eval_shape(model.apply, new, TOKENS).logits.shape == (2, 7)


def test_what_runs_is_not_fused_where_the_code_knows_of_none(params):
    running = hub.Bundle(MODEL, params).for_inference()
    assert tree.flatten(running).keys() == tree.flatten(params).keys()


def test_batch_statistics_are_those_that_are_declared(params):
    """A leaf that is called a norm's variance is one where the axes say that it is measured."""
    with_one = {**params, "norm": {"mean": jnp.ones(16), "variance": jnp.ones(16)}}
    for word, found in (("", ()), (" measured", ("norm",))):
        rules = (*RULES, ("norm/(mean|variance)", f"D{word}"))
        model = dataclasses.replace(MODEL, axes=Axes(rules, MODEL.axes.sizes))
        assert statistics._norms(model, with_one) == found
