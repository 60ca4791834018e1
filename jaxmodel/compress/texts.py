"""Batches of a text for calibration: what a bundle's model reads, cut to windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Integer

from jaxmodel import data, hub
from jaxmodel.data.text import Text
from jaxmodel.errors import InputError
from jaxmodel.models import Model

BY_DEFAULT = "english_train"
"""The text that is measured where none is given."""
WINDOWS = 32
WINDOW = 512
BATCH = 4
"""The most windows that run at once."""


def text_batches(
    bundle: hub.Bundle,
    text: str | Path | Text = BY_DEFAULT,
    *,
    windows: int = WINDOWS,
    window: int | None = None,
) -> list[dict[str, Array]]:
    """Cut a text into batches for `compress_bundle`, `calibrate` and `observe`.

    Args:
      bundle: a model of texts with its tokenizer.
      text: a name or a path (see `data.load_text`), or a text.
      windows: how many, from its start.
      window: tokens of one; None for 512, or the model's context if that is shorter.

    Returns:
      Inputs of the model, `tokens` of `[rows, window]` and zeros for its other inputs; as many rows
      as fill eight batches, at most 4.

    Raises:
      InputError: a model that reads something else than texts, no tokenizer, a window longer than
        the model's context, or a text shorter than one window.

    >>> from jaxmodel.models import llama
    >>> model = llama.model(llama.SIZES["tiny"])
    >>> bundle = hub.Bundle(model, {}, hub.train_bpe(["to be or not to be"], 257))
    >>> [batch["tokens"].shape for batch in text_batches(bundle, windows=16, window=32)][:2]
    [(2, 32), (2, 32)]
    """
    _check_reads_texts(bundle.model)
    context = getattr(bundle.model.config, "context", WINDOW)
    length = min(WINDOW, context) if window is None else window
    if not 2 <= length <= context:
        raise InputError(f"window: {length} given; allowed: 2 to the model's context of {context}")
    given = text if isinstance(text, Text) else data.load_text(text)
    tokenizer = hub.need_processor(bundle)
    ids = tokenizer.encode(given.text)
    if len(ids) < length - len(tokenizer.begins):
        raise InputError(
            f"text: {given.name!r} has {len(ids)} tokens; allowed: at least the {length} of one "
            "window"
        )
    return batches_of(
        bundle.model, data.windows(ids, length, limit=windows, begin=tokenizer.begins)
    )


def batches_of(
    model: Model, windows: Integer[np.ndarray, "windows tokens"]
) -> list[dict[str, Any]]:
    """Return windows as batches of a model's inputs; see `text_batches`.

    Raises:
      InputError: a model that reads something else than texts.
    """
    names = _check_reads_texts(model)
    rows = max(1, min(BATCH, len(windows) // 8))
    whole = len(windows) // rows * rows
    cut = [jnp.asarray(windows[i : i + rows]) for i in range(0, whole, rows)]
    others = {name: of.dtype for name, of in names.items() if name != "tokens"}
    return [
        {"tokens": one, **{name: jnp.zeros(one.shape, kind) for name, kind in others.items()}}
        for one in cut
    ]


def _check_reads_texts(model: Model) -> dict[str, Any]:
    names = model.inputs(1, 2)
    if "tokens" not in names or {"source", "pixels"} & set(names):
        raise InputError(
            f"text: given for a model that reads {', '.join(names)}; allowed: a model of texts; "
            "compress_bundle takes batches of any inputs"
        )
    return dict(names)
