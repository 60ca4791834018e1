"""muP: the table of the paper by leaf, the tied head against its explicit multiplier, and a small
coordinate check.
"""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodel import tree
from jaxmodel.adapt import coord_check, initialize, initializers, mup, scale_by_path
from jaxmodel.models import bert, gpt2, llama, mlp, vit, wrap

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 16, (2, 8)), jnp.int32)
UNTIED = llama.Config(16, 128, 2, 4, 2, 32, 256, 32)  # two layers, so that they stand stacked


def narrow(config, width: int):
    """The same heads, narrower."""
    return dataclasses.replace(config, width=width, head_width=width // 4, mlp_width=2 * width)


def start(model, rules):
    """First weights by rules, where the model's own are any numbers: compiling its draws would take
    most of the time.
    """
    rng = np.random.default_rng(0)

    def number(path: str, a: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(
            np.ones(a.shape) if "norm/weight" in path else 0.05 * rng.normal(size=a.shape),
            jnp.float32,
        )

    own = tree.map_leaves(number, jax.eval_shape(model.init, jax.random.key(0)))
    return initialize(dataclasses.replace(model, init=lambda key: own), jax.random.key(0), rules)


@pytest.mark.parametrize(
    ("module", "name"), [(gpt2, "tiny"), (llama, "tiny-gemma"), (bert, "tiny"), (vit, "tiny")]
)
def test_at_the_width_of_the_base_nothing_changes(module, name):
    model = module.model(module.SIZES[name])
    for base in (model.config, model.config.width):
        same = mup(model, base)
        assert same.model is model
        assert [value for _, value in same.init] == [None] and [
            value for _, value in same.rates
        ] == [1.0]


def test_the_table_of_the_paper():
    """4 times as wide: a hidden matrix starts with half the deviation and learns at a quarter of
    the rate, and so on.
    """
    model = llama.model(UNTIED)
    wide = mup(model, narrow(UNTIED, 32))
    rates = tree.assign(wide.rates, jax.eval_shape(model.init, jax.random.key(0)))
    ours, own = (tree.flatten(start(model, rules)) for rules in (wide.init, [(".*", None)]))
    kinds = {
        "hidden": (
            0.5,
            0.25,
            [
                f"{part}/{n}"
                for part, ns in (("attn", "qkvo"), ("mlp", ("gate", "up", "down")))
                for n in ns
            ],
        ),
        "vector": (1.0, 1.0, ["attn_norm/weight", "mlp_norm/weight"]),
    }
    for factor, rate, names in kinds.values():
        for path in names:
            np.testing.assert_allclose(
                ours[f"blocks/0-1/{path}"], factor * own[f"blocks/0-1/{path}"], rtol=1e-6
            )
            assert rates[f"blocks/1/{path}"] == rate, path
    for path, factor, rate in (("head", 0.25, 0.25), ("embed", 1, 1), ("norm/weight", 1, 1)):
        np.testing.assert_allclose(ours[path], factor * own[path], rtol=1e-6)
        assert rates[path] == rate


def test_scores_shrink_with_the_width_of_a_head_and_not_with_its_root():
    base = narrow(UNTIED, 32)
    assert mup(llama.model(UNTIED), base).model.config.query_scale == pytest.approx(
        8**-0.5 * 8 / 32
    )
    scaled = dataclasses.replace(base, query_scale=0.5)
    assert mup(llama.model(UNTIED), scaled).model.config.query_scale == pytest.approx(0.5 * 8 / 32)
    assert (
        mup(
            llama.model(dataclasses.replace(UNTIED, heads=8, kv_heads=4, head_width=16)), 32
        ).model.config.query_scale
        is None
    )
    gemma = dataclasses.replace(
        llama.SIZES["tiny-gemma"],
        width=128,
        heads=16,
        kv_heads=8,
        mlp_width=256,
        embed_scale=128**0.5,
    )
    assert mup(llama.model(gemma), llama.SIZES["tiny-gemma"]).model.config.embed_scale == 32**0.5


def trained(model, params, optimizer, steps: int = 3):
    """Logits before each step of training and after the last."""

    def loss(params):
        logits = model.apply(params, TOKENS).logits
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, (TOKENS + 1) % 16
        ).mean(), logits

    def step(carry, _):
        params, state = carry
        (_, logits), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), logits

    return jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), None, steps + 1)[1])(params)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_tied_head_learns_as_with_the_multiplier_of_the_paper(offset):
    """Logits times 1 / m and a norm that starts at 1, against what `mup` does: the norm starts at 1
    / m and learns by it.
    """
    config = dataclasses.replace(UNTIED, depth=1, tied=True, norm_offset=offset)
    wide = mup(llama.model(config), narrow(config, 32))
    times = 4.0
    params = start(wide.model, wide.init)
    if offset:
        assert tree.assign(wide.init, params)["norm/weight"] == initializers.Constant(
            1 / times - offset
        )
    assert np.allclose(params["norm"]["weight"] + offset, 1 / times)
    explicit = wrap(
        wide.model, lambda parts: parts._replace(head=lambda *args: parts.head(*args) / times)
    )
    plain = {**params, "norm": {"weight": np.full(128, 1 - offset, np.float32)}}
    rates = tuple((p, 1.0 if p.startswith("norm") else value) for p, value in wide.rates)
    adam = lambda rules: optax.chain(
        optax.scale_by_adam(eps=1e-20), optax.scale(-1e-2), scale_by_path(rules)
    )
    got = trained(wide.model, params, adam(wide.rates))
    want = trained(explicit, plain, adam(rates))
    assert np.abs(want[-1] - want[0]).max() > 0.1
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


