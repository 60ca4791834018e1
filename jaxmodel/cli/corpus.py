"""The texts of `jaxmodel train`: a tokenizer learnt from them, their ids in shards, streams of windows or of packed documents."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxmodel import data, hub, report
from jaxmodel.cli.options import Train
from jaxmodel.errors import InputError

HELDOUT_ROWS = 16
"""Rows of the held-out text that `--eval-batches` counts as one: which are judged must not move with --batch or --seed."""
LEARN_FROM = 2**24
"""Characters of each text that the tokenizer is learnt from, at most."""


class Corpus(NamedTuple):
    """What a run reads."""

    tokenizer: hub.Tokenizer
    stream: data.Batches
    heldout: data.Batches
    described: list[dict[str, Any]]
    """Of each text: its name, digest, documents and tokens."""


def load(options: Train, tokenizer: hub.Tokenizer | None = None) -> Corpus:
    """Learn the tokenizer, tokenise once, and open the streams; of several processes the first does the work.

    Args:
      options: of the run.
      tokenizer: of the model that is trained on; None to learn one.

    Raises:
      InputError: a text that cannot be read or is too short.
    """
    texts = [data.documents(source, options.field) for source in (*options.data, options.heldout)]
    with report.step("tokenise"), _in_turn():
        if tokenizer is None:
            tokenizer = hub.train_bpe(itertools.chain.from_iterable(_beginning(text) for text in texts[:-1]), options.vocab)
        shards = [data.tokenize(text, tokenizer, _folder(source, tokenizer)) for text, source in _beside(texts, options)]
        rows = [_rows(one, options, source) for one, (_, source) in zip(shards, _beside(texts, options), strict=True)]
    streams = [data.Stream(one, options.batch, options.seed) for one in rows[:-1]]
    streams.append(data.Stream(rows[-1], options.batch))  # in the same order whatever the seed
    weights = options.weights or (1.0,) * len(options.data)
    mixed = data.Mixture(list(zip(streams[:-1], weights, strict=True)), options.batch) if len(options.data) > 1 else streams[0]
    described = [
        {"name": source, "digest": text.digest(), "documents": len(one), "tokens": one.tokens, "stream": stream.fingerprint}
        for (text, source), one, stream in zip(_beside(texts, options), shards, streams, strict=True)
    ]
    return Corpus(tokenizer, mixed, streams[-1], described)


def _beside(texts: Sequence[Any], options: Train) -> list[tuple[Any, str]]:
    return list(zip(texts, (*options.data, options.heldout), strict=True))


def _beginning(text: Any) -> Iterator[str]:
    seen = 0
    for document in text:
        yield document
        seen += len(document)
        if seen >= LEARN_FROM:
            return


def _folder(source: str, tokenizer: hub.Tokenizer) -> Path:
    """Where the ids of a text stay, so that the next run finds them: `$JAXMODEL_CACHE`, or `~/.cache/jaxmodel`."""
    room = Path(os.environ.get("JAXMODEL_CACHE", "~/.cache/jaxmodel")).expanduser()
    name = source if "://" in source else str(Path(source).absolute()) if Path(source).exists() else source
    key = hashlib.sha256(f"{name}\n{tokenizer.backend.to_str()}".encode()).hexdigest()[:24]
    return room / "tokens" / key


def _rows(shards: data.Shards, options: Train, source: str) -> data.Rows:
    length = options.context + 1
    if options.pack:
        return data.PackedShards(shards, length)
    if shards.tokens < length:
        raise InputError(
            f"--data, --heldout, --context: {source!r} has {shards.tokens} tokens; allowed: at least the {length} of one window"
        )
    return data.ShardWindows(shards, length, stride=options.context)


@contextlib.contextmanager
def _in_turn() -> Iterator[None]:
    """The first process goes ahead and writes; the others come after it and find what it wrote."""
    if jax.process_count() == 1:
        yield
        return
    from jax.experimental import multihost_utils

    if jax.process_index() == 0:
        yield
    multihost_utils.sync_global_devices("the first process has tokenised")
    if jax.process_index() != 0:
        yield
