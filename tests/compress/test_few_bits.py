"""Tables, three and two levels, numbers of 8 bits, other roundings, and rounded inputs."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from scipy.stats import norm

from jaxmodel import compress, leaves, ops
from jaxmodel.compress.draft import stored_of
from jaxmodel.compress.quantize.tables import NF4, robust_slope
from jaxmodel.errors import InputError
from jaxmodel.leaves.leaf import to_tensors
from jaxmodel.ops.probe import histogram, histogram_quantile

WEIGHT = np.random.default_rng(0).normal(size=(16, 640)).astype(np.float32)
DECODE = jax.jit(lambda leaf: leaf.decode())
CODES = jax.jit(lambda leaf: leaf.codes())


def run(text, weight=WEIGHT, stats=None, key=None):
    return compress.parse(text)[0](jnp.asarray(weight), stats, key)


def test_nf4_has_the_published_values():
    """QLoRA's appendix: quantiles between `1 - 0.9677083` and it, of 8 and of 9 levels."""
    end = 0.9677083
    above = norm.ppf(np.linspace(end, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(end, 0.5, 8)[:-1])
    want = np.sort([*above, 0.0, *below])
    np.testing.assert_allclose(NF4, want / want.max(), atol=2e-7)
    leaf = run("nf4(group=64)")
    grouped = WEIGHT.reshape(16, 10, 64)
    scale = np.abs(grouped).max(-1, keepdims=True).astype(np.float16).astype(np.float32)
    table = np.array(NF4, np.float32)
    nearest = table[np.abs(grouped[..., None] / scale[..., None] - table).argmin(-1)] * scale
    np.testing.assert_allclose(DECODE(leaf), nearest.reshape(WEIGHT.shape), rtol=1e-6)
    assert leaf.bits_per_weight == pytest.approx(4.25 + 16 * 32 / WEIGHT.size)


def test_inverse_transform_finds_a_normal_among_outliers():
    spoilt = WEIGHT * 3.0
    spoilt[:, ::40] = 100.0
    leaf = run("inverse_transform(3, samples=2000)", spoilt)
    np.testing.assert_allclose(leaf.table[0], norm.ppf((np.arange(8) + 0.5) / 8), atol=1e-5)
    assert np.all(np.abs(np.asarray(leaf.scale) - 3) < 0.6)  # the root mean square is 16
    x = np.linspace(-1, 1, 101).astype(np.float32)
    y = np.where(np.arange(101) % 10 == 0, 50.0, 2 * x).astype(np.float32)
    found = float(robust_slope(jnp.asarray(x)[None, None], jnp.asarray(y)[None, None])[0, 0])
    assert abs(found - 2) < 0.1 and abs((x @ y) / (x @ x) - 2) > 0.15


def test_equalised_levels_stand_for_equally_many_weights():
    skewed = np.exp(WEIGHT)
    leaf = run("equalised(3)", skewed)
    size = np.sqrt((skewed**2).mean(-1, keepdims=True))
    sorted_values = np.sort((skewed / size).reshape(-1))
    want = sorted_values.reshape(8, -1).mean(-1)  # of each eighth
    np.testing.assert_allclose(leaf.table[0], want, rtol=0.01)


def test_ternary_and_binary():
    size = np.abs(WEIGHT)
    large = size > 0.7 * size.mean(-1, keepdims=True)
    scale = ((size * large).sum(-1, keepdims=True) / large.sum(-1, keepdims=True)).astype(
        np.float16
    )
    leaf = run("ternary()")
    np.testing.assert_array_equal(CODES(leaf), np.sign(WEIGHT) * large)
    np.testing.assert_allclose(leaf.scale, scale, rtol=1e-3)
    mean = size.mean(-1, keepdims=True).astype(np.float16).astype(np.float32)
    leaf = run("ternary(rule='absmean')")
    np.testing.assert_array_equal(CODES(leaf), np.clip(np.round(WEIGHT / mean), -1, 1))
    np.testing.assert_array_equal(CODES(run("binary()")), np.sign(WEIGHT))
    drawn = jax.jit(jax.vmap(lambda key: run("binary(stochastic=True)", key=key).decode()))
    keys = jax.random.split(jax.random.key(0), 400)
    found = np.asarray(drawn(keys)).mean(axis=0)
    np.testing.assert_allclose(found, np.clip(WEIGHT, -mean, mean), atol=6 * 0.8 / np.sqrt(400))


@pytest.mark.parametrize(("name", "kind"), [("e4m3", "float8_e4m3fn"), ("e5m2", "float8_e5m2")])
def test_fp8_rounds_as_the_format_says(name, kind):
    leaf = run(f"fp8({name!r})")
    top = float(ml_dtypes.finfo(kind).max)
    scale = np.abs(WEIGHT).max(-1, keepdims=True) / np.float32(top)
    want = (WEIGHT / scale).astype(kind)
    # the division is rounded, so a weight in the middle of two numbers may fall to either side
    assert np.mean(np.asarray(CODES(leaf)) != want) < 1e-3
    np.testing.assert_allclose(DECODE(leaf), want.astype(np.float32) * scale, rtol=0.26, atol=1e-6)
    assert leaf.nbytes == WEIGHT.size + 4 * 16


def test_truncation_and_stochastic_rounding():
    scale = np.abs(WEIGHT).max(-1, keepdims=True) / 7
    np.testing.assert_array_equal(CODES(run("truncate(4)")), np.trunc(WEIGHT / scale * (1 + 1e-7)))
    affine = run("truncate(4, symmetric=False)")
    exact = (WEIGHT - np.asarray(affine.minimum)) / np.asarray(affine.scale)
    assert np.mean(np.asarray(CODES(affine)) != np.floor(exact + 1e-5)) < 1e-3
    drawn = jax.jit(jax.vmap(lambda key: run("stochastic(4)", key=key).decode()))
    many = np.asarray(drawn(jax.random.split(jax.random.key(0), 400)))
    assert np.all(np.abs(many - WEIGHT) < scale * (1 + 1e-5))
    np.testing.assert_allclose(many.mean(0), WEIGHT, atol=6 * 0.5 * scale.max() / np.sqrt(400))


@pytest.mark.parametrize(
    ("text", "most"),
    [
        ("rtn(4, group=64)", 4.26),
        ("magnitude(pattern=(2, 4)) | rtn(4, group=64)", 3.26),
        ("ternary()", 1.7),
        ("binary()", 1.05),
        ("fp8()", 8.06),
        ("nf4(group=64)", 4.26),
    ],
)
def test_bits_a_weight_are_those_of_the_tensors_in_a_file(text, most):
    weight = jnp.asarray(np.tile(WEIGHT, (8, 1)))
    leaf = compress.apply([("w", text)], {"w": weight})[0]["w"]
    tensors, _ = to_tensors(leaf)
    assert sum(np.asarray(a).nbytes for a in tensors.values()) == leaf.nbytes
    assert leaf.bits_per_weight <= most


def test_quantile_of_a_histogram():
    x = np.random.default_rng(0).exponential(size=20000).astype(np.float32)
    for share in (0.5, 0.99, 0.9999):
        found = float(histogram_quantile(histogram(jnp.asarray(x)), share))
        assert np.quantile(x, share) / 2**0.25 < found < np.quantile(x, share) * 2**0.25


TEXTS = ("rtn(8)", "rtn(4, group=64)", "fp8()")
INPUTS = np.random.default_rng(1).normal(size=(3, 640)).astype(np.float32)
INPUTS[0, 0] = 50.0  # beyond the limit


@functools.cache
def rounded_inputs(kind):
    """Return leaf, what it decodes to, and its product with the inputs, all by one program."""

    @jax.jit
    def run(weight, x, key):
        counts = histogram(jnp.abs(x[1:])) * 100
        made = {}
        for text, percentile in itertools.product(TEXTS, (0, 100)):
            chain = compress.parse(
                f"{text} | activations({kind!r}, percentile={percentile or None})"
            )
            leaf, _ = stored_of(chain, weight, {"histogram": counts}, key)
            product = ops.einsum("BI,OI->BO", x, leaf)
            made[text, percentile] = leaf, leaf.decode(), product
        return made

    return run(WEIGHT, INPUTS, jax.random.key(0))


@pytest.mark.parametrize("kind", ["int8", "e4m3", "e5m2"])
@pytest.mark.parametrize("text", TEXTS)
def test_inputs_are_rounded_a_row_at_a_time_or_at_one_limit(kind, text):
    x = INPUTS
    number = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}.get(kind)
    top = 127.0 if number is None else float(ml_dtypes.finfo(number).max)
    for percentile in (0, 100):
        leaf, decoded, got = rounded_inputs(kind)[text, percentile]
        leaf.check()
        limit = np.asarray(leaf.limit) if percentile else np.abs(x).max(-1, keepdims=True)
        scaled = np.clip(x / (limit / np.float32(top)), -top, top)
        seen = np.round(scaled) if number is None else scaled.astype(number).astype(np.float32)
        want = (seen * limit / top) @ np.asarray(decoded).T
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-2)
        if percentile:
            assert 2 < float(leaf.limit[0, 0]) < 8


def test_activations_stand_behind_a_rounding():
    for text in ("activations()", "nf4() | activations()"):
        with pytest.raises(InputError, match="allowed: behind a method that rounds"):
            compress.apply([("w", text)], {"w": jnp.asarray(WEIGHT)})
    with pytest.raises(InputError, match="needs 'histogram'"):
        compress.apply([("w", "rtn(8) | activations(percentile=99)")], {"w": jnp.asarray(WEIGHT)})
    with pytest.raises(InputError, match=r"group is 8; allowed: a multiple of 5"):
        compress.quantize.Ternary(group=8)
    assert isinstance(run("ternary(group=10)"), leaves.QTensor)
