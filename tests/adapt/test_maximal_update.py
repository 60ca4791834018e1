"""muP: the table of the paper by leaf, the tied head against its explicit multiplier, and a small
coordinate check.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodel import tree
from jaxmodel.adapt import coord_check, initialize, initializers, mup, scale_by_path
from jaxmodel.errors import InputError
from jaxmodel.models import (
    bert,
    cnn,
    foreign,
    gpt2,
    llama,
    mlp,
    rnn,
    t5,
    transformer,
    vit,
    wrap,
)
from jaxmodel.models.family import KNOWN, family

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 16, (2, 8)), jnp.int32)
UNTIED = llama.Config(16, 128, 2, 4, 2, 32, 256, 32)  # two layers, so that they stand stacked


@dataclasses.dataclass(frozen=True)
class Bare:
    width: int


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
    ours = tree.flatten(start(wide.model, wide.init))
    new = 0.02  # the deviation of first weights; of what is added to the stream times (2 L) ** -0.5
    kinds = {
        "attn/(q|k|v)|mlp/(gate|up)": (new / 2, 0.25),
        "attn/o|mlp/down": (new / 2 / 2, 0.25),
        "(attn|mlp)_norm/weight": (1.0, 1.0),
    }
    names = {f"blocks/0-1/{kind}": values for kind, values in kinds.items()}
    names |= {"head": (new / 4, 0.25), "embed": (new, 1.0), "norm/weight": (1.0, 1.0)}
    for path, leaf in ours.items():
        size, rate = next(v for kind, v in names.items() if re.fullmatch(_all_of(kind), path))
        np.testing.assert_allclose(np.sqrt(np.mean(np.square(leaf))), size, rtol=0.05)
        assert rates[tree.layer_paths(path)[-1]] == rate, path


def _all_of(kind: str) -> str:
    """`blocks/0-1/` in front of each alternative."""
    before, _, rest = kind.rpartition("0-1/")
    return f"{before}0-1/({rest})" if before else kind


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


FAMILIES = {
    "cnn": (cnn, lambda w: cnn.Config((w // 4, w // 2), 10, 5, dropout=0.0)),
    "gpt2": (gpt2, lambda w: gpt2.Config(16, w, 1, w // 16, 32)),
    "llama": (llama, lambda w: llama.Config(16, w, 1, 4, 2, w // 4, 2 * w, 32)),
    "mlp": (mlp, lambda w: mlp.Config(8, (w, w), 5)),
    "rnn": (rnn, lambda w: rnn.Config(16, w, 1)),
    "transformer": (transformer, lambda w: transformer.Config(16, w, 1, 1, w // 16, 2 * w)),
}
"""Of each kind one; experiments/mup_coordinates.py goes through all families of the package."""

BASE, WIDEST = 64, 512


@functools.cache
def sizes(family: str, width: int, standard: bool) -> dict[str, float]:
    """The sizes of activations after three steps of Adam."""
    module, config = FAMILIES[family]
    model = module.model(config(width))
    optimizer = optax.adam(3e-3)
    init = [(".*", None)]
    if not standard:
        wide = mup(model, config(BASE))
        model = wide.model
        optimizer = optax.chain(optimizer, scale_by_path(wide.rates))
        init = wide.init
    rng = np.random.default_rng(0)
    inputs = {
        name: jnp.asarray(
            rng.integers(0, 16, a.shape) if a.dtype == jnp.int32 else rng.normal(size=a.shape),
            a.dtype,
        )
        for name, a in model.inputs(4, 8).items()
    }

    def loss(params):
        logits = model.apply(params, inputs).logits
        classes = jnp.arange(logits[..., 0].size, dtype=jnp.int32).reshape(logits.shape[:-1]) % 5
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, classes % logits.shape[-1]
        ).mean()

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(key):
        params = initialize(model, key, init)
        end: Any = jax.lax.scan(step, (params, optimizer.init(params)), None, 3)[0]
        return coord_check(model, end[0], inputs)

    return {place: float(size) for place, size in run(jax.random.key(0)).items()}


def steepest(family: str, standard: bool) -> float:
    """The largest slope of a size over the width, in logarithms, from 64 to 512."""
    low, high = (
        sizes(family, BASE, True),
        sizes(family, WIDEST, standard),
    )  # at the width of the base both are the same
    # the last norm of the 2017 Transformer is in its last layer, and has the factor of the head
    but = ("blocks/0", "blocks/0/added") if family == "transformer" else ()
    slopes = {
        place: np.log2(high[place] / low[place]) / np.log2(WIDEST / BASE)
        for place in low
        if place not in but and (low[place] or high[place])
    }
    return max(map(abs, slopes.values()))


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_after_training_do_not_depend_on_the_width(family):
    """At widths so small the logits' first noise still counts."""
    assert steepest(family, standard=False) < 0.3


@pytest.mark.parametrize("family", ["gpt2", "llama", "mlp"])
def test_under_the_standard_parametrisation_they_do(family):
    assert steepest(family, standard=True) > 0.45


def test_a_readout_that_is_a_vector_and_a_table_over_positions():
    """The score of additive attention sums over its units, as a head does; a norm's weight of the
    same letters multiplies them.
    """
    model = rnn.model(rnn.Config(16, 64, 1))
    rates = tree.assign(mup(model, 16).rates, jax.eval_shape(model.init, jax.random.key(0)))
    assert rates["blocks/0/attn/score"] == 0.25
    assert rates["blocks/0/cell/input_bias"] == 1.0
    small = t5.model(t5.Config(16, 64, 1, 1, 8, 8, 64, buckets=8, distance=6))
    rates = tree.assign(mup(small, 16).rates, jax.eval_shape(small.init, jax.random.key(0)))
    assert rates["positions"] == 1.0


def test_a_tied_head_without_a_norm_is_refused():
    @family(Bare, name="bare")
    def bare(config, policy=None):
        small = gpt2.model(gpt2.Config(16, config.width, 1, config.width // 16, 8))
        head = lambda params, x, rng=None, train=False: jnp.einsum(
            "btd,vd->btv", x, params["embed"]
        )
        return dataclasses.replace(small, config=config, parts=small.parts._replace(head=head))

    with pytest.raises(InputError, match="its head is the table 'embed' without a norm in front"):
        mup(bare(Bare(64)), Bare(32))
    KNOWN.pop("bare")


def test_settings_that_go_with_the_width_are_those_of_the_base():
    wide = mup(transformer.model(transformer.Config(16, 64, 1, 1, 4, 64)), 16)
    assert wide.model.config.scale == 4.0
    # the last norm is inside of the last layer, and is in front of the head alone
    shapes = jax.eval_shape(wide.model.init, jax.random.key(0))
    rates = tree.assign(wide.rates, shapes)
    assert rates["blocks/0/mlp_norm/weight"] == rates["blocks/0/mlp_norm/bias"] == 0.25
    assert rates["blocks/0/attn_norm/weight"] == rates["embed"] == 1.0
    wide = mup(t5.model(t5.Config(16, 64, 1, 1, 4, 16, 64, buckets=8, distance=6)), 16)
    assert wide.model.config.scale == 16**-0.5


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
            "base: 16 given; allowed: a config, as jaxmodel.models.mlp has no `width`",
        ),
        (
            foreign.from_linen(nn.Dense(3), jax.ShapeDtypeStruct((1, 4), jnp.float32)),
            16,
            "model: one of no family given; allowed: a family that declares what its leaves' axes",
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
