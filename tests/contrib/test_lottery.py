"""Lottery tickets: what is rewound, what stays at zero, what is pruned next."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxmodel import contrib, data, losses, optim, train, tree
from jaxmodel.errors import InputError
from jaxmodel.models import mlp

MODEL = mlp.model(mlp.Config(8, (16, 8), 3))
RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(64, 8)).astype(np.float32)
STREAM = data.Stream({"features": ROWS, "labels": (ROWS[:, 0] > 0).astype(np.int32)}, 16, 0)
CONFIG = train.TrainConfig(steps=4, learning_rate=0.01, warmup_steps=0, log_every=4)


def test_tickets_are_rewound_and_trained_with_their_zeros():
    """Each run is one step longer than the rewinding, so its start can be told from its end."""
    first, second, third = contrib.lottery(MODEL, STREAM, CONFIG, 0.5, rounds=2, rewind=3)
    assert (first.zeros, second.zeros, third.zeros) == (0, 0.5, 0.75)
    program = train.Program(MODEL, CONFIG, loss=losses.classification)
    state = program.init()
    for i in range(4):
        early = tree.flatten(jax.tree.map(np.asarray, state.params))
        state, _ = program.step(state, program.place(STREAM.batch(i)))
    weights = lambda ticket: jax.tree.map(np.asarray, tree.flatten(ticket.state.params))
    for path, leaf in tree.flatten(state.params).items():  # the first run is a plain one
        np.testing.assert_allclose(weights(first)[path], leaf, rtol=1e-5, atol=1e-6)
    before = {}
    for ticket, trained in ((second, first), (third, second)):
        assert int(ticket.state.step) == 4
        masks = {
            path: np.asarray(mask)
            for path, mask in tree.flatten(optim.kept(ticket.state).masks).items()
        }
        assert set(masks) == {"blocks/0/dense", "blocks/1/dense"}
        for path, mask in masks.items():
            size = np.where(before.get(path, True), np.abs(weights(trained)[path]), -1)
            np.testing.assert_array_equal(mask, size >= np.sort(size, axis=None)[-mask.sum()])
        for path, leaf in weights(ticket).items():
            step = np.abs(leaf - early[path] * masks.get(path, True))
            assert 1e-5 < step.max() < 0.02  # one update of Adam
            assert not np.any(leaf[~masks[path]] if path in masks else 0)
        before = masks


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"fraction": 1.0}, "fraction: 1.0 given; allowed: above 0 and below 1"),
        ({"rewind": 4}, "rewind: 4 given; allowed: below the 4 of a run"),
        ({"rounds": -1}, "rounds: -1"),
    ],
)
def test_what_is_refused(options, says):
    with pytest.raises(InputError, match=says):
        contrib.lottery(MODEL, STREAM, CONFIG, **options)
