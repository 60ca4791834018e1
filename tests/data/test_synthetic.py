"""Made pairs: what the tasks say, and batches that are a function of (seed, step)."""

from __future__ import annotations

import datetime

import numpy as np
import pytest

from jaxmodel.data import synthetic
from jaxmodel.data.synthetic import (
    END,
    SOURCE,
    START,
    TARGET,
    TASKS,
    VOCAB,
    SyntheticSeq2Seq,
    decode,
    encode,
)
from jaxmodel.errors import InputError


def texts(task: str, part: str = "train") -> list[tuple[str, str]]:
    pairs = SyntheticSeq2Seq((task,), batch_size=300, seed=3, part=part)
    return [pair for step in range(4) for pair in pairs.texts(step)]


def test_targets_are_right():
    for source, target in texts("copy"):
        assert source == "=" + target and 4 <= len(target) <= synthetic.LONGEST and target.isalpha()
    for source, target in texts("reverse"):
        assert source[0] == "<" and list(source[1:]) == list(reversed(target))


def test_dates_are_read_by_the_standard_library():
    forms = ("%d %B %Y", "%B %d, %Y", "%d.%m.%Y", "%Y/%m/%d")
    seen = dict.fromkeys(forms, 0)
    for source, target in texts("date"):
        assert source[0] == "@"
        for form in forms:
            try:
                day = datetime.datetime.strptime(source[1:], form).date()
            except ValueError:
                continue
            seen[form] += 1
            assert day.isoformat() == target
    assert (
        sum(seen.values()) == 1200 and min(seen.values()) > 200
    )  # each is read in one way, and all are there


def test_the_parts_share_no_target_and_hold_nine_and_one_tenth():
    for task in TASKS:
        train, test = ({target for _, target in texts(task, part)} for part in ("train", "test"))
        assert not train & test and len(test) > 500


def test_a_batch_is_a_function_of_seed_and_step():
    one = SyntheticSeq2Seq(batch_size=32, seed=5)
    other = SyntheticSeq2Seq(batch_size=32, seed=6)
    for step in (0, 7, np.int64(7)):
        for name, array in one.batch(step).items():
            np.testing.assert_array_equal(
                array, SyntheticSeq2Seq(batch_size=32, seed=5).batch(step)[name]
            )
    assert one.texts(7) != one.texts(8) and one.texts(7) != other.texts(7)
    starts = [source[0] for step in range(9) for source, _ in one.texts(step)]
    assert all(starts.count(mark) > 60 for mark in "=<@")  # tasks are drawn evenly
    assert SyntheticSeq2Seq(batch_size=2, seed=5).texts(1) == [
        ("=ztceat", "ztceat"),
        ("=dhqeu", "dhqeu"),
    ]


def test_what_a_batch_holds():
    pairs = SyntheticSeq2Seq(batch_size=200, seed=1)
    batch = pairs.batch(3)
    shapes = {name: (array.dtype.name, array.shape[1]) for name, array in batch.items()}
    assert shapes == {
        **{
            "source": ("int32", SOURCE),
            "source_mask": ("bool", SOURCE),
            "tokens": ("int32", TARGET),
        },
        **{"targets": ("int32", TARGET), "weights": ("float32", TARGET)},
    }
    for i, (source, target) in enumerate(pairs.texts(3)):
        assert decode(batch["source"][i]) == source and batch["source_mask"][i].sum() == len(source)
        n = len(target) + 1
        assert batch["targets"][i, :n].tolist() == [*encode(target), END]
        assert batch["tokens"][i, :n].tolist() == [START, *encode(target)]
        assert batch["weights"][i].tolist() == [1.0] * n + [0.0] * (TARGET - n)
    assert (
        max(array.max() for array in batch.values()) < VOCAB
        and batch["source_mask"].any(axis=0)[:-1].all()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ("sort",)}, "tasks: 'sort' is not known; allowed: copy, date, reverse"),
        ({"tasks": ()}, "tasks: none given"),
        ({"part": "dev"}, "part: 'dev' is not known; allowed: test, train"),
        ({"batch_size": 0}, "batch_size: 0 given"),
        ({"seed": -1}, "seed: -1 given; allowed: 0 to 2.64 - 1"),
    ],
)
def test_values_out_of_range(arguments, message):
    with pytest.raises(InputError, match=message):
        SyntheticSeq2Seq(**arguments)


def test_a_negative_step():
    with pytest.raises(InputError, match="step: -1 given"):
        SyntheticSeq2Seq().batch(-1)
