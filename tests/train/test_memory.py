"""Running out of memory says what is needed, what there is, and what would fit, by what XLA says of
programs that are not run.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxmodel import data, train
from jaxmodel.errors import InputError
from jaxmodel.models import gpt2
from jaxmodel.train import loop, memory

MODEL = gpt2.model(gpt2.Config(vocab=512, width=32, depth=2, heads=2, context=32))
STREAM = data.Stream(np.random.default_rng(0).integers(0, 512, (64, 33)).astype(np.int32), 16)


@pytest.fixture
def full(monkeypatch):
    """The first step fails as it does on a device whose memory is full."""

    def read(unread, ahead):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123456 bytes."
        )

    monkeypatch.setattr(loop, "_read", read)


def test_what_would_fit_is_said(full, monkeypatch):
    monkeypatch.setattr(memory, "limit", lambda: 5_000_000)
    with pytest.raises(
        InputError,
        match=r"memory: a step needs 0.0\d+ GiB, a device has 0.00466 GiB; "
        r"gradient_accumulation_steps=\d+ with",
    ):
        train.fit(MODEL, STREAM, train.TrainConfig(steps=2))


def test_where_nothing_fits_more_devices_are_named(full, monkeypatch):
    monkeypatch.setattr(memory, "limit", lambda: 1000)
    monkeypatch.setattr(memory, "candidates", lambda *args: iter([(16, "full")]))
    with pytest.raises(
        InputError, match="no number of micro-batches is enough: shard the model over more devices"
    ):
        train.fit(MODEL, STREAM, train.TrainConfig(steps=2))


def test_another_error_is_left_alone(monkeypatch):
    def read(unread, ahead):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(loop, "_read", read)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: something else"):
        train.fit(MODEL, STREAM, train.TrainConfig(steps=2))


def test_what_is_needed_is_at_least_what_is_held():
    compiled = (
        jax.jit(lambda a: a @ a).lower(jax.ShapeDtypeStruct((256, 256), np.float32)).compile()
    )
    assert memory.needed(compiled) >= 2 * 256 * 256 * 4
    assert memory.limit() > 2**30
