"""A run goes on with another batch size: the next row is the next, none is left out or
comes twice.
"""

from __future__ import annotations

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import checkpoint, data, losses, train
from jaxmodel.errors import InputError
from jaxmodel.models import mlp
from jaxmodel.train import position

N = 22
ROWS = {
    "features": np.arange(N, dtype=np.float32)[:, None] / N,
    "labels": (np.arange(N) % 3).astype(np.int32),
}
OTHERS = {name: a[::-1].copy() for name, a in ROWS.items()}
MODEL = mlp.model(mlp.Config(1, (4,), 3))
CONFIG = train.TrainConfig(steps=3, log_every=1)
fit = functools.partial(train.fit, MODEL, loss=losses.classification)


@dataclasses.dataclass
class Watched:
    """A stream that writes down which rows are asked for."""

    stream: data.Stream
    seen: list[int] = dataclasses.field(default_factory=list)
    fingerprint = "watched"

    @property
    def batch_size(self) -> int:
        return self.stream.batch_size

    def batch(self, step, rows=slice(None)):
        found = self.stream.batch(step, rows)
        self.seen += np.rint(found["features"][:, 0] * N).astype(int).tolist()
        return found


@pytest.mark.parametrize("sizes", [(8, 4), (8, 6, 7), (3, 16, 5), (30, 4, 50)])
def test_every_row_comes_once_whatever_the_sizes(sizes):
    """Compared with the order of the stream itself, in batches of one row."""
    one = data.Stream(ROWS, 1, seed=5)
    state = None
    seen = list[int]()
    for part, size in enumerate(sizes, 1):
        watched = Watched(data.Stream(ROWS, size, seed=5))
        config = dataclasses.replace(CONFIG, steps=3 * part)
        state = None if state is None else position.at_row(state, size)
        state, history = fit(watched, config, state=state)
        taken = watched.seen[-3 * size :]
        seen += taken
        assert len(history) == 3 and position.next_row(state) == len(seen)
        assert 0 <= int(state.extra["first_row"]) < size
    assert seen == np.concatenate([one.rows(step) for step in range(len(seen))]).tolist()
    whole = collections.Counter(seen[: len(seen) // N * N])
    assert set(whole.values()) == {len(seen) // N}  # the passes that are complete


def test_checkpoints_go_on_with_a_size_that_divides_nothing(tmp_path):
    """Counted by hand: three batches of 8 are 24 rows, 22 of the first epoch and 2 of the next."""
    fit(data.Stream(ROWS, 8), CONFIG, checkpoints=tmp_path)
    more = dataclasses.replace(CONFIG, steps=5)
    allow = functools.partial(
        checkpoint.Checkpoints, tmp_path, allow_changes=["steps", "batch_size"]
    )
    with pytest.raises(InputError, match="batch_size was 8, is 7; .*allow_changes"):
        fit(data.Stream(ROWS, 7), more, checkpoints=checkpoint.Checkpoints(tmp_path))
    with (
        allow() as place,
        pytest.raises(InputError, match="must continue with the data that it began"),
    ):
        fit(data.Stream(OTHERS, 7), more, checkpoints=place)
    with allow() as place:
        state, history = fit(data.Stream(ROWS, 7), more, checkpoints=place)
    assert [row["step"] for row in history] == [1, 2, 3, 4, 5]
    assert position.next_row(state) == 24 + 14
    assert (int(state.data_step), int(state.extra["first_row"])) == (5, 3)
    again, _ = fit(data.Stream(ROWS, 7), more, checkpoints=tmp_path)  # as it is now
    assert checkpoint.fingerprint(again) == checkpoint.fingerprint(state)


def test_a_size_that_stays_ends_in_the_same_bits(tmp_path):
    """Behind a change too: broken at a step after it and gone on with."""
    stream = data.Stream(ROWS, 7)
    first, _ = fit(data.Stream(ROWS, 8), CONFIG)
    whole, _ = fit(stream, dataclasses.replace(CONFIG, steps=6), state=position.at_row(first, 7))
    config = dataclasses.replace(CONFIG, steps=6, save_every=1)

    class Stop(Exception):
        pass

    def end(row):
        if row["step"] == 5:
            raise Stop

    with pytest.raises(Stop):
        fit(stream, config, [end], state=position.at_row(first, 7), checkpoints=tmp_path)
    again, _ = fit(stream, config, checkpoints=tmp_path)
    assert checkpoint.fingerprint(again) == checkpoint.fingerprint(whole)


def test_going_back_behind_a_change_keeps_the_position_of_now(tmp_path):
    """A batch with row 4 is bad; the only checkpoint in front of it counts in batches of 8."""
    fit(data.Stream(ROWS, 8), CONFIG, checkpoints=tmp_path)

    class Bad(Watched):
        def batch(self, step, rows=slice(None)):
            found = super().batch(step, rows)
            bad = np.arange(N)[self.stream.rows(step)[rows]] == 4
            return {**found, "features": np.where(bad[:, None], np.nan, found["features"])}

    stream = Bad(data.Stream(ROWS, 7))
    config = dataclasses.replace(CONFIG, steps=8, on_bad_step="rewind")
    allowed = ["steps", "batch_size", "on_bad_step"]
    with checkpoint.Checkpoints(tmp_path, allow_changes=allowed, data="x") as place:
        place.data = place.manifest(3)["data"]
        place_rows, _ = fit(stream, config, checkpoints=place)
    assert int(place_rows.extra["batch_size"]) == 7
    order = np.concatenate([stream.stream.rows(step) for step in range(99)])
    row, good = 24, 0
    while good < 5:  # it begins again at step 3 behind each bad batch
        good = 0 if 4 in order[row : row + 7] else good + 1
        row += 7
    assert position.next_row(place_rows) == row


def test_a_state_of_an_earlier_version_has_no_position_of_its_own(tmp_path):
    """Its checkpoint lacks both counters: the batches are those of the size that is given."""
    state, _ = fit(data.Stream(ROWS, 8), CONFIG)
    old = dataclasses.replace(state, extra={"guard": state.extra["guard"]})
    with checkpoint.Checkpoints(tmp_path) as place:
        place.save(old)
    again, _ = fit(data.Stream(ROWS, 8), dataclasses.replace(CONFIG, steps=4), checkpoints=tmp_path)
    whole, _ = fit(data.Stream(ROWS, 8), dataclasses.replace(CONFIG, steps=4), state=state)
    assert checkpoint.fingerprint(again) == checkpoint.fingerprint(whole)


def test_rows_of_a_mixture_are_compared_whatever_the_size():
    make = lambda size, own: data.Mixture(
        [(data.Stream(ROWS, own), 3), (data.Stream(OTHERS, own), 1)], size
    )
    from jaxmodel.data.stream import fingerprints

    assert make(4, 4).fingerprint in fingerprints(make(6, 6), 4)
    assert make(4, 9).fingerprint in fingerprints(make(6, 9), 4)
    assert make(4, 4).fingerprint not in fingerprints(make(6, 6), 5)
    assert fingerprints(data.SyntheticSeq2Seq(batch_size=4), 8) == set()


def test_a_shifted_stream_is_the_stream_from_a_row_on():
    stream = data.Stream(ROWS, 8, seed=3)
    order = np.concatenate([stream.rows(step) for step in range(6)])
    for first in (0, 3, 8, 21):
        shifted = data.Shifted(stream, first)
        for step in range(2):
            wanted = order[first + 8 * step : first + 8 * step + 8]
            assert shifted.rows(step).tolist() == wanted.tolist()
            batch = shifted.batch(step, slice(2, 7))
            np.testing.assert_array_equal(batch["labels"], ROWS["labels"][wanted[2:7]])
            assert jnp.asarray(batch["features"]).dtype == jnp.float32
    with pytest.raises(InputError, match="first_row: -1 given"):
        data.Shifted(stream, -1)
    assert jax.tree.structure(stream.batch(0)) == jax.tree.structure(shifted.batch(0))


def test_a_size_between_whose_batches_a_state_stands_is_refused():
    state, _ = fit(data.Stream(ROWS, 8), CONFIG)
    with pytest.raises(InputError, match="16 given for a state that has taken 24 rows in batches"):
        fit(data.Stream(ROWS, 16), dataclasses.replace(CONFIG, steps=4), state=state)
    go_on = position.at_row(state, 16)
    fit(data.Stream(ROWS, 16), dataclasses.replace(CONFIG, steps=4), state=go_on)
