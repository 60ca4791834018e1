"""Documents: the same texts out of every format, local or behind a URL, streamed; bad files are
named.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings, strategies as st

import jaxmodel.data.sources as module
from jaxmodel.data import documents, load_text, split_documents
from jaxmodel.data.sources import Documents
from jaxmodel.errors import InputError

TEXTS = ["One.\nTwo lines.\n\n", "Ünïcode ≠ 文\n\n", "last, with { a brace"]


def as_text(path: Path) -> None:
    path.write_text("".join(TEXTS), encoding="utf-8", newline="")


def as_jsonl(path: Path) -> None:
    rows = "\n\n".join(
        json.dumps({"id": i, "text": text}, ensure_ascii=bool(i)) for i, text in enumerate(TEXTS)
    )
    path.write_bytes(gzip.compress(rows.encode()) if path.suffix == ".gz" else rows.encode())


def as_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pyarrow.table({"id": [0, 1, 2, 3], "text": [*TEXTS, None]}), path, row_group_size=2
    )


def as_records(path: Path) -> None:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for text in (TEXTS[0], json.dumps({"text": TEXTS[1]}), TEXTS[2]):
        writer.write(text.encode())
    writer.close()


FORMATS: dict[str, Callable[[Path], None]] = {
    **{"a.txt": as_text, "a.md": as_text, "a.jsonl": as_jsonl, "a.jsonl.gz": as_jsonl},
    **{"a.parquet": as_parquet, "a.arrayrecord": as_records, "a.array_record": as_records},
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_texts(name: str, tmp_path: Path, memory: str) -> None:
    path = tmp_path / name
    FORMATS[name](path)
    found = documents(path)
    assert list(found) == TEXTS == list(found)  # each iteration reads anew
    fsspec.filesystem("memory").pipe_file(f"{memory}/{name}", path.read_bytes())
    assert list(documents(f"{memory}/{name}")) == TEXTS


def test_what_datasets_saved(tmp_path: Path, memory: str) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": TEXTS})
    rows.save_to_disk(str(tmp_path / "rows"))
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(
        str(tmp_path / "parts")
    )
    assert list(documents(tmp_path / "rows")) == TEXTS == list(documents(tmp_path / "parts"))
    assert list(documents(tmp_path / "parts", split="test")) == TEXTS[1:2]
    fsspec.filesystem("memory").put(str(tmp_path / "rows"), memory, recursive=True)
    assert list(documents(memory)) == TEXTS
    with pytest.raises(
        InputError,
        match="split of .*parts': 'tset' is not known; allowed: test, train .nearest: test",
    ):
        list(documents(tmp_path / "parts", split="tset"))
    with pytest.raises(InputError, match="field in .*: 'body' is not known; allowed: text"):
        list(documents(tmp_path / "rows", field="body"))
    before = documents(tmp_path / "rows").digest()
    datasets.Dataset.from_dict({"text": TEXTS[:2]}).save_to_disk(str(tmp_path / "rows"))
    assert documents(tmp_path / "rows").digest() != before


def test_a_data_set_at_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(*args: Any, **options: Any) -> Any:
        asked.append((args, options))
        if args[0] != "owner/name":
            raise ConnectionError(f"Couldn't reach {args[0]!r} on the Hub\nmore")
        return datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(documents("hf:owner/name:plain", split="validation")) == TEXTS
    assert asked == [(("owner/name", "plain"), {"split": "validation", "streaming": True})]
    with pytest.raises(
        InputError,
        match="'hf:owner/none' could not be fetched .Couldn't reach 'owner/none' on the Hub.$",
    ):
        list(documents("hf:owner/none"))
    assert documents("hf:owner/name").digest() != documents("hf:owner/name", split="test").digest()


def test_tables_and_lists_of_objects(tmp_path: Path) -> None:
    """The texts alone: no commas, quotes and braces of the format, whatever the file is called and
    packed.
    """
    texts = ["a fine day", 'he said "no", twice', "two\nlines\u2028 and more", "Zoë"]
    rows = [{"text": text, "label": i} for i, text in enumerate(texts)]
    (tmp_path / "a.csv").write_text(
        "\ufeff" + "".join(_row(row) for row in [("text", "label"), *((t, 1) for t in texts)])
    )
    (tmp_path / "b.tsv").write_text(
        "label\tBody\n" + "".join(f"1\t{json.dumps(t)}\n" for t in texts[:1] + texts[3:])
    )
    (tmp_path / "c.json").write_text("\n " + json.dumps(rows, indent=1))
    (tmp_path / "d.json").write_text("\n".join(map(json.dumps, rows)))  # lines, as many call .json
    (tmp_path / "e.NDJSON.gz").write_bytes(
        gzip.compress("\n".join(map(json.dumps, [*rows, {"text": None}])).encode())
    )
    for name in ("a.csv", "c.json", "d.json", "e.NDJSON.gz"):
        assert list(documents(tmp_path / name)) == texts, name
    assert list(documents(tmp_path / "b.tsv", field="Body")) == [texts[0], "Zo\\u00eb"]


def _row(cells: tuple[object, ...]) -> str:
    """A row of CSV as RFC 4180 writes it."""
    return ",".join('"' + str(cell).replace('"', '""') + '"' for cell in cells) + "\r\n"


def test_names_patterns_and_lists(tmp_path: Path, memory: str) -> None:
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
        fsspec.filesystem("memory").pipe_file(f"{memory}/deep/{i}.txt", text.encode())
    assert list(documents(tmp_path / "[0-2].txt")) == TEXTS
    (tmp_path / "[0-2].txt").write_text("a file after all")
    assert list(documents(tmp_path / "[0-2].txt")) == ["a file after all"]
    assert list(documents([tmp_path / "1.txt", str(tmp_path / "0.txt")])) == [TEXTS[1], TEXTS[0]]
    assert list(documents(f"{memory}/**/*.txt")) == TEXTS
    pydoc = load_text("pydoc").text
    assert list(documents(["pydoc", tmp_path / "0.txt"])) == [*split_documents(pydoc), TEXTS[0]]


def test_a_file_may_be_called_like_a_known_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("english").write_text("mine")
    assert list(documents(Path("english"))) == ["mine"]
    assert list(documents("english")) != ["mine"]


def by_patterns(text: str) -> list[str]:
    """The rule of `split_documents` in two patterns over a whole text, as an oracle."""
    title = r"(?m)(?:\A|^[ \t\r]*\n)(?= ?= [^=\n]+ = ?\r?\n[ \t\r]*\n|[^\n]*\S[^\n]*\n\*{3,}\r?\n)"
    first = len(text) - len(text.lstrip())
    last = len(text.rstrip())
    for mark in (title, r"\n(?:[ \t\r]*\n)+"):
        if marks := [m.end() for m in re.finditer(mark, text)]:
            starts = [place for place in marks if first < place < last]
            return [text[a:b] for a, b in zip([0, *starts], [*starts, len(text)], strict=True)]
    return [text]


LINES = st.sampled_from(
    [
        " = A = ",
        "= B =",
        "x",
        "***",
        " ***",
        "",
        " ",
        "\t",
        "\x0b",
        " = = ",
        "a\r",
        "\r",
        "***\r",
        "\u2028",
    ]
)


@settings(max_examples=500)
@given(st.lists(LINES, max_size=9), st.sampled_from(["", "\n"]))
def test_lines_are_split_as_whole_texts_are(lines: list[str], end: str) -> None:
    text = "\n".join(lines) + end
    assert split_documents(text) == (by_patterns(text) if text.strip() else [])


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_file_is_never_held_whole(name: str, tmp_path: Path) -> None:
    line = "some words of a text that goes on " * 30
    lines = (
        f"{line}{i}\n\n" if name == "a.txt" else json.dumps({"text": f"{line}{i}"}) + "\n"
        for i in range(8000)
    )
    (tmp_path / name).write_text("".join(lines))
    assert (tmp_path / name).stat().st_size > 8e6
    tracemalloc.start()
    count = sum(1 for _ in documents(tmp_path / name))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 8000 and peak < 2.5e6


def test_a_digest_is_that_of_the_content(
    tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("one")
    before = documents(tmp_path / "a.txt")
    first = before.digest()
    (tmp_path / "b.txt").write_text("one")
    assert documents(tmp_path / "b.txt").digest() == first
    (tmp_path / "a.txt").write_text("two")
    assert before.digest() != first
    assert (
        len({Documents(before.parts, field, split).digest() for field in "ab" for split in "ab"})
        == 4
    )

    url = f"{memory}/a.txt"
    fs = fsspec.filesystem("memory")
    fs.pipe_file(url, b"one")
    first = documents(url).digest()
    assert documents(url).digest() == first
    fs.pipe_file(url, b"two!")
    assert documents(url).digest() != first

    monkeypatch.setattr(module.storage, "_CONTENT_UP_TO", 0)  # a large file: size and time
    first = before.digest()
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    assert before.digest() != first and documents("pydoc").digest() == documents("pydoc").digest()


def whole(path: Path, **options: Any) -> list[str]:
    return list(documents(path, **options))


def test_bad_files_are_named(tmp_path: Path, memory: str) -> None:
    def file(name: str, raw: bytes) -> Path:
        (tmp_path / name).write_bytes(raw)
        return tmp_path / name

    as_parquet(tmp_path / "whole.parquet")
    as_jsonl(tmp_path / "whole.jsonl.gz")
    as_records(tmp_path / "whole.arrayrecord")
    records = (tmp_path / "whole.arrayrecord").read_bytes()
    (tmp_path / "folder").mkdir()
    for call, message in [
        (lambda: whole(file("empty.txt", b"")), "data source: .*empty.txt' holds no text"),
        (lambda: whole(file("blank.txt", b" \n\n")), "blank.txt' holds no text"),
        (lambda: whole(file("empty.jsonl", b"\n")), "empty.jsonl' holds no text"),
        (
            lambda: whole(file("l.txt", b"fine\ngr\xfc\xdfe")),
            "l.txt' is not UTF-8: byte 0xfc at offset 7 .invalid start byte",
        ),
        (
            lambda: whole(file("cut.txt", "ü".encode()[:1])),
            "cut.txt' is not UTF-8: byte 0xc3 at offset 0 .unexpected end",
        ),
        (
            lambda: whole(file("a.jsonl", b'{"text": "x"}\n{"text":')),
            "a.jsonl' line 2 is not JSON .Expecting value",
        ),
        (
            lambda: whole(file("b.jsonl", b"[1]")),
            "b.jsonl' line 1 is a JSON list; allowed: an object with 'text'",
        ),
        (
            lambda: whole(file("c.jsonl", b'{"texts": "x"}')),
            "field in .*c.jsonl', line 1: 'text' is not known; allowed: texts",
        ),
        (
            lambda: whole(file("d.jsonl", b'{"text": 3}')),
            "d.jsonl' line 1: field 'text' holds int; allowed: text",
        ),
        (lambda: whole(file("e.jsonl", b'{"text": "\xff"}')), "e.jsonl' line 1 is not JSON"),
        (lambda: whole(file("x.parquet", b"rubbish")), "x.parquet' is not a complete Parquet file"),
        (
            lambda: whole(file("y.parquet", (tmp_path / "whole.parquet").read_bytes()[:-9])),
            "y.parquet' is not a complete Parquet file",
        ),
        (
            lambda: whole(tmp_path / "whole.parquet", field="body"),
            "field in .*: 'body' is not known; allowed: id, text",
        ),
        (
            lambda: whole(file("z.jsonl.gz", (tmp_path / "whole.jsonl.gz").read_bytes()[:-9])),
            "z.jsonl.gz' cannot be read",
        ),
        (
            lambda: whole(file("z.gz", b"rubbish")),
            "z.gz' cannot be read or written: Not a gzipped file",
        ),
        (
            lambda: whole(file("a.arrayrecord", b"rubbish")),
            "a.arrayrecord' is not a complete ArrayRecord file: ArrayRecord file sh",
        ),
        (
            lambda: whole(file("b.arrayrecord", records[:120] + bytes(8) + records[128:])),
            "b.arrayrecord' is not a complete",
        ),
        (lambda: whole(file("c.arrayrecord", records[:-1000])), "c.arrayrecord' is not a complete"),
        (
            lambda: documents(tmp_path / "wohle.parquet"),
            "wohle.parquet' is neither a file nor.*nearest: whole.parquet",
        ),
        (
            lambda: whole(file("f.json", b'[{"text": "x"}, 3]')),
            "f.json' entry 2 is a JSON int; allowed: an object with 'text'",
        ),
        (lambda: whole(file("g.json", b'[{"text": "x"}')), "g.json' the file is not JSON"),
        (
            lambda: whole(file("h.csv", b"txt,label\na,1\n")),
            "column in .*h.csv': 'text' is not known; allowed: label, txt",
        ),
        (
            lambda: whole(file("i.csv", b'text,label\na,1\n"b\n\nc",1\nd\n')),
            "i.csv' line 6 has 1 cells; allowed: 2",
        ),
        (
            lambda: whole(file("j.tsv", b'text\tlabel\n"a" b\t1\n')),
            "j.tsv' line 2 is not a row of a table",
        ),
        (
            lambda: whole(file("k.csv", b"text\ngr\xfcn\n")),
            "k.csv' is not UTF-8: byte 0xfc at offset 7",
        ),
        (
            lambda: load_text(file("l.csv", b"text\na\n")),
            "l.csv' has the name of a file of records; allowed: one UTF-8 text",
        ),
        (
            lambda: whole(
                file("m.ndjson", rb'{"text": "a"}' + b"\n\n" + rb'{"text": "cut \ud83d"}')
            ),
            r"line 3 has half of",
        ),
        (
            lambda: whole(file("n.json", rb'[{"text": "a\udc00"}]')),
            r"entry 1 has half of a surrogate pair .*dc00. at character 1",
        ),
        (
            lambda: documents(tmp_path / "*.csx"),
            "csx' given: no file has this name; allowed: a file, a pattern such as",
        ),
        (
            lambda: documents(tmp_path / "folder"),
            "folder' given: a folder; allowed: a file, a pattern",
        ),
        (lambda: documents(f"{memory}/a.txt"), "/a.txt' given: no file has this name"),
        (
            lambda: documents("nope://a.txt"),
            "data: 'nope://a.txt' given; allowed: local files, and URLs of https://, gs://, s3:",
        ),
        (lambda: documents([]), "data source: none given"),
    ]:
        with pytest.raises(InputError, match=message):
            call()


def test_records_that_are_no_text(tmp_path: Path) -> None:
    writer = ArrayRecordWriter(str(tmp_path / "a.arrayrecord"), "group_size:1")
    writer.write(b"fine")
    writer.write(b"gr\xfcn")
    writer.close()
    found = iter(documents(tmp_path / "a.arrayrecord"))
    assert next(found) == "fine"
    with pytest.raises(
        InputError, match="a.arrayrecord' record 1 is not UTF-8: invalid start byte at offset 2"
    ):
        next(found)


def test_a_text_behind_a_url(memory: str) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file(f"{memory}/a.txt", "grün".encode())
    fs.pipe_file(f"{memory}/b.txt", b"\xfc")
    text = load_text(f"{memory}/a.txt")
    assert (text.text, text.origin) == ("grün", f"{memory}/a.txt")
    with pytest.raises(InputError, match="b.txt' is not UTF-8: byte 0xfc at offset 0"):
        load_text(f"{memory}/b.txt")
    with pytest.raises(InputError, match="none.txt' cannot be read"):
        load_text(f"{memory}/none.txt")
