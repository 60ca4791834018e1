"""What options come to: whole configs and digests for a run's config.json, and the windows of a
text.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxmodel import data, hub, models
from jaxmodel.data.text import Text
from jaxmodel.errors import InputError


def of_model(model: models.Model) -> dict[str, Any]:
    """Family, config and policy."""
    config = dataclasses.asdict(model.config)
    policy = dataclasses.asdict(model.policy)
    return {"family": model.family, "config": config, "policy": policy}


def of_text(text: Text) -> dict[str, Any]:
    """Everything about a text but the text."""
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
      options: those that give the text and the length, for the error: `--data, --window`.

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
