"""Ranges of even grids: each rule against its definition in NumPy, over all candidates."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import compress
from jaxmodel.compress.quantize.ranges import NARROWEST, SHRINKS, RangeRule, even_grid
from jaxmodel.errors import InputError
from jaxmodel.text_form import members, read_one

BITS = 3
GROUP = 16
RULES = [
    "absmax",
    "percentile(80)",
    "mse",
    "power(1.3)",
    "huber(0.2)",
    "gibbs(0.05)",
    "histogram(32)",
    "hqq(0.6)",
]
SEARCHED = ["mse", "power(1.3)", "huber(0.2)", "gibbs(0.05)"]
SHAPE = (4, 2, GROUP)
WEIGHT = np.random.default_rng(0).standard_t(3, size=(4, 2 * GROUP)).astype(np.float32)
IMPORTANCE = np.random.default_rng(1).uniform(0.1, 4, 2 * GROUP).astype(np.float32)
KEEP = np.random.default_rng(2).random(WEIGHT.shape) < 0.7
COUNTS = (IMPORTANCE * KEEP).reshape(SHAPE)
VALUES = WEIGHT.reshape(SHAPE)


@functools.cache
def grids():
    """Return scale and minimum by every rule, of symmetric and of affine grids, in one program."""

    @jax.jit
    def run(weight, importance, keep):
        return {
            (text, symmetric): (grid.scale, grid.minimum)
            for text in RULES
            for symmetric in (True, False)
            for grid in [
                even_grid(
                    weight,
                    BITS,
                    GROUP,
                    symmetric=symmetric,
                    rule=read_one(RangeRule, text),
                    importance=importance,
                    keep=keep,
                    dtype="float32",
                )
            ]
        }

    found = run(jnp.asarray(WEIGHT), jnp.asarray(IMPORTANCE), jnp.asarray(KEEP))
    return jax.tree.map(np.asarray, found)


def levels(low, high, symmetric):
    """Return all values of a grid, `[..., levels]`."""
    if symmetric:
        return high[..., None] / 3 * np.arange(-4, 4)  # one more below zero
    return low[..., None] + (high - low)[..., None] / 7 * np.arange(8)


def widest(symmetric):
    if not symmetric:
        return VALUES.min(-1), VALUES.max(-1)
    high = np.abs(VALUES).max(-1)
    return -high, high


def mean(of):
    return (COUNTS * of).sum(-1) / COUNTS.sum(-1)


def cost(text, allowed, symmetric) -> np.ndarray:
    """Return what values that are allowed cost each group, by the definition of a rule."""
    off = np.abs(allowed[:, :, None, :] - VALUES[..., None])  # [out, groups, size, levels]
    error = off.min(-1)
    mean_square = mean(VALUES**2)[..., None]
    match text.partition("(")[0]:
        case "mse":
            return mean(error**2)
        case "power":
            return mean(error**1.3)
        case "huber":
            ratio = error / np.sqrt(mean_square)
            return mean(np.where(ratio < 0.2, ratio**2 / 2, 0.2 * (ratio - 0.1)))
        case _:  # gibbs
            chance = np.exp(-((off**2) - error[..., None] ** 2) / (0.05 * mean_square[..., None]))
            chance = chance / chance.sum(-1, keepdims=True)
            return mean((chance * off**2).sum(-1))


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_histogram_loses_the_least_information(symmetric):
    low, high = widest(symmetric)
    low = 0 * high if symmetric else low
    values = np.abs(VALUES) if symmetric else VALUES
    relative = (values - low[..., None]) / (high - low)[..., None]
    counts, edges = np.histogram(relative, 32, (0.0, 1.0), weights=COUNTS)
    middles = (edges[1:] + edges[:-1]) / 2

    def divergence(factor):
        start = 0 if symmetric else (1 - factor) / 2
        allowed = start + factor * np.arange(4 if symmetric else 8) / (3 if symmetric else 7)
        cell = np.abs(allowed - middles[:, None]).argmin(-1)
        total = 0.0
        for k in set(cell):
            own = counts[(cell == k) & (counts > 0)]
            total += (own * np.log(own / own.mean())).sum() if len(own) else 0
        return total

    scale, _ = grids()["histogram(32)", symmetric]
    factor = scale * (3 if symmetric else 7) / (high - low)
    np.testing.assert_allclose(factor, factor[0, 0], rtol=1e-4)
    every = [divergence(f) for f in np.linspace(1, NARROWEST, SHRINKS)]
    # a bin whose middle lies on a border may fall to either side
    assert divergence(factor[0, 0]) <= min(every) * 1.02 < np.mean(every)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("text", SEARCHED)
def test_a_search_finds_what_brute_force_finds(text, symmetric):
    low, high = widest(symmetric)
    factors = np.linspace(1, NARROWEST, SHRINKS)
    if symmetric and not text.startswith("histogram"):
        factors = np.concatenate([factors, -factors])
    all_costs = np.stack(
        [cost(text, levels(low * f, high * f, symmetric), symmetric) for f in factors]
    )
    scale, minimum = grids()[text, symmetric]
    least = all_costs.min(0)
    found = cost(
        text,
        levels(minimum, minimum + 7 * scale, False)
        if minimum is not None
        else levels(scale, 3 * scale, True),
        symmetric,
    )
    np.testing.assert_allclose(found, least, rtol=1e-4, atol=1e-6)
    assert np.any(least < 0.9 * all_costs[0])  # not all of them are the widest


def test_absmax_and_percentile():
    for symmetric in (True, False):
        low, high = widest(symmetric)
        scale, _ = grids()["absmax", symmetric]
        np.testing.assert_allclose(scale, high / 3 if symmetric else (high - low) / 7, rtol=1e-6)
    scale, minimum = grids()["percentile(80)", False]
    scale_of_sizes, _ = grids()["percentile(80)", True]
    for index in np.ndindex(4, 2):
        among = {"weights": COUNTS[index], "method": "inverted_cdf"}
        ends = np.quantile(VALUES[index], [0.1, 0.9], **among)
        np.testing.assert_allclose(minimum[index], ends[0], rtol=1e-5)
        np.testing.assert_allclose(scale[index], (ends[1] - ends[0]) / 7, rtol=1e-5)
        end = np.quantile(np.abs(VALUES[index]), 0.8, **among)
        np.testing.assert_allclose(scale_of_sizes[index], end / 3, rtol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_hqq_lowers_its_norm_below_that_of_the_widest_range(symmetric):
    def norm(text):
        scale, minimum = grids()[text, symmetric]
        low = scale if minimum is None else minimum
        allowed = levels(low, 3 * scale if symmetric else low + 7 * scale, symmetric)
        return mean(np.abs(allowed[:, :, None, :] - VALUES[..., None]).min(-1) ** 0.6)

    assert np.all(norm("hqq(0.6)") <= norm("absmax") * (1 + 1e-6))
    assert np.mean(norm("hqq(0.6)")) < 0.98 * np.mean(norm("absmax"))


def test_every_rule_is_tried():
    assert {text.partition("(")[0] for text in RULES} == set(members(RangeRule))


def test_a_rule_may_want_statistics():
    method = compress.Rtn(4, range="mse(weighted=True)")
    assert method.needs == ("square",) and compress.Rtn(4, range="mse").needs == ()
    assert compress.Gptq(4, range="mse(weighted=True)").needs == ("gram",)
    with pytest.raises(InputError, match="needs 'square'"):
        method(jnp.asarray(WEIGHT))


def test_an_unknown_rule_names_the_nearest():
    with pytest.raises(InputError, match=r"range: 'msee' is not known; allowed: .*nearest: mse"):
        compress.Rtn(4, range="msee")
    with pytest.raises(InputError, match=r"percentile: at is 101"):
        compress.parse("rtn(4, range='percentile(101)')")


def test_a_negative_scale_gives_the_one_value_more_to_the_largest_weights():
    row = np.array([[4.0, 1.0, -1.0, -3.0]], np.float32)  # -4 steps of -1, which are 4
    leaf = compress.Rtn(BITS, range="mse", scale_dtype="float32")(jnp.asarray(row))
    assert float(leaf.scale[0, 0]) < 0
    np.testing.assert_allclose(leaf.decode(), row, atol=0.03)
