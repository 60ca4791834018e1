"""Texts tokenised once, with their ids in files that are mapped into memory or read by byte ranges.

For each shard a folder holds the ids of its documents, one after another (`tokens-*.bin`: uint16
if the vocabulary allows it, else uint32), and the start of each and the end of the last
(`offsets-*.bin`: int64), little-endian. `index.json`, written last, has their sizes and digests. No
document is split between shards.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from types import CodeType, FunctionType
from typing import Annotated, Any, Literal, Protocol, SupportsIndex, TypedDict, runtime_checkable

import numpy as np

from jaxmodel import schema
from jaxmodel.data import storage
from jaxmodel.data.cached import cached
from jaxmodel.data.sources import Documents, documents
from jaxmodel.errors import InputError, at_least
from jaxmodel.progress import Job, bar

INDEX = "index.json"
_FORMAT = "jaxmodel shards 1"
_FILES = ("tokens_file", "offsets_file")
_OURS = re.compile(
    r"(tokens|offsets)-[0-9a-f]{8}-\d{5,}\.bin|pack-\d+-[0-9a-f]{16}\.(json|starts|sizes|firsts)"
)
_ANEW = f"delete {INDEX} and tokenise again"
# most texts and characters that are encoded in one call, unless a single text is longer
_TEXTS, _CHARACTERS = (
    1024,
    2**20,
)


type _Size = Annotated[int, schema.Range(0, 2**62)]


class _Shard(TypedDict):
    tokens_file: str
    offsets_file: str
    documents: _Size
    tokens: _Size
    tokens_sha256: str
    offsets_sha256: str


class _Index(TypedDict):
    format: str
    key: str
    dtype: Literal["<u2", "<u4"]
    vocab: schema.Count
    eos: schema.Index | None
    tokenizer: Any
    keep: list[Any] | None
    documents: _Size
    tokens: _Size
    shards: list[_Shard]


@runtime_checkable
class Encoder(Protocol):
    """The part of a tokenizer that `tokenize` needs, such as a `hub.Tokenizer`.

    A property `fingerprint` may take the place of its `backend`.
    """

    @property
    def vocab_size(self) -> int:
        """Return the number of ids; every id is smaller."""
        ...

    @property
    def eos_ids(self) -> Sequence[int]:
        """Return the ids that end a text, the principal one first."""
        ...

    def encode_batch(self, texts: Iterable[str], /) -> list[list[int]]:
        """Return the ids of several texts."""
        ...


@dataclass(frozen=True, eq=False)
class Shards:
    """Documents as token ids, in a folder that `tokenize` wrote.

    Opening reads the index and compares sizes. The digest of a local file is compared before it is
    first read.

    Attributes:
      folder: a path or a URL. Each range read from a URL is one request; `filecache::s3://...`
        caches files on a disk.

    Raises:
      InputError: a folder without an index, or a shard that is missing or has another size.
    """

    folder: storage.Where

    def __post_init__(self) -> None:
        found = storage.sizes(self.folder)
        for shard in self.index["shards"]:
            for kind, size in zip(
                _FILES,
                (shard["tokens"] * self.dtype.itemsize, 8 * shard["documents"] + 8),
                strict=True,
            ):
                name = shard[kind]
                if found.get(name) != size:
                    given = f"has {found[name]:,} bytes" if name in found else "is missing"
                    path = storage.join(self.folder, name)
                    raise InputError(
                        f"shards: {path!r} {given}; it had {size:,} bytes: restore it, or {_ANEW}"
                    )

    @cached_property
    def index(self) -> dict[str, Any]:
        """Return the content of index.json."""
        found = _read_index(self.folder)
        if found is None:
            where = storage.join(self.folder, INDEX)
            raise InputError(
                f"shards: {where!r} is missing or incomplete; allowed: a folder that `tokenize` "
                "finished"
            )
        return found

    @property
    def dtype(self) -> np.dtype:
        """Return the dtype in which ids are stored."""
        return np.dtype(self.index["dtype"])

    @property
    def tokens(self) -> int:
        """Return the number of tokens in all documents."""
        return self.index["tokens"]

    @cached
    def fingerprint(self) -> str:
        """Return the SHA-256 of all digests, the tokenizer and the filter's name; it is cheap."""
        digests = [
            [shard["tokens_sha256"], shard["offsets_sha256"]] for shard in self.index["shards"]
        ]
        # without the filter's code, which differs between versions of Python
        keep = self.index["keep"] and self.index["keep"][0]
        return _digest([_FORMAT, self.index["dtype"], self.index["tokenizer"], keep, digests])

    def __len__(self) -> int:
        """Return the number of documents."""
        return self.index["documents"]

    def offsets(self, start: int, stop: int) -> np.ndarray:
        """Return the starts of documents start ... stop - 1 and the end of the last.

        They are positions in the sequence of all tokens, int64 [stop - start + 1].
        """
        begins = self._documents
        first = bisect.bisect_right(begins, start) - 1
        last = bisect.bisect_left(begins, stop) - 1
        parts = []
        for k in range(first, last + 1):
            low = max(start - begins[k], 0)
            high = min(stop, begins[k + 1]) - begins[k]
            parts.append(self._starts[k] + self._offsets[k].read(low, high + (k == last)))
        return np.concatenate(parts)

    def doc(self, i: SupportsIndex) -> np.ndarray:
        """Return the ids of document i, int32 [n].

        Raises:
          InputError: there is no such document.
        """
        i = operator.index(i)
        if not 0 <= i < len(self):
            raise InputError(f"document: {i} given; allowed: 0 to {len(self) - 1}")
        start, stop = self.offsets(i, i + 1).tolist()
        return self.read(np.array([start]), np.array([stop - start]))

    def read(self, starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Return the ids of several ranges of all tokens in a row, int32 [sum of counts]."""
        owner = np.searchsorted(self._starts, starts, side="right") - 1
        # split a range that reaches into the next shard
        if np.any(starts + counts > self._starts[owner + 1]):
            inner = self._starts[1:-1]
            cuts = [
                inner[(inner > a) & (inner < b)]
                for a, b in zip(starts, starts + counts, strict=True)
            ]
            edges = [
                np.array([a, *c, b]) for a, c, b in zip(starts, cuts, starts + counts, strict=True)
            ]
            return self.read(
                np.concatenate([e[:-1] for e in edges]), np.concatenate([np.diff(e) for e in edges])
            )
        out = np.empty(int(counts.sum()), np.int32)
        used = np.unique(owner)
        for shard in used:
            mine = owner == shard
            found = self._tokens[shard].take(starts[mine] - self._starts[shard], counts[mine])
            if len(used) == 1:
                return found.astype(np.int32)
            out[np.repeat(mine, counts)] = found
        return out

    def verify(self) -> None:
        """Compare the digest of every file with the index; this reads all of them.

        Raises:
          InputError: a file that is not what was written.
        """
        with bar(self.tokens, "verify shards", unit="token") as job:
            for shard in self.index["shards"]:
                for kind in _FILES:
                    path = storage.join(self.folder, shard[kind])
                    if storage.sha256(path) != shard[kind.replace("file", "sha256")]:
                        raise InputError(
                            f"shards: {path!r} has changed since it was written (another sha256): "
                            f"restore it, or {_ANEW}"
                        )
                job.advance(shard["tokens"])

    @cached_property
    def _tokens(self) -> list[storage.Column]:
        return [self._column(shard, "tokens", self.dtype) for shard in self.index["shards"]]

    @cached_property
    def _offsets(self) -> list[storage.Column]:
        return [self._column(shard, "offsets", np.dtype("<i8")) for shard in self.index["shards"]]

    def _column(self, shard: dict[str, Any], kind: str, dtype: np.dtype) -> storage.Column:
        return storage.Column(
            storage.join(self.folder, shard[f"{kind}_file"]), dtype, shard[f"{kind}_sha256"]
        )

    @cached_property
    def _starts(self) -> np.ndarray:
        """Return the start of each shard in the sequence of all tokens, and the end of the last."""
        return np.cumsum([0, *(shard["tokens"] for shard in self.index["shards"])])

    @cached_property
    def _documents(self) -> list[int]:
        """Return the number of documents before each shard, and in all."""
        return list(accumulate((shard["documents"] for shard in self.index["shards"]), initial=0))


def tokenize(
    texts: Documents | str | Path | Iterable[str],
    tokenizer: Encoder,
    folder: storage.Where,
    *,
    shard_tokens: int = 2**27,
    eos: bool = True,
    keep: Callable[[str], bool] | None = None,
) -> Shards:
    """Tokenise documents once: a second call with equal arguments opens what the first one wrote.

    Shards of a changed source are written beside the old ones, which are deleted once the new index
    is complete. An interrupted call leaves the old state, or none. Documents without tokens are
    left out.

    Args:
      texts: `documents(...)` or a source for it, or a list of texts, or anything else that can be
        iterated twice.
      tokenizer: `hub.Tokenizer`, or anything else with `vocab_size`, `eos_ids`, `encode_batch` and
        `fingerprint`.
      folder: the path or URL to write to.
      shard_tokens: a shard is closed once it has at least so many tokens.
      eos: end each document with the tokenizer's principal end-of-text id.
      keep: tells which documents to keep, a pure function of the text. Its name is part of the
        fingerprint. If its code changes, the documents are tokenised again.

    Returns:
      The shards.

    Raises:
      InputError: no documents, a tokenizer without an end-of-text id, ids beyond its vocabulary, a
        filter that depends on more than the text, a folder that cannot be written.
    """
    at_least("shard_tokens", shard_tokens)
    if isinstance(texts, str | Path):
        texts = documents(texts)
    if isinstance(texts, Iterator):
        raise InputError(
            "texts: an iterator given, which can be read only once; allowed: documents(...), a "
            "list of texts"
        )
    if eos and not tokenizer.eos_ids:
        raise InputError("eos: the tokenizer has no end-of-text id; allowed: eos=False")
    head = {
        "format": _FORMAT,
        "dtype": "<u2" if tokenizer.vocab_size <= 2**16 else "<u4",
        "vocab": tokenizer.vocab_size,
        "eos": tokenizer.eos_ids[0] if eos else None,
        "tokenizer": _tokenizer_digest(tokenizer),
        "keep": None if keep is None else _function_digest(keep),
        "source": texts.digest() if isinstance(texts, Documents) else _texts_digest(texts),
    }
    key = _digest([head, shard_tokens])
    old = _read_index(folder)
    if old is not None and old.get("key") == key:
        return Shards(folder)

    shards = []
    with bar(None, "tokenise", unit="token") as job:
        kept = texts if keep is None else filter(keep, texts)
        rows = (np.array(ids, head["dtype"]) for ids in _encoded(kept, tokenizer, head["eos"], job))
        for row in rows:
            shards.append(
                _write_shard(
                    folder, f"{key[:8]}-{len(shards):05}", chain([row], rows), shard_tokens
                )
            )
    if not shards:
        raise InputError("texts: no document has a token; allowed: at least one that has")
    totals = {name: sum(shard[name] for shard in shards) for name in ("documents", "tokens")}
    with storage.writing(storage.join(folder, INDEX)) as file:
        file.write(json.dumps({**head, "key": key, **totals, "shards": shards}, indent=1).encode())
    names = {shard[kind] for shard in shards for kind in _FILES}
    for name in storage.sizes(folder):
        if _OURS.fullmatch(name) and name not in names:
            storage.remove(storage.join(folder, name))
    return Shards(folder)


def _encoded(
    texts: Iterable[str], tokenizer: Encoder, eos: int | None, job: Job
) -> Iterator[list[int]]:
    end = [] if eos is None else [eos]
    for chunk in _chunks(texts):
        for ids in tokenizer.encode_batch(chunk):
            if ids:
                if min(ids) < 0 or max(ids) >= tokenizer.vocab_size:
                    given = f"ids from {min(ids)} to {max(ids)}"
                    raise InputError(
                        f"tokenizer: it returned {given}; allowed: 0 to "
                        f"{tokenizer.vocab_size - 1}, by its vocab_size"
                    )
                yield [*ids, *end]
        job.advance(len(chunk))


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk = []
    characters = 0
    for text in texts:
        chunk.append(text)
        characters += len(text)
        if len(chunk) == _TEXTS or characters >= _CHARACTERS:
            yield chunk
            chunk = []
            characters = 0
    if chunk:
        yield chunk


def _write_shard(
    folder: storage.Where, name: str, rows: Iterable[np.ndarray], limit: int
) -> dict[str, Any]:
    """Write documents until there are `limit` tokens; return their entry in the index."""
    paths = {"tokens_file": f"tokens-{name}.bin", "offsets_file": f"offsets-{name}.bin"}
    first, second = (storage.join(folder, path) for path in paths.values())
    sums = hashlib.sha256(), hashlib.sha256()
    total = 0
    count = 0
    with storage.writing(first) as tokens, storage.writing(second) as offsets:
        for row in chain([None], rows):
            if row is not None:
                total = total + len(row)
                count = count + 1
                tokens.write(raw := row.tobytes())
                sums[0].update(raw)
            offsets.write(raw := np.array(total, "<i8").tobytes())
            sums[1].update(raw)
            if total >= limit:
                break
    digests = dict(
        zip(
            ("tokens_sha256", "offsets_sha256"),
            (digest.hexdigest() for digest in sums),
            strict=True,
        )
    )
    return {**paths, "documents": count, "tokens": total, **digests}


def _read_index(folder: storage.Where) -> dict[str, Any] | None:
    """Return the index, or None if there is none that is complete."""
    if INDEX not in storage.sizes(folder):
        return None
    with storage.reading(storage.join(folder, INDEX)) as file:
        raw = file.read()
    with suppress(InputError):
        found = schema.make(schema.parse(raw, INDEX), _Index, INDEX)
        names = [shard[kind] for shard in found["shards"] for kind in _FILES]
        totals = {
            name: sum(shard[name] for shard in found["shards"]) for name in ("documents", "tokens")
        }
        if (
            found["format"] == _FORMAT
            and all(map(_OURS.fullmatch, names))
            and totals == {name: found[name] for name in totals}
        ):
            return found
    return None


# ------------------------------------------------------------------------------------------ digests


def _digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _tokenizer_digest(tokenizer: Any) -> str:
    if text := getattr(tokenizer, "fingerprint", None):
        return _digest(text)
    backend: Any = getattr(tokenizer, "backend", None)
    if hasattr(backend, "to_str"):
        return _digest(backend.to_str())
    raise InputError(
        f"tokenizer: {type(tokenizer).__name__} given; allowed: a hub.Tokenizer, or an object with "
        "a property `fingerprint`"
    )


def _texts_digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        if not isinstance(text, str):
            raise InputError(f"texts: {type(text).__name__} given; each must be a str")
        raw = text.encode("utf-8", "surrogatepass")
        digest.update(b"%d\n" % len(raw) + raw)
    return digest.hexdigest()


def _function_digest(function: Callable[[str], bool]) -> list[Any]:
    """Return the name and code of a function; all else that it uses must be plain constants."""
    allowed = "a plain function of the text, with numbers and strings as closure and defaults"
    if not isinstance(function, FunctionType):
        raise InputError(f"keep: {function!r} given; allowed: {allowed}")
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    held += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for value in held:
        if not isinstance(value, str | int | float | None):
            raise InputError(
                f"keep: {function.__qualname__} depends on {value!r}; allowed: {allowed}"
            )
    return [
        f"{function.__module__}.{function.__qualname__}",
        _digest([_code(function.__code__), repr(held)]),
    ]


def _code(code: CodeType) -> list[Any]:
    """Return what a function does, without its position in a file."""
    return [
        code.co_code.hex(),
        code.co_names,
        code.co_varnames,
        [_constant(c) for c in code.co_consts],
    ]


def _constant(value: Any) -> Any:
    if isinstance(value, CodeType):
        return _code(value)
    if isinstance(value, frozenset):  # `in {"a", "b"}`; its order differs from process to process
        return sorted(map(repr, value))
    return repr(value)
