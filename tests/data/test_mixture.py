"""Mixtures: exact shares at every moment, every component in its own order, any row without those
before it.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jaxmodel.data import Batches, Mixture, Stream, mixture as module
from jaxmodel.data.synthetic import SyntheticSeq2Seq
from jaxmodel.errors import InputError

WEIGHTS = st.lists(st.integers(1, 40), min_size=1, max_size=7)


def component(k: int, rows: int, batch_size: int = 3, seed: int = 0) -> Stream:
    """Rows that say whose they are and which."""
    return Stream({"k": np.full(rows, k), "row": np.arange(rows)}, batch_size, seed + k)


def mixed(weights: list[int] | list[float], batch_size: int = 8) -> Mixture:
    return Mixture(
        [(component(k, 5 + 3 * k, 1 + 2 * k), weight) for k, weight in enumerate(weights)],
        batch_size,
    )


@given(WEIGHTS)
def test_shares_are_exact_to_within_one_row_at_every_moment(weights: list[int]) -> None:
    mixture = mixed(weights)
    period = sum(weights)
    owners = np.concatenate([mixture.batch(step)["k"] for step in range(-(-2 * period // 8) + 1)])
    counts = np.cumsum(owners == np.arange(len(weights))[:, None], axis=1)
    ideal = np.array(weights)[:, None] * np.arange(1, len(owners) + 1) / period
    assert np.abs(counts - ideal).max() < 1
    # Tijdeman's bound, which no rule can better
    assert np.abs(counts - ideal).max() <= max(0, 1 - 1 / (2 * max(2, len(weights)) - 2)) + 1e-9


@given(WEIGHTS, st.integers(1, 30), st.integers(0, 10**12))
def test_a_component_is_read_in_its_own_order(
    weights: list[int], batch_size: int, step: int
) -> None:
    mixture = mixed(weights, batch_size)
    batch = mixture.batch(step)
    for k, (stream, _) in enumerate(mixture.components):
        begin, end = (mixture.place(k, g) for g in (step * batch_size, (step + 1) * batch_size))
        rows = [
            stream.batch(place // stream.batch_size)["row"][place % stream.batch_size]
            for place in range(begin, end)
        ]
        assert batch["row"][batch["k"] == k].tolist() == rows
        assert abs(begin - step * batch_size * Fraction(weights[k], sum(weights))) < 1


def test_places_add_up() -> None:
    mixture = mixed([0.5, 0.3, 0.2])
    for rows in (0, 1, 17, 10**15 + 3):
        assert sum(mixture.place(k, rows) for k in range(3)) == rows


def test_weights_are_meant_as_they_are_written() -> None:
    assert mixed([0.1, 0.2, 0.7]).shares == (Fraction(1, 10), Fraction(1, 5), Fraction(7, 10))
    assert (
        mixed([1, 2, 7]).shares == mixed([10.0, 20.0, 70.0]).shares == mixed([0.1, 0.2, 0.7]).shares
    )
    assert mixed([1e-3, 1.0]).shares == (Fraction(1, 1001), Fraction(1000, 1001))


@settings(max_examples=5)
@given(st.lists(st.floats(1e-9, 1e3), min_size=2, max_size=5))
def test_any_weights_are_rounded_to_a_period(weights: list[float]) -> None:
    shares = module._shares(weights)
    assert sum(shares) == 1 and min(shares) > 0
    assert all(
        abs(share - weight / sum(weights)) < 2 / module.PERIOD
        for share, weight in zip(shares, weights, strict=True)
    )
    assert np.lcm.reduce([share.denominator for share in shares]) <= module.PERIOD + len(shares)


def test_mixtures_and_other_streams_are_components() -> None:
    inner = mixed([1, 1], batch_size=5)
    assert isinstance(inner, Batches)
    outer = Mixture([(inner, 3), (component(9, 4), 1)], batch_size=4)
    assert np.count_nonzero(np.concatenate([outer.batch(step)["k"] for step in range(8)]) == 9) == 8
    copies = Mixture(
        [(SyntheticSeq2Seq(("copy",), 3), 1), (SyntheticSeq2Seq(("date",), 5), 1)], batch_size=6
    )
    wanted = [
        *SyntheticSeq2Seq(("copy",), 3).batch(2)["source"].tolist(),
        *SyntheticSeq2Seq(("date",), 5).batch(1)["source"][1:4].tolist(),
    ]
    assert sorted(copies.batch(2)["source"].tolist()) == sorted(wanted)


def test_fingerprints() -> None:
    a = component(0, 5)
    b = component(1, 5)
    c = component(1, 6)
    mixtures = [
        *(
            Mixture([(a, 1), (b, 1)], 4),
            Mixture([(a, 1), (b, 1)], 5),
            Mixture([(a, 1), (b, 2)], 4),
            Mixture([(a, 1), (c, 1)], 4),
        ),
        *(
            Mixture([(b, 1), (a, 1)], 4),
            Mixture([(a, 1)], 4),
            Mixture([(component(0, 5, seed=9), 1), (b, 1)], 4),
        ),
    ]
    assert len({mixture.fingerprint for mixture in mixtures}) == len(mixtures)
    assert Mixture([(a, 2.0), (b, 2.0)], 4).fingerprint == mixtures[0].fingerprint


def test_bad_input() -> None:
    good = component(0, 5)
    other = Stream({"k": np.zeros((5, 2)), "extra": np.zeros(5)}, 2)
    for call, message in [
        (lambda: Mixture([], 4), "components: none given"),
        (lambda: Mixture([(good, 1)], 0), "batch_size: 0 given"),
        (
            lambda: Mixture([(good, 1), (good, 0)], 4),
            r"weights: \[1, 0\] given; each must be above 0",
        ),
        (lambda: Mixture([(good, float("nan"))], 4), r"weights: \[nan\] given"),
        (
            lambda: Mixture([(good, 1), (other, 1)], 4),
            r"component 1 has extra float64 \[B\], k float64 \[B, 2\], row missing, component 0 "
            r"extra missing, k int64 \[B\]",
        ),
        (lambda: Mixture([(good, 1)], 4).batch(-1), "step: -1 given"),
        (
            lambda: Mixture([(good, 1)], 4).batch(0, slice(2, 5)),
            r"rows: slice\(2, 5, None\) given; allowed: a slice within 0",
        ),
    ]:
        with pytest.raises(InputError, match=message):
            call()
