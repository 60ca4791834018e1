"""Data that somebody prepared: other kinds of files and addresses, texts without end, changed
shards.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxmodel import child, limits, schema
from jaxmodel.data import ImageFolder, Shards, documents, load_text, storage
from jaxmodel.errors import InputError
from jaxmodel.hub import decode
from jaxmodel.hub.images import ImageProcessor, resize


@pytest.mark.parametrize(
    "address",
    [
        *(
            "file:///etc/hostname",
            "memory://a/b.txt",
            "ftp://127.0.0.1/a.txt",
            "http://127.0.0.1/a.txt",
            "local:///etc/hostname",
        ),
        *(
            "zip://a.txt::/etc/hostname",
            "zip://a.txt::https://127.0.0.1/a.zip",
            "simplecache::file:///etc/hostname",
        ),
        *(
            "reference://::memory://a.txt",
            "https://127.0.0.1/a.txt::file:///etc/hostname",
            "github://a:b@/c",
            "data://,x",
        ),
    ],
)
def test_other_addresses_are_not_opened(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec.core

    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda *_: pytest.fail("opened"))
    for read in (load_text, documents):
        with pytest.raises(
            InputError, match=r"allowed: local files, and URLs of https://, gs://, s3://, hf://$"
        ):
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
    assert storage.below(str(tmp_path)) == ["a/x.txt"]


def packed(piece: bytes, times: int) -> bytes:
    """What gzip makes of a piece so many times over, without the whole ever being there."""
    work = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join([*(work.compress(piece) for _ in range(times)), work.flush()])


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
def test_a_text_without_end(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "LONGEST", 2**20)
    file = tmp_path / name
    for piece, says in (
        (b"x" * 2**16, "a line is longer than 1,048,576 bytes"),
        (b"\n" * 2**16, "it ends in too much white space"),
    ):
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
        with pytest.raises(InputError, match="has changed since it was written .another sha256"):
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
    with pytest.raises(InputError, match="is missing or incomplete"):
        Shards(shards.folder).doc(0)


def test_gzip_is_read_as_before(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n\n{"text": "two"}'))
    assert list(documents(tmp_path / "a.jsonl.gz")) == ["one", "two"]


def test_json_of_many_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty list takes three bytes in a file, and 64 in memory."""
    monkeypatch.setattr(schema, "MOST_OBJECTS", 1000)
    raw = b'{"text": [' + b"[]," * 1000 + b"[]]}"
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(InputError, match="is not JSON .more than 1,000 lists and objects"):
            list(documents(tmp_path / name))
    with pytest.raises(InputError, match="a.json: not JSON: more than 1,000 lists and objects"):
        schema.parse(raw, "a.json")


def test_a_table_that_unpacks_to_more_than_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 rows of 2^24 characters are 1 GiB, and a few thousand bytes of a file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    column = pa.DictionaryArray.from_arrays(pa.array([0] * 64), pa.array(["a" * 2**24]))
    options: Any = {
        "compression": "zstd",
        "dictionary_pagesize_limit": 2**30,
        "store_schema": False,
    }
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", **options)
    monkeypatch.setattr(
        child, "READER", child.Child(Path(child.__file__).with_name("child_reader.py"))
    )
    monkeypatch.setattr(limits, "_now", limits.Limits(file_memory=2**30))
    with pytest.raises(
        InputError,
        match=r"a.parquet' is not a complete Parquet file: .* 20 seconds and 1 GiB .*file_seconds",
    ):
        list(documents(tmp_path / "a.parquet"))
    child.READER.end()


def damaged(path: Path, change: str) -> None:
    raw = bytearray(path.read_bytes())
    if change == "cut":
        raw = raw[: len(raw) // 2]
    elif change == "flipped":
        for i in range(0, len(raw), 97):
            raw[i] ^= 0x55
    elif change == "counts":  # what stands at the end of the file of where its parts are
        at = len(raw) - (64 if path.suffix == ".parquet" else 2**16)
        raw[at : at + 64] = b"\xff" * 64
    path.write_bytes(raw)


@pytest.mark.parametrize("change", ["cut", "flipped", "counts"])
@pytest.mark.parametrize("kind", ["arrayrecord", "parquet"])
def test_damaged_files_of_records(kind: str, change: str, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from array_record.python.array_record_module import ArrayRecordWriter

    path = tmp_path / f"a.{kind}"
    texts = [f"text {i}" for i in range(500)]
    if kind == "parquet":
        pq.write_table(pa.table({"text": texts}), path)
    else:
        writer = ArrayRecordWriter(str(path), "group_size:10")
        for text in texts:
            writer.write(text.encode())
        writer.close()
    assert list(documents(path)) == texts
    damaged(path, change)
    with pytest.raises(InputError, match=f"a.{kind}' ") as error:
        list(documents(path))
    assert "\n" not in str(error.value)


KINDS = {"PNG": "png", "GIF": "gif", "TIFF": "tif", "WEBP": "webp", "JPEG": "jpg", "BMP": "bmp"}


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_many_pixels(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (60, 40), "red").save(tmp_path / name / f"1.{KINDS[kind]}")
    images = ImageFolder(tmp_path, (4, 4))
    assert images.take(np.arange(2))["pixels"].shape == (2, 4, 4, 3)
    monkeypatch.setattr(limits, "_now", limits.Limits(pixels=2399))
    with pytest.raises(InputError, match=r"has 60 x 40 pixels; allowed: 2,399.*pixels=.*raises it"):
        images.take(np.arange(2))


def test_a_small_file_of_13_000_by_13_000(tmp_path: Path) -> None:
    """Pillow would warn, and take two thirds of a gigabyte."""
    from PIL import Image

    Image.new("1", (13_000, 13_000)).save(tmp_path / "a.png")
    with (
        (tmp_path / "a.png").open("rb") as file,
        pytest.raises(InputError, match="x has 13,000 x 13,000 pixels; allowed: 67,"),
    ):
        decode.decode(file, 3, "x")
    assert Image.MAX_IMAGE_PIXELS is not None  # for others as it was


@pytest.mark.parametrize(
    "processor",
    [
        ImageProcessor(2**20),
        ImageProcessor((2**20, 2**10)),
        ImageProcessor("cover", (2**14, 2**14)),
    ],
)
def test_sizes_that_a_processor_claims(processor: ImageProcessor) -> None:
    with pytest.raises(InputError, match=r"images: 4 x 6 pixels would become .*pixels=.*raises it"):
        processor([np.zeros((4, 6, 3), np.uint8)])


def test_a_line_of_pixels() -> None:
    with pytest.raises(
        InputError, match="images: 1 x 100,000 pixels would become 224 x 22,400,000"
    ):
        ImageProcessor(224)([np.zeros((1, 100_000), np.uint8)])


def test_pieces_of_a_resized_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image is resized some lines at a time, which changes nothing."""
    from jaxmodel.hub import images

    pixels = np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)
    whole = resize(pixels, (11, 70), "bicubic")
    monkeypatch.setattr(images, "_AT_ONCE", 200)
    assert np.array_equal(resize(pixels, (11, 70), "bicubic"), whole)
