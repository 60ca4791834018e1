"""Documents of a source, whatever its format, one after the other and never the whole of a file.

| source                              | documents                                                                          |
|-------------------------------------|------------------------------------------------------------------------------------|
| a name of `text.NAMES`              | its articles or paragraphs                                                          |
| `*.jsonl`                           | a JSON object a line; the text is in `field`                                        |
| `*.parquet`                         | a row each, in column `field`                                                       |
| `*.arrayrecord`, `*.array_record`   | a record each: text in UTF-8, or a JSON object with `field`; read from local files, |
|                                     | so one behind a URL is first copied to a temporary file                             |
| a folder that `datasets` saved      | a row each, in column `field`; of the part `split` where it has parts               |
| `hf:NAME`, `hf:NAME:CONFIG`         | the same of a data set at the hub, streamed                                         |
| any other file                      | UTF-8, split as `split_documents` does                                              |

Files may be packed (`.gz`), named by patterns (`texts/*.jsonl`, `**`), and stand behind any URL that fsspec knows.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmodel.data import files
from jaxmodel.data.text import NAMES, load_text, no_file, not_utf8, split_documents, split_lines
from jaxmodel.errors import InputError, require, unknown

type Source = str | Path | Sequence[str | Path]

_SAVED = ("dataset_info.json", "dataset_dict.json")  # one of them is in every folder that `datasets` saved
_RECORDS = 256  # are read at a time


@dataclass(frozen=True)
class Documents:
    """Texts that are read anew in each iteration, in the same order; made by `documents`.

    Attributes:
      parts: names and paths, patterns resolved.
      field: where the text of a record is.
      split: the part of a data set.
    """

    parts: tuple[str, ...]
    field: str = "text"
    split: str = "train"

    def __iter__(self) -> Iterator[str]:
        for part in self.parts:
            empty = True
            for text in self._read(part):
                if text is None:  # a null in a column
                    continue
                if not isinstance(text, str):
                    raise _bad(part, f"field {self.field!r} holds {type(text).__name__}; text is needed")
                empty = empty and not text.strip()
                yield text
            if empty:
                raise _bad(part, "holds no text; some text is needed")

    def digest(self) -> str:
        """sha256 that changes with what is read: content of small local files, else their sizes and times (see `files.stamp`).

        Of a data set at the hub it is that of its name: what is published there under the same name is taken for the same.
        """
        stamps = [[_kind(part), *_stamps(part)] for part in self.parts]
        return hashlib.sha256(json.dumps([stamps, self.field, self.split]).encode()).hexdigest()

    def _read(self, part: str) -> Iterator[Any]:
        kind = _kind(part)
        if kind == "name":
            yield from split_documents(load_text(part).text)
        elif kind == "hub":
            yield from _hub(part, self.field, self.split)
        elif kind == "folder":
            yield from _saved(part, self.field, self.split)
        elif kind == "jsonl":
            yield from _jsonl(part, self.field)
        elif kind == "parquet":
            yield from _parquet(part, self.field)
        elif kind == "arrayrecord":
            yield from _array_record(part, self.field)
        else:
            yield from split_lines(lambda: _lines(part))


def documents(source: Source, field: str = "text", split: str = "train") -> Documents:
    """The documents of a source, of several, or of all files that a pattern names; see the table above.

    Args:
      source: a name, path, URL or pattern, or several.
      field: where the text of a record is.
      split: the part of a data set.

    Returns:
      An iterable; each iteration reads anew.

    Raises:
      InputError: a source that is not there; in iterations one that is empty, not UTF-8, or not in its format.

    >>> next(iter(documents("pydoc"))).splitlines()[0]
    'The "assert" statement'
    """
    parts: list[str] = []
    for given in [source] if isinstance(source, str | Path) else source:
        parts += _resolve(given)
    if not parts:
        raise InputError("data source: none given; at least one is needed")
    return Documents(tuple(parts), field, split)


def _resolve(given: str | Path) -> list[str]:
    name = str(given)
    if isinstance(given, str) and (given in NAMES or given.startswith("hf:")):
        return [given]
    path = name if files.is_remote(name) else os.path.expanduser(name)
    path = os.path.join(".", path) if path in NAMES else path
    if _is_saved(path):
        return [path]
    found = files.find(path)
    if not found and not files.is_remote(path) and not glob.has_magic(path) and not os.path.isdir(path):
        raise no_file(name, Path(path))
    if not found:
        kind = "no file has such a name" if glob.has_magic(path) or files.is_remote(path) else "a folder"
        allowed = "a file, a pattern such as 'folder/*.jsonl', or a folder that `datasets` saved"
        raise InputError(f"data source: {name!r} given: {kind}; allowed: {allowed}")
    return found


def _is_saved(path: str) -> bool:
    return not glob.has_magic(path) and any(name in files.sizes(path) for name in _SAVED)


def _kind(part: str) -> str:
    if part in NAMES:
        return "name"
    if part.startswith("hf:"):
        return "hub"
    ending = Path(part.removesuffix(".gz")).suffix.lower()
    kinds = {".jsonl": "jsonl", ".parquet": "parquet", ".arrayrecord": "arrayrecord", ".array_record": "arrayrecord"}
    if ending in kinds:
        return kinds[ending]
    return "folder" if _is_saved(part) else "text"


def _stamps(part: str) -> list[str]:
    kind = _kind(part)
    if kind == "name":
        return [load_text(part).sha256]
    if kind == "hub":
        return [part]
    if kind == "folder":
        return [files.stamp(files.join(part, name)) for name in files.below(part)]
    return [files.stamp(part)]


# ------------------------------------------------------------------------------------------------------- formats


def _lines(part: str) -> Iterator[str]:
    offset = 0
    with files.reading(part) as file:
        for line in file:  # no character of UTF-8 has a line feed among its bytes, so that lines decode one by one
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise not_utf8(part, error, offset) from None
            offset += len(line)


def _jsonl(part: str, field: str) -> Iterator[Any]:
    with files.reading(part) as file:
        for i, line in enumerate(file, 1):
            if line.strip():
                yield _from_json(part, f"line {i}", line, field)


def _from_json(part: str, where: str, raw: bytes, field: str) -> Any:
    try:
        record = json.loads(raw)
    except ValueError as error:  # not UTF-8, or not JSON
        raise _bad(part, f"{where} is not JSON ({error}); an object with {field!r} is needed") from None
    if not isinstance(record, dict):
        raise _bad(part, f"{where} is a JSON {type(record).__name__}; an object with {field!r} is needed")
    if field not in record:
        raise unknown(f"field in {part!r}, {where}", field, record)
    return record[field]


def _parquet(part: str, field: str) -> Iterator[Any]:
    parquet, arrow = require("pyarrow.parquet", "data"), require("pyarrow", "data")
    with files.reading(part) as raw:
        try:
            file = parquet.ParquetFile(raw)
            if field not in file.schema_arrow.names:
                raise unknown(f"field in {part!r}", field, file.schema_arrow.names)
            for rows in file.iter_batches(columns=[field], batch_size=_RECORDS):
                yield from rows.column(0).to_pylist()
        except arrow.ArrowException as error:
            raise _bad(part, f"is no whole Parquet file ({str(error).partition(chr(10))[0]})") from None


def _array_record(part: str, field: str) -> Iterator[Any]:
    records = require("array_record.python.array_record_module", "data")
    if not files.is_remote(part):
        yield from _records(records.ArrayRecordReader(part), part, field)
        return
    with tempfile.TemporaryDirectory() as folder:  # the library reads local files only
        copy = os.path.join(folder, "records")
        files.copy(part, copy)
        yield from _records(records.ArrayRecordReader(copy), part, field)


def _records(reader: Any, part: str, field: str) -> Iterator[Any]:
    try:
        count = reader.num_records()
        for start in range(0, count, _RECORDS):
            for i, raw in enumerate(reader.read(start, min(start + _RECORDS, count)), start):
                yield _from_record(part, f"record {i}", raw, field)
        reader.close()  # tells what was wrong with a file in which it saw no records
    except (RuntimeError, IndexError) as error:
        raise _bad(part, f"is no whole ArrayRecord file ({str(error).partition(chr(10))[0]})") from None


def _from_record(part: str, where: str, raw: bytes, field: str) -> Any:
    if raw.lstrip()[:1] == b"{":
        return _from_json(part, where, raw, field)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _bad(part, f"{where} is not UTF-8: {error.reason} at offset {error.start}") from None


def _saved(part: str, field: str, split: str) -> Iterator[Any]:
    datasets = require("datasets", "data")
    found = datasets.load_from_disk(part)
    if isinstance(found, dict):
        if split not in found:
            raise unknown(f"split of {part!r}", split, found)
        found = found[split]
    yield from _column(part, found, field)


def _hub(part: str, field: str, split: str) -> Iterator[Any]:
    datasets = require("datasets", "data")
    _, name, *config = part.split(":")
    try:
        yield from _column(part, datasets.load_dataset(name, *config, split=split, streaming=True), field)
    except (OSError, ValueError) as error:  # the errors of datasets and of the hub derive from these
        if isinstance(error, InputError):
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise _bad(part, f"could not be fetched ({reason})") from None


def _column(part: str, rows: Any, field: str) -> Iterator[Any]:
    for row in rows:
        if field not in row:
            raise unknown(f"field in {part!r}", field, row)
        yield row[field]


def _bad(part: str, what: str) -> InputError:
    return InputError(f"data source: {part!r} {what}")
