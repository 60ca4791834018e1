"""Documents of a source, whatever its format, one after another and never the whole of a file.

| source                            | documents                                                    |
|-----------------------------------|--------------------------------------------------------------|
| a name of `text.NAMES`            | its articles or paragraphs                                   |
| `*.jsonl`, `*.ndjson`             | a JSON object per line; the text is in `field`               |
| `*.json`                          | a list of JSON objects, or the same as `.jsonl`              |
| `*.csv`, `*.tsv`                  | one per row, in column `field`; the first line is the header |
| `*.parquet`                       | one per row, in column `field`                               |
| `*.arrayrecord`, `*.array_record` | one per record: UTF-8 text, or a JSON object with `field`    |
| a folder that `datasets` saved    | one per row, in column `field`; of the part `split`          |
| `hf:NAME`, `hf:NAME:CONFIG`       | the same of a data set at the hub, streamed                  |
| any other file                    | UTF-8, split by `split_documents`                            |

ArrayRecord files are read locally, so one behind a URL is first copied to a temporary file.
Files may be compressed (`.gz`), given by patterns (`texts/*.jsonl`, `**`), and remote, behind a URL
of `storage.PROTOCOLS`.
"""

from __future__ import annotations

import codecs
import csv
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmodel import child, schema
from jaxmodel.brief import briefly
from jaxmodel.data import storage
from jaxmodel.data.text import (
    NAMES,
    RECORDS,
    load_text,
    no_file,
    not_utf8,
    record_kind,
    split_documents,
    split_lines,
)
from jaxmodel.errors import InputError, border, one_of, require, unknown

type Source = str | Path | Sequence[str | Path]

# one of them is in every folder that `datasets` saved
_SAVED = (
    "dataset_info.json",
    "dataset_dict.json",
)
_PACKAGES = {
    "parquet": ("pyarrow.parquet",),
    "arrayrecord": ("array_record.python.array_record_module",),
    **dict.fromkeys(("hub", "folder"), ("datasets",)),
}
_RECORDS = 64  # are read at a time
_LONE = re.compile("[\ud800-\udfff]")
_CELL = 2**26  # characters that a cell of a table may have


@briefly
@dataclass(frozen=True)
class Documents:
    """Texts that each iteration reads again, in the same order; made by `documents`.

    Attributes:
      parts: names and paths, with patterns resolved.
      field: the field of a record that holds the text; None for whole records.
      split: the part of a data set.
    """

    parts: tuple[str, ...]
    field: str | None = "text"
    split: str = "train"

    def __iter__(self) -> Iterator[str]:
        for part in self.parts:
            empty = True
            for where, text in self.entries(part):
                if text is None:  # a null in a column
                    continue
                if not isinstance(text, str):
                    raise _bad(
                        part,
                        f"{where}: field {self.field!r} holds {type(text).__name__}; allowed: text",
                    )
                # JSON can say it, and no tokenizer can read it
                if (odd := _LONE.search(text)) is not None:
                    half = (
                        f"half of a surrogate pair (\\u{ord(odd[0]):04x}) at character "
                        f"{odd.start()}"
                    )
                    raise _bad(part, f"{where} has {half}; allowed: Unicode text")
                empty = empty and not text.strip()
                yield text
            if empty:
                raise _bad(part, "holds no text; allowed: a file with text")

    def digest(self) -> str:
        """Return a SHA-256 that changes with the documents.

        It covers the content of small local files, and sizes and times of others (see
        `storage.stamp`). For a data set at the hub it covers only the name: what is published there
        is assumed not to change.
        """
        stamps = [[_kind(part), *_stamps(part)] for part in self.parts]
        return hashlib.sha256(json.dumps([stamps, self.field, self.split]).encode()).hexdigest()

    def check(self) -> None:
        """Check that all needed packages are installed, before anything is read.

        Raises:
          InputError: a package is missing; it is named.
        """
        for kind in {_kind(part) for part in self.parts}:
            for module in _PACKAGES.get(kind, ()):
                require(module, "data")

    def entries(self, part: str) -> Iterator[tuple[str, Any]]:
        """Yield each record of a part with its position: one field, or all without a field name."""
        kind = _kind(part)
        if kind == "name":
            yield from _numbered("document", split_documents(load_text(part).text))
        elif kind == "hub":
            yield from _numbered("row", _hub(part, self.field, self.split))
        elif kind == "folder":
            yield from _numbered("row", _saved(part, self.field, self.split))
        elif kind == "json":
            yield from _json(part, self.field)
        elif kind == "table":
            yield from _table(part, self.field)
        elif kind == "parquet":
            yield from _numbered("row", _parquet(part, self.field))
        elif kind == "arrayrecord":
            yield from _numbered("record", _array_record(part, self.field), 0)
        else:
            yield from _numbered("document", split_lines(lambda: _lines(part)))


