"""Text sources by name or path, and the rule that splits a text into documents.

A name means the same text everywhere. The texts of pydoc come with Python. The files of the others
are looked up in the folder that the environment variable `JAXMODEL_DATA` names, then at the hub;
`Text.origin` says where a text was found.

| name              | text                                    | `$JAXMODEL_DATA`      | else     |
|-------------------|-----------------------------------------|-----------------------|----------|
| `english`         | held-out part of pydoc, see below       | -                     | pydoc    |
| `english_train`   | training part of pydoc                  | -                     | pydoc    |
| `pydoc`           | Python's language reference, all topics | -                     | pydoc    |
| `wikitext2-test`  | WikiText-2, test part                   | `wikitext2-test.txt`  | wikitext |
| `wikitext2-valid` | WikiText-2, validation part             | `wikitext2-valid.txt` | wikitext |
| `tinyshakespeare` | 1.1 MB of Shakespeare                   | `tinyshakespeare.txt` | -        |

(pydoc: the module pydoc_data.topics of every CPython, a little different in each version; wikitext:
the data set Salesforce/wikitext at the hub.)

The topics of pydoc repeat each other (the one on compound statements contains those on `if`, `for`,
...). So for `english` and `english_train` a topic is left out if larger ones contain at least half
of it. The others are sorted by name. Those that begin in the first 60 % of the characters are for
training and the later ones are held out. Paragraphs that also occur in the held-out part are
removed from the training part.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from pathlib import Path

from jaxmodel.brief import briefly
from jaxmodel.data import storage
from jaxmodel.errors import InputError, nearest, require
from jaxmodel.files import read_bytes
from jaxmodel.report import html
from jaxmodel.report.shown import card

NAMES = (
    "english",
    "english_train",
    "pydoc",
    "tinyshakespeare",
    "wikitext2-test",
    "wikitext2-valid",
)

RECORDS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "table"),
    **{".parquet": "parquet", ".arrayrecord": "arrayrecord", ".array_record": "arrayrecord"},
}
"""Endings of files that hold records, and their formats."""
_PACKAGE = "pydoc_data.topics"
_PYDOC = ("english", "english_train", "pydoc")
# Part of WikiText-2 -> (its file in Salesforce/wikitext, sha256 of the text that our figures use).
_HUB = {
    "wikitext2-test": (
        "wikitext-2-v1/test-00000-of-00001.parquet",
        "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
    ),
    "wikitext2-valid": (
        "wikitext-2-v1/validation-00000-of-00001.parquet",
        "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
    ),
}
# Lines with their line ends. A title has at least one blank line on both sides, or stars below it;
# see `split_documents`.
_BLANK = re.compile(r"[ \t\r]*\n")
_TITLE = re.compile(r" ?= [^=\n]+ = ?\r?\n")
_STARS = re.compile(r"\*{3,}\r?\n")


@briefly
@dataclass(frozen=True)
class Text:
    """A text and where it came from.

    Attributes:
      text: the characters, exactly as in the file (line ends are not translated).
      name: the name or path that was asked for.
      origin: where it was found: `$JAXMODEL_DATA/wikitext2-test.txt`, `package pydoc_data.topics`,
        `hub ...`, or the path.
      sha256: SHA-256 of the text in UTF-8, hexadecimal.
    """

    text: str
    name: str
    origin: str
    sha256: str

    def _repr_html_(self) -> str:
        facts = {"origin": self.origin, "characters": len(self.text), "sha256": self.sha256}
        return card(
            f"Text {self.name}", facts, [html.code(self.text[:400] + "…" * (len(self.text) > 400))]
        )


def load_text(source: str | Path) -> Text:
    """Load the text of a known name (see the table above) or of a UTF-8 file.

    A name takes precedence over a file of the same name.

    Args:
      source: one of `NAMES`, a path, or a URL (`gs://...`).

    Returns:
      The text with its origin and digest.

    Raises:
      InputError: neither a name nor a file, a text that is found nowhere, an unreadable, empty or
        non-UTF-8 file.

    >>> load_text("pydoc").origin
    'package pydoc_data.topics'
    """
    name = str(source)
    if isinstance(source, str) and source in NAMES:
        text, origin = _named(source)
    elif record_kind(name) is not None:
        allowed = (
            f"one UTF-8 text, or {', '.join(NAMES)}; "
            "records are read by `data.documents` and `jaxmodel train`"
        )
        raise InputError(
            f"data source: {name!r} has the name of a file of records; allowed: {allowed}"
        )
    elif storage.is_remote(name):
        with storage.reading(name, unpack=False) as file:
            raw = file.read(storage.LONGEST + 1)
            if len(raw) > storage.LONGEST:
                raise InputError(
                    f"data source: {name!r} is larger than {storage.LONGEST:,} bytes, the largest "
                    "size that is held"
                )
            text = _decode(name, raw)
            origin = name
    else:
        path = Path(source).expanduser()
        text = _read(name, path)
        origin = _shown(name, path)
    return Text(text, name, origin, _sha256(text))


def record_kind(path: str) -> str | None:
    """Return the format of a file of records with a text field, or None for plain text.

    >>> record_kind("a/tweets.JSONL.gz"), record_kind("b.csv"), record_kind("c.txt")
    ('json', 'table', None)
    """
    return RECORDS.get(Path(path.lower().removesuffix(".gz")).suffix)


def split_documents(text: str) -> list[str]:
    r"""Split a text into documents: articles if it has titles, else paragraphs.

    A title follows a blank line and is either a WikiText one (` = Title = `, a blank line after it)
    or underlined by stars, as in pydoc. Paragraphs end with blank lines. The documents joined are
    the whole text.

    >>> split_documents("First Citizen:\nSpeak.\n\nAll:\nResolved.\n")
    ['First Citizen:\nSpeak.\n\n', 'All:\nResolved.\n']
    """
    return list(split_lines(lambda: io.StringIO(text, newline="\n")))


def split_lines(lines: Callable[[], Iterable[str]]) -> Iterator[str]:
    """Split a text that is too large for memory, as `split_documents` does.

    `lines()` yields its lines, and is called twice.
    """
    before = True  # as if a blank line stood above the first
    titled = False
    for line, below in pairwise(chain(lines(), [""])):
        if before and _is_title(line, below):
            titled = True
            break
        before = bool(_BLANK.fullmatch(line))
    # white space at the start and end of the text is part of the first and last document
    held, spaces = (
        "",
        [],
    )
    for piece in _pieces(lines(), titled):
        if not piece.strip():
            spaces.append(piece)
        elif not held:
            held = "".join([*spaces, piece])
            spaces = []
        else:
            yield from [held, *spaces]
            held = piece
            spaces = []
    if held:
        yield "".join([held, *spaces])


def _pieces(lines: Iterable[str], titled: bool) -> Iterator[str]:
    piece: list[str] = []
    before = True
    for line, below in pairwise(chain(lines, [""])):
        blank = bool(_BLANK.fullmatch(line))
        if piece and before and (_is_title(line, below) if titled else not blank):
            yield "".join(piece)
            piece = []
        piece.append(line)
        before = blank
    yield "".join(piece)


def _is_title(line: str, below: str) -> bool:
    if _TITLE.fullmatch(line) and _BLANK.fullmatch(below):
        return True
    return line.endswith("\n") and bool(line.strip()) and bool(_STARS.fullmatch(below))


def _named(name: str) -> tuple[str, str]:
    if name in _PYDOC:
        train, held_out = (_topics().values(), ()) if name == "pydoc" else _split_topics(_topics())
        return "\n\n\n".join(held_out if name == "english" else train) + "\n", f"package {_PACKAGE}"
    folder = os.environ.get("JAXMODEL_DATA")
    file = f"{name}.txt"
    if folder and (path := Path(folder, file)).is_file():
        return _read(name, path), f"$JAXMODEL_DATA/{file}"
    missing = f"data source: {name!r} is not in $JAXMODEL_DATA ({folder or 'not set'}) as {file}"
    if name not in _HUB:
        raise InputError(
            f"{missing}; put it into a folder and set the environment variable JAXMODEL_DATA to "
            "that"
        )
    try:
        return _from_hub(name)
    except InputError as error:
        raise InputError(f"{missing}, and not at the hub: {error}") from None


def _read(given: str, path: Path) -> str:
    if not path.is_file():
        raise no_file(given, path)
    try:
        return _decode(given, read_bytes(path, storage.LONGEST))
    except OSError as error:
        raise InputError(f"data source: {given!r} cannot be read: {error.strerror}") from None


def not_utf8(given: str, error: UnicodeDecodeError, before: int = 0) -> InputError:
    """Make the error for a file that is not UTF-8 after `before` good bytes; callers raise it."""
    where = (
        f"byte 0x{error.object[error.start]:02x} at offset {before + error.start} ({error.reason})"
    )
    return InputError(f"data source: {given!r} is not UTF-8: {where}; allowed: a UTF-8 text file")


def _decode(given: str, raw: bytes) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(given, error) from None
    if not text.strip():
        raise InputError(
            f"data source: {given!r} holds no text ({len(text)} white-space characters); allowed: "
            "a file with text"
        )
    return text


def no_file(given: str, path: Path) -> InputError:
    """Make the error for a source that is neither a file nor a name; callers raise it."""
    if path.is_dir():
        return InputError(f"data source: {given!r} is a folder; allowed: a UTF-8 text file")
    beside = (
        sorted(entry.name for entry in path.parent.iterdir() if entry.is_file())
        if path.parent.is_dir()
        else []
    )
    close = nearest(path.name, [*beside, *(NAMES if path.parent == Path() else ())])
    hint = f" (nearest: {', '.join(close)})" if close else ""
    if not path.parent.is_dir():
        hint = f" (there is no folder {str(path.parent)!r})"
    return InputError(
        f"data source: {given!r} is neither a file nor a known text; allowed: a UTF-8 file, "
        f"{', '.join(NAMES)}{hint}"
    )


def _shown(given: str, path: Path) -> str:
    # Keep the paths of this machine out of reports that another machine repeats.
    folder = os.environ.get("JAXMODEL_DATA")
    if folder and path.resolve().is_relative_to(Path(folder).resolve()):
        return f"$JAXMODEL_DATA/{path.resolve().relative_to(Path(folder).resolve()).as_posix()}"
    return given


def _topics() -> dict[str, str]:
    try:
        topics = importlib.import_module(_PACKAGE).topics
    except ImportError:
        raise InputError(
            f"data source: this Python was installed without its module {_PACKAGE}; name a UTF-8 "
            f"file"
        ) from None
    return {name: topics[name].strip() for name in sorted(topics)}


def _split_topics(topics: dict[str, str]) -> tuple[list[str], list[str]]:
    """Return the training and the held-out documents by the rule in the module's docstring."""
    seen: set[str] = set()
    kept = set()
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = [_plain(p) for p in _paragraphs(topics[name])]
        if 2 * sum(len(p) for p in paragraphs if p in seen) < sum(map(len, paragraphs)):
            kept.add(name)
            seen.update(paragraphs)
    texts = [text for name, text in topics.items() if name in kept]
    begins = [0, *accumulate(map(len, texts))]
    train = [
        text for text, begin in zip(texts, begins, strict=False) if 10 * begin < 6 * begins[-1]
    ]
    held_out = texts[len(train) :]
    secret = {_plain(p) for text in held_out for p in _paragraphs(text)}
    train = [
        "".join(p for p in _paragraphs(text) if _plain(p) not in secret).strip() for text in train
    ]
    return [text for text in train if text], held_out


def _paragraphs(text: str) -> list[str]:
    return re.split(r"(?<=\n\n)(?=[^\n])", text)


def _plain(paragraph: str) -> str:
    # the indentation of a paragraph differs between topics
    return " ".join(paragraph.split())


def _from_hub(name: str) -> tuple[str, str]:
    file, digest = _HUB[name]
    hub = require("huggingface_hub", "hub")
    parquet = require("pyarrow.parquet", "data")
    try:
        path = hub.hf_hub_download("Salesforce/wikitext", file, repo_type="dataset")
    except (OSError, ValueError) as error:  # the hub's errors derive from these
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(f"Salesforce/wikitext:{file} could not be fetched ({reason})") from None
    rows = parquet.read_table(path, columns=["text"])["text"].to_pylist()
    # one row per line; the data set stores the line " \n" as ""
    text = "".join(row or " \n" for row in rows)
    if _sha256(text) != digest:
        raise InputError(
            f"Salesforce/wikitext:{file} is not the text that was published (sha256 "
            f"{_sha256(text)})"
        )
    return text, f"hub Salesforce/wikitext:{file}"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