PIXELS = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)
FAMILIES = {
    "llama": (llama, lambda w: llama.Config(16, w, 1, 4, 2, w // 4, 2 * w, 32), TOKENS),
    "gpt2": (gpt2, lambda w: gpt2.Config(16, w, 1, w // 16, 32), TOKENS),
    "bert": (bert, lambda w: bert.Config(16, w, 1, w // 16, 2 * w, 32), TOKENS),
    "vit": (vit, lambda w: vit.Config(8, 4, w, 1, w // 16, 2 * w, vit.numbered(5)), PIXELS),
}


@functools.cache
def sizes(family: str, width: int, standard: bool) -> dict[str, float]:
    """The sizes of activations after three steps of Adam."""
    module, config, inputs = FAMILIES[family]
    model = module.model(config(width))
    optimizer = optax.adam(3e-3)
    init = [(".*", None)]
    if not standard:
        wide = mup(model, config(32))
        model = wide.model
        optimizer = optax.chain(optimizer, scale_by_path(wide.rates))
        init = wide.init

    def loss(params):
        logits = model.apply(params, inputs).logits
        classes = jnp.arange(logits[..., 0].size, dtype=jnp.int32).reshape(logits.shape[:-1]) % 5
        return optax.softmax_cross_entropy_with_integer_labels(logits, classes).mean()

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(key):
        params = initialize(model, key, init)
        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), None, 3)
        return coord_check(model, params, inputs)

    return {place: float(size) for place, size in run(jax.random.key(0)).items()}


def steepest(family: str, standard: bool) -> float:
    """The largest slope of a size over the width, in logarithms, from 32 to 256."""
    low, high = (
        sizes(family, 32, True),
        sizes(family, 256, standard),
    )  # at the width of the base both are the same
    return max(abs(np.log2(high[place] / low[place]) / 3) for place in low)


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_after_training_do_not_depend_on_the_width(family):
    """At widths so small the logits' first noise still counts; experiments/mup_coordinates.py goes
    to 1024.
    """
    assert steepest(family, standard=False) < 0.3


def test_under_the_standard_parametrisation_they_do():
    assert steepest("gpt2", standard=True) > 0.6


def test_coordinates_are_the_sizes_of_the_parts():
    model = gpt2.model(gpt2.SIZES["tiny"])
    params = start(model, [(".*", None)])
    found, out = jax.jit(
        lambda p: (coord_check(model, p, {"tokens": TOKENS}), model.apply(p, TOKENS))
    )(params)
    assert set(found) == {
        "embed",
        *(f"blocks/{i}{end}" for i in range(3) for end in ("", "/added")),
        "logits",
    }
    np.testing.assert_allclose(found["logits"], np.abs(out.logits).mean(), rtol=1e-5)
    np.testing.assert_allclose(found["blocks/2"], np.abs(out.hidden).mean(), rtol=1e-5)


def test_updates_are_scaled_by_layer():
    params = {"a": jnp.ones(2), "blocks": {"0-2": {"w": jnp.ones((3, 2, 2))}}}
    rules = [("a", 3.0), ("blocks/1/w", 0.5), ("blocks/.*", 2.0)]
    optimizer = optax.chain(optax.sgd(1.0), scale_by_path(rules))
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    want = {
        "a": jnp.full(2, -3.0),
        "blocks": {
            "0-2": {"w": jnp.broadcast_to(-jnp.asarray([[[2.0]], [[0.5]], [[2.0]]]), (3, 2, 2))}
        },
    }
    chex.assert_trees_all_equal(updates, want)
    one = scale_by_path([(".*", 2.0)]).update(params, optax.EmptyState())[0]
    chex.assert_trees_all_equal(one, jax.tree.map(lambda a: 2 * a, params))


def test_own_rules_stand_in_front():
    wide = mup(llama.model(UNTIED), narrow(UNTIED, 32))
    params = jax.device_get(
        start(wide.model, [("head", "zeros"), ("blocks/.*/q", "zeros"), *wide.init])
    )
    assert not np.any(params["head"]) and not np.any(params["blocks"]["0-1"]["attn"]["q"])


@pytest.mark.parametrize(
    ("model", "base", "says"),
    [
        (
            mlp.model(mlp.SIZES["tiny"]),
            16,
            "model: a config of jaxmodel.models.mlp given; allowed: bert, gpt2, llama, vit",
        ),
        (
            llama.model(UNTIED),
            48,
            "base: the width 48 given; allowed: a width that scales width 128, mlp_width 256, "
            "heads 4, kv_heads 2",
        ),
        (llama.model(UNTIED), 0, "base: the width 0 given"),
        (
            llama.model(UNTIED),
            gpt2.SIZES["tiny"],
            "base: Config given; allowed: a width, or a config of llama",
        ),
        (
            llama.model(UNTIED),
            dataclasses.replace(UNTIED, depth=1),
            "base: it differs from the model in the leaf 'blocks/1/attn",
        ),
        (
            gpt2.model(gpt2.Config(16, 64, 1, 4, 8)),
            gpt2.Config(16, 32, 1, 4, 8),
            "base: heads of width 8 given, but the model's have 16",
        ),
        (
            wrap(llama.model(UNTIED), lambda parts: parts),
            32,
            "model: a wrapped model given; allowed",
        ),
    ],
)
def test_what_it_cannot_do_is_one_line(model, base, says):
    with pytest.raises(ValueError) as error:
        mup(model, base)
    assert says in str(error.value) and "\n" not in str(error.value)
