"""What options resolve to: configs and digests for config.json, and the windows of a text."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxmodel import data, hub, models
from jaxmodel.data.text import Text
from jaxmodel.errors import InputError


def of_model(model: models.Model) -> dict[str, Any]:
    """Return the family, the config and the policy of a model."""
    config = dataclasses.asdict(model.config)
    policy = dataclasses.asdict(model.policy)
    return {"family": model.family, "config": config, "policy": policy}


def of_text(text: Text) -> dict[str, Any]:
    """Return everything about a text but the text."""
    return {"name": text.name, "origin": text.origin, "sha256": text.sha256}


def windows(
    text: Text,
    tokenizer: hub.Tokenizer,
    length: int,
    *,
    options: str,
    stride: int | None = None,
    limit: int | None = None,
) -> tuple[Any, int]:
    """`data.windows` of a text tokenised whole, and how many tokens it has.

    Each window begins with what the tokenizer puts in front of a text, as what `generate` reads
    does.

    Args:
      text: the text.
      tokenizer: the tokenizer of the model.
      length: the number of tokens of a window.
      options: those that give the text and the length, for the error: `--data, --window`.
      stride: tokens between the starts of two windows; None for the length.
      limit: the largest number of windows; None for all.

    Raises:
      InputError: the text is shorter than one window.
    """
    ids = tokenizer.encode(text.text)
    if len(ids) < length - len(tokenizer.begins):
        raise InputError(
            f"{options}: {text.name!r} has {len(ids)} tokens; allowed: at least the {length} of "
            f"one window"
        )
    return data.windows(ids, length, stride=stride, limit=limit, begin=tokenizer.begins), len(ids)
