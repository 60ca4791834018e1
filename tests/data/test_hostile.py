"""Data that somebody prepared: other kinds of files and addresses, texts without end, changed shards."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxmodel.data import Shards, documents, files, load_text
from jaxmodel.errors import InputError


@pytest.mark.parametrize(
    "address",
    [
        *("file:///etc/hostname", "memory://a/b.txt", "ftp://127.0.0.1/a.txt", "http://127.0.0.1/a.txt", "local:///etc/hostname"),
        *("zip://a.txt::/etc/hostname", "zip://a.txt::https://127.0.0.1/a.zip", "simplecache::file:///etc/hostname"),
        *("reference://::memory://a.txt", "https://127.0.0.1/a.txt::file:///etc/hostname", "github://a:b@/c", "data://,x"),
    ],
)
def test_other_addresses_are_not_opened(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec.core

    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda *_: pytest.fail("opened"))
    for read in (load_text, documents):
        with pytest.raises(InputError, match=r"allowed: local files, and URLs of https://, gs://, s3://, hf://$"):
            read(address)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.txt.gz", "a.arrayrecord"])
def test_only_regular_files(name: str, tmp_path: Path) -> None:
    """A pipe would be waited for, and /proc holds what is no file."""
    os.mkfifo(tmp_path / name)
    for path in (tmp_path / name, "/proc/self/environ", "/dev/zero"):
        with pytest.raises(InputError):
            list(documents(str(path)))
        with pytest.raises(InputError):
            load_text(str(path))


def test_folders_that_lead_back(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("x")
    for name in ("up", "up2", "a/up"):
        (tmp_path / name).symlink_to(tmp_path)
    assert files.below(str(tmp_path)) == ["a/x.txt"]


def packed(piece: bytes, times: int) -> bytes:
    """What gzip makes of a piece so many times over, without the whole ever being there."""
    work = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join([*(work.compress(piece) for _ in range(times)), work.flush()])


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
def test_a_text_without_end(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LONGEST", 2**20)
    file = tmp_path / name
    for piece, says in ((b"x" * 2**16, "a line is longer than 1,048,576 bytes"), (b"\n" * 2**16, "it goes on with white space")):
        file.write_bytes(packed(piece, 64))
        with pytest.raises(InputError, match=says):
            list(documents(file))


def test_nested_json_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ' + "[" * 100_000 + "\n")
    with pytest.raises(InputError, match="line 1 is not JSON"):
        list(documents(tmp_path / "a.jsonl"))


def test_flipped_bytes_in_a_shard(shards_of: Any) -> None:
    """Sizes are right, so that only digests tell."""
    for kind in ("tokens_file", "offsets_file"):
        shards = shards_of(["one text", "another"])
        assert bytes(shards.doc(0)[:-1].astype(np.uint8)) == b"one text"
        path = Path(shards.folder, shards.index["shards"][0][kind])
        raw = bytearray(path.read_bytes())
        raw[3] ^= 1
        path.write_bytes(raw)
        with pytest.raises(InputError, match="is not what was written .another sha256"):
            Shards(shards.folder).doc(0)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "<f8"},
        {"dtype": "O"},
        {"tokens": 10**30},
        {"documents": 1},
        {"shards": []},
        {"vocab": "257"},
        {
            "shards": [
                {
                    "tokens_file": "../../etc/passwd",
                    "offsets_file": "b",
                    "documents": 2,
                    "tokens": 17,
                    "tokens_sha256": "",
                    "offsets_sha256": "",
                }
            ]
        },
    ],
)
def test_an_index_that_was_changed(change: dict[str, Any], shards_of: Any) -> None:
    shards = shards_of(["one text", "another"])
    file = Path(shards.folder, "index.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(InputError, match="there is no whole"):
        Shards(shards.folder).doc(0)


def test_gzip_is_read_as_before(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n\n{"text": "two"}'))
    assert list(documents(tmp_path / "a.jsonl.gz")) == ["one", "two"]
