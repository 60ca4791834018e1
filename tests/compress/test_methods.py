"""Methods: each against plain NumPy, and the laws that every method keeps."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from jaxmodel import compress, leaves
from jaxmodel.compress.draft import stored_of
from jaxmodel.errors import InputError
from jaxmodel.leaves.largest import largest
from jaxmodel.text_form import write

WEIGHT = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6, 24)), jnp.float32)
FIRST = jnp.asarray(np.asarray(WEIGHT)[0])
MARK = jax.jit(largest)
DECODE = jax.jit(leaves.decode)
CHAINS = [
    "rtn(bits=8)",
    "rtn(bits=4, group=8)",
    "rtn(bits=3, group=16)",
    "rtn(bits=1)",
    "rtn(bits=2, symmetric=False)",
    "rtn(bits=5, group=8, symmetric=False)",
    "rtn(bits=8, activations='int8')",
    "magnitude(fraction=0.25)",
    "magnitude(fraction=0.5, scope='leaf')",
    "magnitude(fraction=0.5, pattern=(2, 4))",
    "magnitude(fraction=0.5) | rtn(bits=8, activations='int8')",
    "magnitude(fraction=0.5, pattern=(2, 4)) | rtn(bits=4)",
]


def run(text: str, weight=WEIGHT):
    return compress.apply((("w", compress.parse(text)),), {"w": weight})[0]["w"]


@pytest.mark.parametrize("text", CHAINS)
def test_text_form_round_trips(text):
    assert write(compress.parse(text)) == text


@pytest.mark.parametrize("text", [CHAINS[i] for i in (3, 5, 6, 8, 11)])
def test_laws_of_a_chain_in_a_recipe(text):
    """Of signs, affine groups, rounded inputs, rows of unequal counts, N:M of codes; those of every
    method are in contracts/test_chains.py.
    """
    leaf = run(text)
    leaf.check()
    assert leaf.shape == WEIGHT.shape and leaf.nbytes < WEIGHT.nbytes
    again = run(text)
    jax.tree.map(np.testing.assert_array_equal, leaf, again)  # deterministic
    together = DECODE(leaf)
    for i in range(3):  # stacked layers are compressed as each alone
        alone = run(text, jnp.asarray(np.asarray(WEIGHT)[i]))
        np.testing.assert_array_equal(np.asarray(together)[i], DECODE(alone))


RTN = list(itertools.product(range(1, 9), (None, 8), (True, False)))


@functools.cache
def rounded():
    """Return the leaf of each setting and what it decodes to, all in one program."""

    @jax.jit
    def run(weight, keys):
        made = {}
        for bits, group, symmetric in RTN:
            method = compress.Rtn(bits, group, symmetric, scale_dtype="float32")
            leaf = stored_of((method,), weight, {}, keys)[0]
            made[bits, group or 0, symmetric] = leaf, leaf.decode()
        return made

    return run(WEIGHT, jax.random.split(jax.random.key(0), 3))


@pytest.mark.parametrize(("bits", "group", "symmetric"), RTN)
def test_rtn_error_is_at_most_half_a_step(bits, group, symmetric):
    leaf, decoded = rounded()[bits, group or 0, symmetric]
    leaf.check()
    if bits == 1 and symmetric:
        signs = np.where(np.asarray(WEIGHT) < 0, -1, 1)
        size = np.abs(np.asarray(WEIGHT)).reshape(3, 6, -1, group or 24).mean(-1, keepdims=True)
        want = (signs.reshape(3, 6, -1, group or 24) * size).reshape(WEIGHT.shape)
        np.testing.assert_allclose(decoded, want, rtol=1e-6)
        return
    step = np.repeat(np.asarray(leaf.scale), 24 // leaf.groups, axis=-1)
    assert np.all(np.abs(np.asarray(decoded) - np.asarray(WEIGHT)) <= step / 2 * (1 + 1e-5))


def test_rtn_scale_is_that_of_the_largest_weight():
    leaf = compress.Rtn(4, group=8)(WEIGHT)
    grouped = np.abs(np.asarray(WEIGHT)).reshape(3, 6, 3, 8).max(-1)
    np.testing.assert_array_equal(leaf.scale, (grouped / 7).astype(np.float16))
    assert leaf.scale.dtype == jnp.float16 and leaf.bits_per_weight == 4 + 16 / 8


def test_rtn_of_a_row_of_zeros_is_zeros():
    zeros = jnp.zeros((2, 16))
    assert not np.any(np.asarray(DECODE(compress.Rtn(4, group=8)(zeros))))
    assert np.all(np.abs(np.asarray(DECODE(compress.Rtn(4, symmetric=False)(zeros)))) < 1e-30)


def test_values_on_the_grid_are_exact():
    codes = np.random.default_rng(1).integers(-7, 8, (4, 32))
    codes[:, ::8] = 7
    leaf = compress.Rtn(4, group=8)(jnp.asarray(codes * 0.25, jnp.float32))
    np.testing.assert_array_equal(DECODE(leaf), codes * 0.25)


@pytest.mark.parametrize("scope", ["row", "leaf"])
def test_magnitude_keeps_the_largest(scope):
    leaf = compress.Magnitude(0.5, scope)(WEIGHT)
    leaf.check_values()
    size = np.abs(np.asarray(WEIGHT))
    flat = size.reshape(3, 6, 24) if scope == "row" else size.reshape(3, 1, 144)
    cut = np.sort(flat, -1)[..., flat.shape[-1] // 2][..., None]
    want = np.where(flat >= cut, np.asarray(WEIGHT).reshape(flat.shape), 0).reshape(WEIGHT.shape)
    np.testing.assert_array_equal(DECODE(leaf), want)


def test_magnitude_pattern_keeps_two_of_four():
    leaf = compress.Magnitude(pattern=(2, 4))(WEIGHT)
    leaf.check_values()
    groups = np.asarray(WEIGHT).reshape(-1, 4)
    rank = np.argsort(np.argsort(-np.abs(groups), axis=-1, kind="stable"), axis=-1)
    found = np.asarray(DECODE(leaf)).reshape(-1, 4)
    np.testing.assert_array_equal(found, np.where(rank < 2, groups, 0))


def test_no_pruning_is_the_identity():
    assert run("magnitude(0.0)") is WEIGHT


@given(
    st.lists(
        st.sampled_from([0.0, -0.0, 0.5, 1.0, -2.0, 3.5, 1e-30, -1e-30, np.inf, -np.inf]),
        min_size=30,
        max_size=30,
    ),
    st.integers(0, 30),
)
def test_largest_equals_a_stable_sort(scores, count):
    got = np.asarray(MARK(jnp.asarray(scores, jnp.float32), count))
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    assert set(np.flatnonzero(got)) == set(order[:count])


def test_zeros_survive_rounding():
    pruned = compress.Magnitude(0.5)(WEIGHT)
    rounded = compress.Rtn(8)(pruned)
    found = np.asarray(DECODE(rounded))
    np.testing.assert_array_equal(found == 0, np.asarray(DECODE(pruned)) == 0)
    expanded = jax.jit(lambda leaf: leaf.expand())(rounded)
    assert isinstance(expanded, leaves.QTensor)
    np.testing.assert_array_equal(DECODE(expanded), found)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rtm(4)", r"method: 'rtm' is not known; allowed: .*, magnitude, .* \(nearest: rtn, "),
        ("rtn(bits=9)", "bits is 9; allowed: a whole number of 1 to 8"),
        ("rtn(bit=4)", "rtn takes the settings bits, group, symmetric"),
        ("rtn(4", "cannot be read"),
        ("rtn(group=0)", "group is 0"),
        ("rtn(bits=3, group=5)", "at 3 bits a multiple of 8"),
        ("magnitude(1.5)", "fraction is 1.5; allowed: a number of at least 0 and below 1"),
        ("magnitude(scope='column')", "scope is 'column'"),
        ("magnitude(pattern=(4, 2))", r"pattern is \(4, 2\)"),
        ("rtn() | rtn()", "rtn: the weights are rounded already; allowed: one method that rounds"),
        ("rtn() | gptq()", "needs 'gram' of the input of 'w', which was not measured"),
        ("magnitude() | rtn(group=8, symmetric=False)", "leave out symmetric=False"),
        ("magnitude(pattern=(2, 5))", "an M that divides the rows of 24 weights"),
        ("magnitude(block=(4, 4))", "block is .*; allowed: divisors of the 6 rows and the 24 col"),
        ("random(pattern=(2, 4), block=(1, 0))", "block is .*; allowed: None beside a pattern"),
        ("snip(0.5)", r"needs 'gradient' of the input of 'w', which was not measured"),
    ],
)
def test_bad_input_says_what_is_allowed(text, says):
    with pytest.raises(InputError, match=says):
        run(text)


def brute_force(weight, gram, steps, pattern=None):
    """The greedy order of OBS by solving for the weights that stay, in float64, anew each time."""
    weight = np.asarray(weight, np.float64)
    gram = np.asarray(gram, np.float64)
    alive = list(range(len(weight)))

    def solved(kept):
        """The row that is nearest in output, of those with zeros elsewhere, and its error."""
        row = np.zeros_like(weight)
        row[kept] = np.linalg.solve(gram[np.ix_(kept, kept)], gram[kept] @ weight)
        return row, (weight - row) @ gram @ (weight - row)

    for _ in range(steps):
        left = (
            [sum(i // pattern[1] == q // pattern[1] for i in alive) for q in alive]
            if pattern
            else []
        )
        free = [q for i, q in enumerate(alive) if not pattern or left[i] > pattern[0]]
        alive.remove(min(free, key=lambda q: solved([i for i in alive if i != q])[1]))
    return solved(alive)[0]


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_obs_is_brute_force(pattern):
    """Of 8 x 8, one weight at a time, the others solved for exactly."""
    rng = np.random.default_rng(3)
    weight = jnp.asarray(rng.normal(size=(8, 8)), jnp.float32)
    inputs = rng.normal(size=(40, 8)) @ rng.normal(size=(8, 8))
    gram = jnp.asarray(inputs.T @ inputs, jnp.float32)
    stats = {"gram": gram, "count": jnp.float32(40)}
    steps = 4 if pattern else 5
    got = compress.prune.Obs(1 - 3 / 8, pattern=pattern, damping=1e-6)(weight, stats)
    got = DECODE(got)
    if not pattern:
        assert np.all(np.sum(np.asarray(got) != 0, axis=-1) == 3)
    want = np.stack([brute_force(row, gram, steps, pattern) for row in np.asarray(weight)])
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)


def test_obs_over_the_leaf_takes_the_row_that_costs_least():
    rng = np.random.default_rng(4)
    weight = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32) * jnp.array(
        [[1.0], [0.01], [1], [2]]
    )
    inputs = rng.normal(size=(40, 6)) @ rng.normal(size=(6, 6))
    gram = inputs.T @ inputs
    stats = {"gram": jnp.asarray(gram, jnp.float32), "count": jnp.float32(40)}
    leaf = compress.prune.Obs(0.5, scope="leaf", damping=1e-6)(weight, stats)
    got = np.asarray(DECODE(leaf), np.float64)
    # by hand: the next step is that of the row where it costs least
    rows = [np.asarray(row, np.float64) for row in weight]
    gone = [0] * 4
    cost = lambda i, n: (off := rows[i] - brute_force(rows[i], gram, n)) @ gram @ off
    for _ in range(12):
        next_ = min(
            (i for i in range(4) if gone[i] < 6),
            key=lambda i: cost(i, gone[i] + 1) - cost(i, gone[i]),
        )
        gone[next_] += 1
    assert np.sum(got == 0, axis=-1).tolist() == gone and gone[1] == 6


@pytest.mark.parametrize("text", ["gradient", "snip", "fisher", "taylor", "movement"])
def test_scores_of_the_gradient(text):
    rng = np.random.default_rng(5)
    w, g, f, m = (rng.normal(size=(4, 10)).astype(np.float32) for _ in range(4))
    stats = {"gradient": jnp.asarray(g), "fisher": jnp.asarray(f**2), "movement": jnp.asarray(m)}
    want = {
        "gradient": abs(g),
        "snip": abs(w * g),
        "fisher": w**2 * f**2,
        "taylor": abs(w**2 * f**2 / 2 - w * g),
        "movement": m,
    }[text]
    leaf = compress.parse(f"{text}(0.3)")[0](jnp.asarray(w), stats)
    keep = np.argsort(np.argsort(want, axis=-1), axis=-1) >= 3
    np.testing.assert_array_equal(DECODE(leaf), np.where(keep, w, 0))
    if text == "gradient":
        low, high = (
            DECODE(compress.prune.Gradient(threshold=0.7, prune=prune)(jnp.asarray(w), stats))
            for prune in ("smallest", "largest")
        )
        np.testing.assert_array_equal(low, np.where(abs(g) >= 0.7, w, 0))
        np.testing.assert_array_equal(high, np.where(abs(g) <= 0.7, w, 0))


def test_blocks_go_as_a_whole():
    weight = np.asarray(FIRST)
    leaf = compress.Magnitude(0.5, block=(3, 4))(FIRST)
    assert isinstance(leaf, leaves.BlockSparse) and leaf.values.shape == (2, 3, 3, 4)
    size = np.abs(weight).reshape(2, 3, 6, 4).sum((1, 3))
    keep = np.argsort(np.argsort(size, axis=-1), axis=-1) >= 3
    want = np.where(np.repeat(np.repeat(keep, 3, 0), 4, 1), weight, 0)
    np.testing.assert_array_equal(DECODE(leaf), want)
    rows = np.abs(weight).sum(1)
    leaf = compress.Magnitude(0.5, block=(1, 0))(FIRST)
    np.testing.assert_array_equal(
        np.any(np.asarray(DECODE(leaf)) != 0, axis=1), rows >= np.sort(rows)[3]
    )
    columns = np.abs(weight).sum(0)
    leaf = compress.Magnitude(0.25, block=(0, 1))(FIRST)
    assert leaf.values.shape == (1, 18, 6, 1)
    np.testing.assert_array_equal(
        np.any(np.asarray(DECODE(leaf)) != 0, 0), columns >= np.sort(columns)[6]
    )


def test_the_dtype_of_what_is_not_rounded_stays():
    leaf = compress.Magnitude(0.5)(WEIGHT.astype(jnp.bfloat16))
    assert leaf.dtype == jnp.bfloat16 and leaf.bits_per_weight == 1 + 8