def documents(source: Source, field: str = "text", split: str = "train") -> Documents:
    """Return the documents of one or more sources; see the table above.

    Args:
      source: a name, path, URL or pattern, or several.
      field: the field of a record that holds the text.
      split: the part of a data set.

    Returns:
      An iterable; each iteration reads the documents again.

    Raises:
      InputError: a missing source; during iteration a source that is empty, not UTF-8, or not in
        its format.

    >>> next(iter(documents("pydoc"))).splitlines()[0]
    'The "assert" statement'
    """
    parts: list[str] = []
    for given in [source] if isinstance(source, str | Path) else source:
        parts += _resolve(given)
    if not parts:
        raise InputError("data source: none given; allowed: at least one")
    return Documents(tuple(parts), field, split)


def records(source: Source, split: str = "train") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the whole records of a source, each with its position (`'chats.jsonl' line 3`).

    Args:
      source: a source for `documents`, but no plain text.
      split: the part of a data set.

    Raises:
      InputError: as for `documents`, or a plain text.
    """
    for part in documents(source, split=split).parts:
        if _kind(part) in ("name", "text"):
            raise _bad(
                part,
                f"is plain text; allowed: records, in files that end with "
                f"{', '.join(sorted(RECORDS))}",
            )
        for where, record in Documents((part,), None, split).entries(part):
            yield f"{part!r} {where}", record


def _resolve(given: str | Path) -> list[str]:
    name = str(given)
    if isinstance(given, str) and (given in NAMES or given.startswith("hf:")):
        return [given]
    path = name if storage.is_remote(name) else os.path.expanduser(name)
    path = os.path.join(".", path) if path in NAMES else path
    if _is_saved(path):
        return [path]
    found = storage.find(path)
    if (
        not found
        and not storage.is_remote(path)
        and not glob.has_magic(path)
        and not os.path.isdir(path)
    ):
        raise no_file(name, Path(path))
    if not found:
        kind = (
            "no file has this name"
            if glob.has_magic(path) or storage.is_remote(path)
            else "a folder"
        )
        allowed = "a file, a pattern such as 'folder/*.jsonl', or a folder that `datasets` saved"
        raise InputError(f"data source: {name!r} given: {kind}; allowed: {allowed}")
    return found


def _is_saved(path: str) -> bool:
    return not glob.has_magic(path) and any(name in storage.sizes(path) for name in _SAVED)


def _kind(part: str) -> str:
    if part in NAMES:
        return "name"
    if part.startswith("hf:"):
        return "hub"
    if (kind := record_kind(part)) is not None:
        return kind
    return "folder" if _is_saved(part) else "text"


def _stamps(part: str) -> list[str]:
    kind = _kind(part)
    if kind == "name":
        return [load_text(part).sha256]
    if kind == "hub":
        return [part]
    if kind == "folder":
        return [storage.stamp(storage.join(part, name)) for name in storage.below(part)]
    return [storage.stamp(part)]


# ------------------------------------------------------------------------------------------ formats


def _lines(part: str) -> Iterator[str]:
    offset = 0
    # no other character of UTF-8 contains the byte of a line feed, so each line can be decoded
    for line in storage.lines(part):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(part, error, offset) from None
        offset += len(line)


def _numbered(kind: str, texts: Iterable[Any], first: int = 1) -> Iterator[tuple[str, Any]]:
    return ((f"{kind} {i}", text) for i, text in enumerate(texts, first))


def _json(part: str, field: str | None) -> Iterator[tuple[str, Any]]:
    """Yield the objects of a file, one per line.

    The first character of a `.json` tells whether it is a list of objects instead.
    """
    first = b""
    if part.lower().removesuffix(".gz").endswith(".json"):
        first = next((line for line in storage.lines(part) if line.strip()), b"")
    if first.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
        records = _loads(
            part,
            "the file",
            b"".join(storage.lines(part, storage.LONGEST)),
            f"a list of {_objects(field)}",
        )
        for i, record in enumerate(records, 1):
            yield f"entry {i}", _field(part, f"entry {i}", record, field)
        return
    for i, line in enumerate(storage.lines(part), 1):
        if line.strip():
            yield f"line {i}", _from_json(part, f"line {i}", line, field)


def _table(part: str, field: str | None) -> Iterator[tuple[str, Any]]:
    """Yield the column of a text table, or its rows as records; its first line is the header."""
    csv.field_size_limit(max(csv.field_size_limit(), _CELL))
    separator = "\t" if ".tsv" in Path(part).name.lower() else ","
    lines = (line if i else line.removeprefix("\ufeff") for i, line in enumerate(_lines(part)))
    reader = csv.reader(lines, delimiter=separator, strict=True)
    try:
        names = next(reader, [])
        if field is not None and field not in names:
            said = (
                "the first line names the columns, and --field or `field` names that of the texts"
            )
            raise InputError(f"{unknown(f'column in {part!r}', field, names)}; {said}")
        column = None if field is None else names.index(field)
        for row in reader:
            where = f"line {reader.line_num}"
            if row and len(row) != len(names):
                raise _bad(
                    part,
                    f"{where} has {len(row)} cells; allowed: {len(names)}, as in the first line",
                )
            if row:
                yield where, dict(zip(names, row, strict=True)) if column is None else row[column]
    except csv.Error as error:
        raise _bad(part, f"line {reader.line_num} is not a row of a table ({error})") from None


def _from_json(part: str, where: str, raw: bytes, field: str | None) -> Any:
    return _field(part, where, _loads(part, where, raw, _objects(field)), field)


def _loads(part: str, where: str, raw: bytes, needed: str) -> Any:
    try:
        schema.check_count(raw)
        return json.loads(raw)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, too deep, too much
        raise _bad(part, f"{where} is not JSON ({error}); allowed: {needed}") from None


def _field(part: str, where: str, record: Any, field: str | None) -> Any:
    """Return a field of a record; without a field name, the record."""
    if not isinstance(record, dict):
        raise _bad(part, f"{where} is a JSON {type(record).__name__}; allowed: {_objects(field)}")
    if field is None:
        return record
    one_of(f"field in {part!r}, {where}", field, record)
    return record[field]


def _parquet(part: str, field: str | None) -> Iterator[Any]:
    parquet = require("pyarrow.parquet", "data")
    what = f"data source: {part!r} is not a complete Parquet file"
    with storage.local(part) as path, storage.reading(path, unpack=False) as raw, border(what):
        _try("table", path, what, field=field)
        file = parquet.ParquetFile(raw)
        if field is not None and field not in file.schema_arrow.names:
            raise unknown(f"field in {part!r}", field, file.schema_arrow.names)
        for rows in file.iter_batches(
            columns=None if field is None else [field], batch_size=_RECORDS
        ):
            yield from (rows if field is None else rows.column(0)).to_pylist()


def _array_record(part: str, field: str | None) -> Iterator[Any]:
    records = require("array_record.python.array_record_module", "data")
    what = f"data source: {part!r} is not a complete ArrayRecord file"
    with storage.local(part) as path, border(what):
        _try("records", path, what)
        reader = records.ArrayRecordReader(path)
        count = reader.num_records()
        for start in range(0, count, _RECORDS):
            for i, raw in enumerate(reader.read(start, min(start + _RECORDS, count)), start):
                yield _from_record(part, f"record {i}", raw, field)
        reader.close()  # raises the error of a file in which no records were found


_tried: set[tuple[Any, ...]] = set()


def _try(kind: str, path: str, what: str, **more: Any) -> None:
    """Read a local file in another process, once.

    Some damaged files would end this process or take all of its memory.
    """
    with storage.naming(path):
        info = os.stat(path)
        key = (kind, os.path.realpath(path), info.st_size, info.st_mtime_ns, *more.values())
        if key not in _tried:
            storage.open_regular(path).close()
            child.tried(kind, path, what, **more)
            _tried.add(key)


def _from_record(part: str, where: str, raw: bytes, field: str | None) -> Any:
    if field is None or raw.lstrip()[:1] == b"{":
        return _from_json(part, where, raw, field)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _bad(part, f"{where} is not UTF-8: {error.reason} at offset {error.start}") from None


def _saved(part: str, field: str | None, split: str) -> Iterator[Any]:
    datasets = require("datasets", "data")
    found = datasets.load_from_disk(part)
    if isinstance(found, dict):
        one_of(f"split of {part!r}", split, found)
        found = found[split]
    yield from _column(part, found, field)


def _hub(part: str, field: str | None, split: str) -> Iterator[Any]:
    datasets = require("datasets", "data")
    _, name, *config = part.split(":")
    try:
        yield from _column(
            part, datasets.load_dataset(name, *config, split=split, streaming=True), field
        )
    except (
        OSError,
        ValueError,
    ) as error:
        # the base classes of the errors of datasets and the hub
        if isinstance(error, InputError):
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise _bad(part, f"could not be fetched ({reason})") from None


def _column(part: str, rows: Any, field: str | None) -> Iterator[Any]:
    for row in rows:
        if field is None:
            yield dict(row)
            continue
        one_of(f"field in {part!r}", field, row)
        yield row[field]


def _objects(field: str | None) -> str:
    return "an object" if field is None else f"an object with {field!r}"


def _bad(part: str, what: str) -> InputError:
    return InputError(f"data source: {part!r} {what}")
