"""Pairs of texts from files of records.

A pair is a source and the text that a model writes for it, or two texts with the same meaning.

| fields of a record          | for                                              |
|-----------------------------|--------------------------------------------------|
| `source` and `target`       | an encoder and its decoder (`translations`)      |
| `prompt` and `completion`   | the same                                         |
| `anchor` and `positive`     | sentence embeddings (`alike`)                    |
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxmodel.data.sources import Source, records
from jaxmodel.data.stream import Batch
from jaxmodel.errors import InputError

WRITTEN = (("source", "target"), ("prompt", "completion"))
ALIKE = (("anchor", "positive"),)


def texts(source: Source, fields: tuple[tuple[str, str], ...]) -> Iterator[tuple[str, str]]:
    """Yield the two texts of every record.

    Args:
      source: as of `data.documents`.
      fields: the pairs of names that a record may have.

    Raises:
      InputError: a record has none of them, named by its file and line; or there is none.
    """
    allowed = ", or ".join(f"{a!r} and {b!r}" for a, b in fields)
    count = 0
    for place, record in records(source, "train"):
        names = next((pair for pair in fields if all(name in record for name in pair)), None)
        if names is None or not all(isinstance(record[name], str) for name in names):
            given = {name: type(a).__name__ for name, a in record.items()}
            raise InputError(f"data source: {place}: {given} given; allowed: texts as {allowed}")
        count += 1
        yield record[names[0]], record[names[1]]
    if not count:
        raise InputError(f"data source: {source!r}: it has no records")


def translations(
    source: Source, tokenizer: Any, length: int, *, start: int, end: int | None
) -> Batch:
    """Return the arrays that an encoder with a decoder learns from.

    Args:
      source: as of `data.documents`.
      tokenizer: a `hub.Tokenizer`.
      length: tokens of a source and of a target, S and T; longer ones are cut.
      start: the token that a target begins with.
      end: the token that a target ends with; None for none.

    Returns:
      `source` int32 and `source_mask` bool `[N, S]`; `tokens`, `targets` int32 and `weights`
      float32 `[N, T]`.
    """
    pairs = list(texts(source, WRITTEN))
    read = tokenizer.encode_batch([a for a, _ in pairs], True)
    written = [
        [*ids[: length - (end is not None)], *([] if end is None else [end])]
        for ids in tokenizer.encode_batch([b for _, b in pairs])
    ]
    sources, mask = _padded([_cut(ids, length) for ids in read], length, 0)
    targets, there = _padded(written, length, 0)
    tokens = np.concatenate([np.full((len(pairs), 1), start, np.int32), targets[:, :-1]], axis=1)
    return {
        "source": sources,
        "source_mask": mask,
        "tokens": np.where(there, tokens, np.int32(start)),
        "targets": targets,
        "weights": there.astype(np.float32),
    }


def alike(source: Source, tokenizer: Any, length: int) -> Batch:
    """Return the arrays that sentence embeddings are learnt from by `losses.contrastive`.

    Args:
      source: as of `data.documents`.
      tokenizer: a `hub.Tokenizer`.
      length: tokens of a text, T; longer ones are cut.

    Returns:
      `views` int32 and `views_mask` bool `[N, 2, T]`.
    """
    rows = tokenizer.encode_batch([text for pair in texts(source, ALIKE) for text in pair], True)
    tokens, mask = _padded([_cut(ids, length) for ids in rows], length, tokenizer.pad_id or 0)
    return {
        "views": tokens.reshape(-1, 2, length),
        "views_mask": mask.reshape(-1, 2, length),
    }


def _cut(ids: list[int], length: int) -> list[int]:
    """Return the ids within a length, with the last of all, which may end a text."""
    return ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]


def _padded(rows: list[list[int]], length: int, fill: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.full((len(rows), length), fill, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, ids in enumerate(rows):
        tokens[i, : len(ids)] = ids
        mask[i, : len(ids)] = True
    return tokens, mask
