"""The data of `jaxmodel train`.

A tokenizer is learnt from the texts, their ids are kept in shards, and streams give windows or
packed documents.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmodel import data, hub
from jaxmodel.cli import tasks
from jaxmodel.cli.options import Train
from jaxmodel.data import examples, sources, text_pairs
from jaxmodel.data.packed_shards import ShardWindows
from jaxmodel.errors import InputError
from jaxmodel.progress import step

HELDOUT_ROWS = 16
"""Rows of the held-out text that `--eval-batches` counts as one, for any --batch and --seed."""
LEAST_TO_SPLIT = 10
"""The least number of rows with answers or labels of which a tenth is held out by default."""
LEARN_FROM = 2**24
"""The most characters of each text that the tokenizer is learnt from."""


class Corpus(NamedTuple):
    """The data that a run reads."""

    tokenizer: Any
    stream: data.Batches
    heldout: data.Batches | None
    described: list[dict[str, Any]]
    """Of each text: its name, digest, documents and tokens."""
    labels: tuple[str, ...] | None = None
    """Names of the classes, where rows have labels."""
    prompt: str = "The "
    """The default prompt of the sample at the end of the run."""


def load(options: Train, tokenizer: hub.Tokenizer | None = None, task: str = "language") -> Corpus:
    """Learn the tokenizer, tokenise once, and open the streams.

    Of several processes the first does the work.

    Args:
      options: the options of the run.
      tokenizer: the tokenizer of the model to fine-tune; None to learn one.
      task: the training task; see `tasks.TASKS`.

    Raises:
      InputError: a text that cannot be read or is too short.
    """
    heldout = options.heldout or "english"
    texts = [data.documents(source, options.field) for source in (*options.data, heldout)]
    with step("tokenise"), _in_turn():
        if tokenizer is None:
            learnt_from = itertools.chain.from_iterable(_beginning(text) for text in texts[:-1])
            tokenizer = tasks.learnt(learnt_from, options, task)
        assert tokenizer is not None
        shards = [
            data.tokenize(text, tokenizer, _folder(source, tokenizer))
            for text, source in _beside(texts, options)
        ]
        rows = [
            _rows(one, options, source)
            for one, (_, source) in zip(shards, _beside(texts, options), strict=True)
        ]
    streams = [data.Stream(one, options.batch, options.seed) for one in rows[:-1]]
    streams.append(data.Stream(rows[-1], options.batch))  # in the same order whatever the seed
    weights = options.weights or (1.0,) * len(options.data)
    mixed = (
        data.Mixture(list(zip(streams[:-1], weights, strict=True)), options.batch)
        if len(options.data) > 1
        else streams[0]
    )
    described = [
        {
            "name": source,
            "digest": text.digest(),
            "documents": len(one),
            "tokens": one.tokens,
            "stream": stream.fingerprint,
        }
        for (text, source), one, stream in zip(
            _beside(texts, options), shards, streams, strict=True
        )
    ]
    return Corpus(tokenizer, mixed, streams[-1], described)


def kind(options: Train) -> str | None:
    """Return what the rows of the data are.

    "images" are folders of classes, "answers" chats and prompts with completions, "label" texts
    with classes, and "pair" two texts; None stands for plain texts.

    Raises:
      InputError: sources of several kinds.
    """
    if all(tasks.images(source) for source in options.data):
        return "images"
    kinds = (
        {examples.kind_of_source(source) for source in options.data}
        if options.field == "text"
        else {None}
    )
    found = {"answers" if one in examples.KINDS else one for one in kinds}
    if len(found) > 1:
        raise InputError(
            f"--data: {', '.join(options.data)} are of several kinds; allowed: texts, answers, "
            f"pairs, or rows with labels"
        )
    return found.pop()


def read(options: Train, task: str, kind: str | None, model: Any, begun: Any) -> Corpus:
    """Read what a task learns from.

    Args:
      options: of the run.
      task: see `tasks.TASKS`.
      kind: of the data.
      model: what is trained; of a new one its vocabulary and classes are not known yet.
      begun: the bundle that the training begins with; None for a new model.

    Raises:
      InputError: data that cannot be read, or are too few.
    """
    if kind == "images":
        return load_images(options, model.config, None if begun is None else begun.processor)
    tokenizer = None if begun is None else hub.need_processor(begun)
    if task in ("language", "masked") and kind != "answers":
        return load(options, tokenizer, task)
    if tokenizer is None:
        with step("tokenise"):
            tokenizer = tasks.learnt(_all_texts(options), options, task)
    if task == "classify":
        return load_labelled(options, tokenizer)
    if task == "seq2seq":
        end = next(iter(tokenizer.eos_ids), None)
        start = model.config.start if begun is not None else (end or 0)
        make = functools.partial(text_pairs.translations, start=start, end=end)
        return load_pairs(options, tokenizer, make)
    if task == "embed":
        return load_pairs(options, tokenizer, text_pairs.alike)
    return load_answers(options, tokenizer)


def _all_texts(options: Train) -> Iterator[str]:
    """Yield the texts of records, whatever they are called."""
    for _, record in sources.records(options.data, "train"):
        yield from (value for value in record.values() if isinstance(value, str))


def load_pairs(options: Train, tokenizer: hub.Tokenizer, make: Any) -> Corpus:
    """Read pairs of texts; held out is as of `load_answers`."""
    with step("tokenise"):
        rows = make(options.data, tokenizer, options.context)
        judged = None
        if options.heldout is not None:
            judged = make(options.heldout, tokenizer, options.context)
    count = len(next(iter(rows.values())))
    if judged is None and count >= LEAST_TO_SPLIT:
        rows, judged = (data.subset(rows, part) for part in data.split(count, (0.9, 0.1)))
    masks = [a for name, a in rows.items() if name.endswith("mask") or name == "weights"]
    return _opened(options, tokenizer, rows, judged, int(sum(a.sum() for a in masks)))


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """A subset of rows, as `Stream` takes them."""

    whole: Any
    numbers: np.ndarray

    @property
    def fingerprint(self) -> str:
        """Return the digest of the whole and of which rows they are."""
        digest = hashlib.sha256(self.numbers.astype("<i8").tobytes()).hexdigest()
        return f"{self.whole.fingerprint} {digest}"

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.numbers)

    def take(self, indices: np.ndarray) -> Any:
        """Return rows by their numbers among these."""
        return self.whole.take(self.numbers[indices])


def load_images(options: Train, config: Any, processor: Any) -> Corpus:
    """Read folders of images; held out is as of `load_labelled`."""
    folder, judged = tasks.image_folders(options, config, processor, ())
    rows: Any = folder
    if judged is None and len(folder) >= LEAST_TO_SPLIT:
        parts = data.split(len(folder), (0.9, 0.1), labels=folder.labels)
        rows, judged = (Part(folder, part) for part in parts)
    opened = _opened(options, folder.processor, rows, judged, len(rows))
    return opened._replace(labels=tuple(folder.names))


def load_answers(options: Train, tokenizer: hub.Tokenizer) -> Corpus:
    """Read rows with answers; without a held-out file each tenth row is held out."""
    if options.weights:
        raise InputError(
            "--weights: given for rows to learn answers from, which are read as one; allowed: "
            "without"
        )
    with step("tokenise"):
        read = lambda source: data.answers(source, tokenizer, options.context, pack=options.pack)
        rows = read(options.data)
        judged = None if options.heldout is None else read(options.heldout)
    if judged is None and len(rows) >= LEAST_TO_SPLIT:
        rows, judged = map(rows.only, data.split(len(rows), (0.9, 0.1)))
    opened = _opened(options, tokenizer, rows, judged, rows.tokens)
    return opened._replace(prompt=_question(tokenizer, rows if judged is None else judged))


def load_labelled(options: Train, tokenizer: hub.Tokenizer) -> Corpus:
    """Read rows with classes; held-out rows as in `load_answers`, in proportion for each class."""
    with step("tokenise"):
        rows, names = data.labelled(options.data, tokenizer, options.context)
        judged = None
        if options.heldout is not None:
            judged, _ = data.labelled(options.heldout, tokenizer, options.context, names=names)
    if judged is None and len(rows["labels"]) >= LEAST_TO_SPLIT:
        parts = data.split(len(rows["labels"]), (0.9, 0.1), labels=rows["labels"])
        rows, judged = ({name: a[part] for name, a in rows.items()} for part in parts)
    return _opened(options, tokenizer, rows, judged, int(rows["mask"].sum()))._replace(labels=names)


def _question(tokenizer: hub.Tokenizer, rows: Any) -> str:
    """Return the text in front of the first answer of the first row."""
    first = rows.take(np.array([0]))
    end = int(np.argmax(first["weights"][0] > 0)) + 1
    return tokenizer.decode(first["tokens"][0, :end].tolist(), skip_special=False)


def _opened(options: Train, tokenizer: Any, rows: Any, judged: Any, tokens: int) -> Corpus:
    stream = data.Stream(rows, options.batch, options.seed)
    heldout = None if judged is None else data.Stream(judged, options.batch)
    described = {
        "name": " ".join(options.data),
        "rows": stream.count,
        "tokens": tokens,
        "stream": stream.fingerprint,
    }
    if heldout is not None:
        described |= {"heldout_rows": heldout.count, "heldout": heldout.fingerprint}
    return Corpus(tokenizer, stream, heldout, [described])


def _beside(texts: Sequence[Any], options: Train) -> list[tuple[Any, str]]:
    return list(zip(texts, (*options.data, options.heldout or "english"), strict=True))


def _beginning(text: Any) -> Iterator[str]:
    seen = 0
    for document in text:
        yield document
        seen += len(document)
        if seen >= LEARN_FROM:
            return


def _folder(source: str, tokenizer: hub.Tokenizer) -> Path:
    """Return the folder that keeps the ids of a text for the next run.

    It is in `$JAXMODEL_CACHE`, or else in `~/.cache/jaxmodel`.
    """
    room = Path(os.environ.get("JAXMODEL_CACHE", "~/.cache/jaxmodel")).expanduser()
    name = (
        source
        if "://" in source
        else str(Path(source).absolute())
        if Path(source).exists()
        else source
    )
    key = hashlib.sha256(f"{name}\n{tokenizer.backend.to_str()}".encode()).hexdigest()[:24]
    return room / "tokens" / key


def _rows(shards: data.Shards, options: Train, source: str) -> data.Rows:
    length = options.context + 1
    if options.pack:
        return data.PackedShards(shards, length)
    if shards.tokens < length:
        raise InputError(
            f"--data, --heldout, --context: {source!r} has {shards.tokens} tokens; allowed: at "
            f"least the {length} of one window"
        )
    return ShardWindows(shards, length, stride=options.context)


@contextlib.contextmanager
def _in_turn() -> Iterator[None]:
    """Let the first process go ahead and write, and the others find what it wrote."""
    if jax.process_count() == 1:
        yield
        return
    from jax.experimental import multihost_utils

    if jax.process_index() == 0:
        yield
    multihost_utils.sync_global_devices("the first process has tokenised")
    if jax.process_index() != 0:
        yield
