"""Rows for learning answers or classes: chats, prompts with completions, texts with labels.

| a record has                    | meaning                                                        |
|---------------------------------|----------------------------------------------------------------|
| `messages` (or `conversations`) | a chat, `[{"role": "user", "content": "..."}, ...]`, written   |
|                                 | by the chat template, also `tools` if there are some; the      |
|                                 | assistant's messages are learnt                                |
| `prompt` and `completion`       | two texts, or the two parts of a chat; the completion is learnt|
| `text` and `label`              | a text and the name of its class (see `labelled`)              |

Files are those of `sources` that hold records: JSON lines, JSON, CSV, TSV, Parquet, ...
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmodel.brief import briefly
from jaxmodel.data.cached import cached
from jaxmodel.data.pack import first_fit
from jaxmodel.data.sources import Source, documents, records
from jaxmodel.data.stream import Batch
from jaxmodel.data.text import NAMES, record_kind
from jaxmodel.data.text_pairs import ALIKE, WRITTEN
from jaxmodel.errors import InputError, at_least

KINDS = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "completion": ("prompt", "completion"),
}
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def kind_of(record: Mapping[str, Any]) -> str | None:
    """Return what a record is: a key of `KINDS`, "pair", "label", or None for something else.

    >>> kind_of({"prompt": "2+2=", "completion": "4"}), kind_of({"text": "a", "label": "b"})
    ('completion', 'label')
    >>> kind_of({"text": "a"}) is None
    True
    """
    found = next(
        (kind for kind, fields in KINDS.items() if all(field in record for field in fields)), None
    )
    if found is None and any(all(name in record for name in pair) for pair in (*WRITTEN, *ALIKE)):
        return "pair"
    return found or ("label" if "text" in record and "label" in record else None)


def kind_of_source(source: Source) -> str | None:
    """Return what the first record of a source is (see `kind_of`).

    None for plain texts, and for sources without records.
    """
    first = next(iter(documents(source).parts))
    if first in NAMES or (record_kind(first) is None and not first.startswith("hf:")):
        return None
    _, record = next(records(source), ("", {}))
    return kind_of(record)


@briefly
@dataclass(frozen=True, eq=False)
class Answers:
    """Texts with parts to learn, as rows of one width for the `data` of a `Stream`.

    `answers` makes them. A batch has `tokens`, `targets`, `segments`, `positions` `[B, T]` int32
    like one of packed documents, and `weights` `[B, T]` float32, 1 where the target is to be
    learnt. Texts in one row do not see each other.

    Attributes:
      ids: token ids of all texts, one after another, int32.
      learnt: for each id, whether it is to be learnt.
      begins: the start of each text in `ids`, in the order of the rows, and the end of the last.
      firsts: the index of the first text of each row, and the number of texts.
      length: tokens of a row, T.
    """

    ids: np.ndarray
    learnt: np.ndarray
    begins: np.ndarray
    firsts: np.ndarray
    length: int

    @cached
    def fingerprint(self) -> str:
        """Return the SHA-256 of all fields."""
        digest = hashlib.sha256(f"answers 1 {self.length}\n".encode())
        for a, kind in (
            (self.ids, "<i4"),
            (self.learnt, "|b1"),
            (self.begins, "<i8"),
            (self.firsts, "<i8"),
        ):
            digest.update(np.ascontiguousarray(a, kind).data)
        return digest.hexdigest()

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.firsts) - 1

    @property
    def tokens(self) -> int:
        """Return the number of tokens."""
        return len(self.ids)

    def only(self, rows: np.ndarray) -> Answers:
        """Return these rows alone, in this order."""
        texts = [text for row in rows for text in range(self.firsts[row], self.firsts[row + 1])]
        places = np.concatenate([np.arange(*self.begins[text : text + 2]) for text in texts])
        begins = np.concatenate(
            [[0], np.cumsum([self.begins[text + 1] - self.begins[text] for text in texts])]
        )
        firsts = np.concatenate(
            [[0], np.cumsum([self.firsts[row + 1] - self.firsts[row] for row in rows])]
        )
        return Answers(self.ids[places], self.learnt[places], begins, firsts, self.length)

    def take(self, indices: np.ndarray) -> Batch:
        """Return the rows with these indices."""
        shape = len(indices), self.length
        out: Batch = {
            name: np.zeros(shape, np.int32)
            for name in ("tokens", "targets", "segments", "positions")
        }
        out["weights"] = np.zeros(shape, np.float32)
        for row, i in enumerate(indices):
            at = 0
            for number, text in enumerate(range(self.firsts[i], self.firsts[i + 1]), 1):
                begin, end = self.begins[text : text + 2]
                place = slice(at, at + end - begin - 1)  # the last token is a target only
                out["tokens"][row, place] = self.ids[begin : end - 1]
                out["targets"][row, place] = self.ids[begin + 1 : end]
                out["weights"][row, place] = self.learnt[begin + 1 : end]
                out["segments"][row, place] = number
                out["positions"][row, place] = np.arange(end - begin - 1)
                at = place.stop
        return out


def answers(
    source: Source, tokenizer: Any, length: int, *, pack: bool = False, split: str = "train"
) -> Answers:
    """Make rows for learning answers, from chats or from prompts with completions.

    The module describes the records. A text that is longer than a row is cut at its end, and left
    out if nothing to learn remains. Messages report both.

    Args:
      source: a source for `data.documents`.
      tokenizer: `hub.Tokenizer` of the model; chats need its chat template.
      length: tokens of a row, T.
      pack: put several texts into a row, in segments; else one each.
      split: the part of a data set.

    Raises:
      InputError: a record of another kind, named by its file and line.

    >>> import json, os, tempfile
    >>> from jaxmodel import hub
    >>> path = os.path.join(tempfile.mkdtemp(), "sums.jsonl")
    >>> with open(path, "w") as file:
    ...     _ = file.write(json.dumps({"prompt": "2+2=", "completion": "4"}))
    >>> batch = answers(path, hub.train_bpe([], 257), length=8).take(np.array([0]))
    >>> batch["weights"].tolist()
    [[0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0]]
    """
    _check(tokenizer, length)
    texts = [
        text for place, record in records(source, split) for text in _read(place, record, tokenizer)
    ]
    cut = [(ids[: length + 1], learnt[: length + 1]) for ids, learnt in texts]
    kept = [one for one in cut if any(one[1][1:])]
    longer = sum(len(ids) > length + 1 for ids, _ in texts)
    lost = len(cut) - len(kept)
    if longer:
        _say(
            f"{longer:,} of {len(texts):,} texts are longer than a row of {length} tokens and "
            f"were cut at their end"
        )
    if lost:
        _say(f"{lost:,} of {len(texts):,} texts have nothing left to learn and were left out")
    if not kept:
        raise InputError(
            f"data source: {_named(source)}: no text has anything to learn within {length} tokens"
        )
    sizes = [len(ids) - 1 for ids, _ in kept]
    rows = first_fit(sizes, length)[0] if pack else np.arange(len(kept))
    order = np.argsort(rows, kind="stable")  # within a row in the order of the source
    begins = np.concatenate([[0], np.cumsum([len(kept[i][0]) for i in order])])
    ids, learnt = (np.concatenate([kept[i][part] for i in order]) for part in (0, 1))
    firsts = np.searchsorted(rows[order], np.arange(rows.max() + 2))
    return Answers(
        ids.astype(np.int32),
        learnt.astype(bool),
        begins.astype(np.int64),
        firsts.astype(np.int64),
        length,
    )


def labelled(
    source: Source,
    tokenizer: Any,
    length: int,
    *,
    names: Sequence[str] | None = None,
    split: str = "train",
) -> tuple[Batch, tuple[str, ...]]:
    """Make arrays for learning classes, from records with `text` and `label`.

    Args:
      source: a source for `data.documents`.
      tokenizer: `hub.Tokenizer` of the model.
      length: tokens of a row, T; longer texts are cut, and a message says so.
      names: names of the classes; for held-out data give those of the training data. None for the
        labels that occur, in sorted order.
      split: the part of a data set.

    Returns:
      `tokens` `[N, T]`, `mask` `[N, T]` (True where there is a token) and `labels` `[N]`, for a
      `Stream`; and the names.

    Raises:
      InputError: a record without these fields, or with a label that is not among the names; it is
        named by its file and line.
    """
    _check(tokenizer, length)
    texts: list[str] = []
    found: list[str] = []
    for place, record in records(source, split):
        label = record.get("label")
        if not isinstance(record.get("text"), str) or not isinstance(label, str | int):
            given = {name: type(a).__name__ for name, a in record.items()}
            raise InputError(
                f"data source: {place}: {given} given; allowed: 'text', and 'label', a name or a "
                f"number"
            )
        if names is not None and str(label) not in names:
            raise InputError(
                f"data source: {place}: the label {str(label)!r} is not a class; allowed: "
                f"{', '.join(names)}"
            )
        texts.append(_text(place, "text", record["text"]))
        found.append(str(label))
    if not texts:
        raise InputError(f"data source: {_named(source)}: it has no records")
    numbers = all(label.removeprefix("-").isdecimal() for label in found)
    known = (
        tuple(sorted(set(found), key=int if numbers else str)) if names is None else tuple(names)
    )
    if len(known) < 2:
        raise InputError(
            f"data source: {_named(source)}: all labels are {found[0]!r}; allowed: at least two "
            f"classes"
        )
    rows = [
        _within(tokenizer, text, ids, length)
        for text, ids in zip(texts, tokenizer.encode_batch(texts, True), strict=True)
    ]
    if longer := sum(was for _, was in rows):
        _say(
            f"{longer:,} of {len(texts):,} texts are longer than a row of {length} tokens and "
            f"were cut at their end"
        )
    tokens = np.full((len(rows), length), tokenizer.pad_id or 0, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, (ids, _) in enumerate(rows):
        tokens[i, : len(ids)], mask[i, : len(ids)] = ids, True
    places = {name: i for i, name in enumerate(known)}
    return {
        "tokens": tokens,
        "mask": mask,
        "labels": np.array([places[label] for label in found], np.int32),
    }, known


def _check(tokenizer: Any, length: int) -> None:
    at_least("length", length, 1)
    if not hasattr(tokenizer, "encode_batch"):
        given = f"{tokenizer!r:.40}" if isinstance(tokenizer, str) else type(tokenizer).__name__
        raise InputError(
            f"tokenizer: {given} given; allowed: a hub.Tokenizer, such as the processor of a bundle"
        )


def _read(
    place: str, record: Mapping[str, Any], tokenizer: Any
) -> Iterator[tuple[list[int], list[bool]]]:
    """Yield the ids of a record, each text with the flags of what is to be learnt."""
    from jaxmodel.hub import answers  # late, as it imports the library of tokenizers

    kind = kind_of(record)
    if kind not in KINDS:
        allowed = "'messages', or 'prompt' and 'completion'"
        raise InputError(
            f"data source: {place} has {', '.join(map(repr, record)) or 'no fields'}; allowed: "
            f"{allowed}"
        )
    try:
        if kind == "completion" and not isinstance(record["prompt"], list):
            prompt, completion = (_text(place, name, record[name]) for name in KINDS[kind])
            found = [answers.of_completion(tokenizer, prompt, completion)]
        else:
            first = 0 if kind != "completion" else len(record["prompt"])
            messages = (
                record[kind]
                if kind != "completion"
                else [*record["prompt"], *_list(record["completion"], "completion")]
            )
            messages = [_message(i, one) for i, one in enumerate(_list(messages, kind))]
            tools = record.get("tools") or None
            tools = json.loads(tools) if isinstance(tools, str) else tools
            found = answers.of_chat(tokenizer, messages, first=first, tools=tools)
    except ValueError as error:
        said = str(error)
        raise (
            error if said.startswith("data source") else InputError(f"data source: {place}: {said}")
        ) from None
    for one in found:
        yield one.ids, one.learnt


def _message(number: int, message: Any) -> dict[str, Any]:
    """Return a message as templates read it, also one like `{"from": "human", "value": "..."}`."""
    if not isinstance(message, Mapping):
        raise InputError(
            f"message {number} is {type(message).__name__}; allowed: {{'role': ..., 'content': "
            f"...}}"
        )
    if "role" not in message and {"from", "value"} <= set(message):
        role = _ROLES.get(str(message["from"]), str(message["from"]))
        return {"role": role, "content": message["value"]}
    if not isinstance(message.get("role"), str) or not (
        "content" in message or "tool_calls" in message
    ):
        given = ", ".join(map(repr, message)) or "nothing"
        raise InputError(f"message {number} has {given}; allowed: 'role', a text, and 'content'")
    return dict(message)


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise InputError(
            f"{name!r} is {type(value).__name__} of {value!r:.40}; allowed: a list of messages, "
            f"at least one"
        )
    return value


def _text(place: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(
            f"data source: {place}: {name!r} is {type(value).__name__}; allowed: a text"
        )
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise InputError(
            f"data source: {place}: {name!r} has half of a surrogate pair; allowed: Unicode text"
        )
    return value


def _within(tokenizer: Any, text: str, ids: list[int], length: int) -> tuple[list[int], bool]:
    """Fit the ids of a whole text into a row, with the tokenizer's special tokens.

    Return them and whether the text was cut.
    """
    if len(ids) <= length:
        return ids, False
    begins = list(tokenizer.begins)
    bare = tokenizer.encode(text)
    tail = ids[len(begins) + len(bare) :]
    return [*begins, *bare[: max(length - len(begins) - len(tail), 0)], *tail][:length], True


def _named(source: Source) -> str:
    return (
        repr(str(source))
        if not isinstance(source, Sequence) or isinstance(source, str)
        else ", ".join(map(repr, source))
    )


def _say(what: str) -> None:
    print(f"jaxmodel: data: {what}", file=sys.stderr, flush=True)
