"""Paired streams: the rows of both as they are, whatever part of a batch is asked for."""

from __future__ import annotations

import numpy as np
import pytest

from jaxmodel import data
from jaxmodel.data import WithUnlabelled
from jaxmodel.data.stream import Batches
from jaxmodel.errors import InputError

FEW = data.Stream({"x": np.arange(5), "labels": np.arange(5) % 2}, 4, seed=1)
MANY = data.Stream({"x": np.arange(100.0, 130.0).reshape(10, 3)}, 12, seed=2)


def test_the_rows_are_those_of_both_streams():
    pairs = WithUnlabelled(FEW, MANY)
    assert isinstance(pairs, Batches) and (pairs.batch_size, pairs.each) == (4, 3)
    for step in (0, 1, 7):
        batch = pairs.batch(step)
        for name, array in FEW.batch(step).items():
            np.testing.assert_array_equal(batch[name], array)
        np.testing.assert_array_equal(batch["unlabelled_x"].reshape(12, 3), MANY.batch(step)["x"])


def test_parts_of_a_batch_join_to_it():
    pairs = WithUnlabelled(FEW, MANY)
    whole = pairs.batch(3)
    parts = [pairs.batch(3, slice(i, i + 2)) for i in (0, 2)]
    for name, array in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)
    assert pairs.batch(3, slice(1, 1))["unlabelled_x"].shape == (0, 3, 3)


def test_fingerprints_tell_both_streams_apart():
    other = data.Stream(MANY.data, 12, seed=3)
    prints = {
        WithUnlabelled(a, b).fingerprint
        for a, b in [(FEW, MANY), (FEW, other), (data.Stream(FEW.data, 4, seed=2), MANY)]
    }
    assert len(prints) == 3 and WithUnlabelled(FEW, MANY).fingerprint in prints


def test_what_does_not_fit_is_refused():
    with pytest.raises(
        InputError,
        match="other: batches of 10 rows given; allowed: a multiple of the stream's 4, such as 8",
    ):
        WithUnlabelled(FEW, data.Stream(MANY.data, 10))
    with pytest.raises(InputError, match="stream: the field 'unlabelled_x' given"):
        WithUnlabelled(WithUnlabelled(FEW, MANY), MANY)
    with pytest.raises(InputError, match="rows"):
        WithUnlabelled(FEW, MANY).batch(0, slice(0, 5))
