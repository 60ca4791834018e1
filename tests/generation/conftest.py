"""A small random model with a tokenizer trained on the spot."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from jaxmodel.hub.bundle import Bundle
from jaxmodel.hub.tokenizer import train_bpe
from jaxmodel.models import llama

TEXTS = [
    "the cat sat on the mat and the dog sat on the cat",
    "naïve café, 東京 and 🙂🙃 in the rain",
    "a b c d e f g " * 4,
]


@pytest.fixture(scope="session")
def bundle() -> Bundle:
    """Logits far enough apart that a text is not one token over and over, nor decided by the last
    bit.
    """
    tokenizer = train_bpe(TEXTS, 320)
    config = dataclasses.replace(llama.SIZES["tiny"], vocab=tokenizer.vocab_size, init_scale=0.3)
    model = llama.model(config)
    return Bundle(
        model, jax.jit(model.init)(jax.random.key(1)), dataclasses.replace(tokenizer, eos_ids=())
    )
