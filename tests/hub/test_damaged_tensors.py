"""Files of tensors by somebody else: each damage gives one line, by whichever reader it comes."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmodel import hub
from jaxmodel.errors import InputError
from jaxmodel.hub.gguf import read_gguf
from tests.hub.conftest import GOLDENS, write_gguf

FOLDER = GOLDENS / "llama-untied"
ADAPTERS = GOLDENS / "adapters" / "llama"


def parts(file: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a file of safetensors, by its published layout."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def whole(header: Any, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def last(header: dict[str, Any]) -> dict[str, Any]:
    """The entry whose data come last: no other entry is moved by what is done to it."""
    return max(
        (entry for name, entry in header.items() if name != "__metadata__"),
        key=lambda entry: entry["data_offsets"],
    )


def entry(**change: Any) -> Callable[[dict[str, Any], bytes], bytes]:
    def damage(header: dict[str, Any], data: bytes) -> bytes:
        last(header).update(change)
        return whole(header, data)

    return damage


def moved(by: int) -> Callable[[dict[str, Any], bytes], bytes]:
    """The last tensor begins so many bytes later (or earlier, over the one before)."""

    def damage(header: dict[str, Any], data: bytes) -> bytes:
        begin, end = last(header)["data_offsets"]
        last(header)["data_offsets"] = [begin + by, end + by]
        return whole(header, data + bytes(max(by, 0)))

    return damage


def resized(shape: list[int]) -> Callable[[dict[str, Any], bytes], bytes]:
    """The last tensor has another shape and as many bytes as that takes."""

    def damage(header: dict[str, Any], data: bytes) -> bytes:
        begin, _ = last(header)["data_offsets"]
        size = 4 * int(np.prod(shape, dtype=object))
        last(header).update(shape=shape, data_offsets=[begin, begin + size])
        return whole(header, data[:begin] + bytes(size))

    return damage


DAMAGES: dict[str, Callable[[dict[str, Any], bytes], bytes]] = {
    "nothing": lambda header, data: b"",
    "seven bytes": lambda header, data: bytes(7),
    "header of no bytes": lambda header, data: whole(header, data, 0),
    "header one byte short": lambda header, data: whole(header, data, len(json.dumps(header)) - 1),
    "header one byte long": lambda header, data: whole(header, data, len(json.dumps(header)) + 1),
    "header longer than the file": lambda header, data: whole(header, data, 2**30),
    "header of 2^64 bytes": lambda header, data: whole(header, data, 2**64 - 1),
    "header is a list": lambda header, data: whole([header], data),
    "header is no JSON": lambda header, data: whole(b"{" * 100, data),
    "header is not UTF-8": lambda header, data: whole(b'{"\xff": 1}', data),
    "header is deep": lambda header, data: whole(b'{"a":' * 10**5, data),
    "metadata is no text": lambda header, data: whole({**header, "__metadata__": {"a": [1]}}, data),
    "data cut": lambda header, data: whole(header, data[:-1]),
    "more data": lambda header, data: whole(header, data + b"\0"),
    "a tensor over another": moved(-4),
    "a gap": moved(4),
    "offsets backwards": lambda header, data: entry(
        data_offsets=last(header)["data_offsets"][::-1]
    )(header, data),
    "offsets below 0": entry(data_offsets=[-8, 0]),
    "offsets beyond 2^63": entry(data_offsets=[2**63, 2**63 + 8]),
    "no shape": lambda header, data: (last(header).pop("shape"), whole(header, data))[1],
    "shape of other numbers": entry(shape=[2.5]),
    "shape below 0": entry(shape=[-1, -1]),
    "shape of 2^80": entry(shape=[2**40, 2**40]),
    "shape of another size": entry(shape=[3]),
    "shape of a hundred axes": resized([1] * 100),
    "shape of nothing": resized([0]),
    "shape of nothing and 2^62": resized([2**62, 0, 2**62]),
    "dtype of no name": entry(dtype="Q9"),
    "dtype is a number": entry(dtype=32),
    "dtype that is not read": lambda header, data: entry(
        dtype="F8_E4M3", shape=[np.subtract(*last(header)["data_offsets"][::-1]).item()]
    )(header, data),
    "dtype of half a byte": lambda header, data: entry(
        dtype="F4", shape=[2 * np.subtract(*last(header)["data_offsets"][::-1]).item()]
    )(header, data),
    "dtype of complex numbers": lambda header, data: entry(
        dtype="C64", shape=[np.subtract(*last(header)["data_offsets"][::-1]).item() // 8]
    )(header, data),
}


def line(act: Callable[[], Any], *words: str) -> None:
    with pytest.raises(InputError) as caught:
        act()
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text


@pytest.mark.parametrize("damage", DAMAGES)
def test_safetensors(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    shutil.copytree(FOLDER, folder)
    file = folder / "model.safetensors"
    file.write_bytes(DAMAGES[damage](*parts(file)))
    line(lambda: hub.from_pretrained(folder), str(folder))


@pytest.mark.parametrize("damage", DAMAGES)
def test_adapters(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    shutil.copytree(ADAPTERS, folder)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(DAMAGES[damage](*parts(file)))
    base = hub.from_pretrained(FOLDER)
    line(lambda: hub.add_adapters(base, folder), str(folder))


def test_safetensors_cut_anywhere(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    shutil.copytree(FOLDER, folder)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    for size in np.linspace(0, len(content) - 1, 40).astype(int).tolist():
        file.write_bytes(content[:size])
        line(lambda: hub.from_pretrained(folder), "not a complete safetensors file")


def test_names_of_tensors_with_line_ends(tmp_path: Path) -> None:
    """They stand in the message, but do not break it."""
    folder = tmp_path / "weights"
    shutil.copytree(FOLDER, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "a\nb\x1b[2J": np.ones(2, np.float32)}, folder / "model.safetensors")
    line(lambda: hub.from_pretrained(folder), r"a\nb\x1b[2J")


def test_a_tensor_in_two_files_is_read_where_the_index_says(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(GOLDENS / "llama-tied", folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    place = index["weight_map"]["model.norm.weight"]
    other = next(name for name in index["weight_map"].values() if name != place)
    before = hub.from_pretrained(folder).params["norm"]["weight"]
    wrong = {"model.norm.weight": np.full(before.shape, 7, np.float32)}
    save_file({**load_file(folder / other), **wrong}, folder / other)
    after = hub.from_pretrained(folder).params["norm"]["weight"]
    np.testing.assert_array_equal(after, before)
    del index["weight_map"]["model.norm.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    line(lambda: hub.from_pretrained(folder), "several files have the tensor 'model.norm.weight'")


# --------------------------------------------------------------------------------------------- GGUF


def text(words: str) -> bytes:
    return struct.pack("<Q", len(words)) + words.encode()


def gguf_of(fields: bytes, count: int, tensors: bytes = b"", tensor_count: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensor_count, count) + fields + tensors


def info(name: str, shape: list[int], kind: int, offset: int) -> bytes:
    """What a GGUF file says about a tensor, by the published layout."""
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def data(tensors: list[bytes], size: int = 64) -> bytes:
    """A file of tensors alone, with so many bytes of data behind the padding."""
    head = gguf_of(b"", 0, b"".join(tensors), len(tensors))
    return head + bytes(-len(head) % 32 + size)


ARRAY = struct.pack("<I", 9)
GGUF_DAMAGES = {
    "2^60 keys": gguf_of(b"", 2**60),
    "2^60 tensors": gguf_of(b"", 0, b"", 2**60),
    "a key of 2^60 letters": gguf_of(struct.pack("<Q", 2**60) + b"abc", 1),
    "a text of 2^60 letters": gguf_of(text("a") + struct.pack("<IQ", 8, 2**60), 1),
    "2^60 numbers": gguf_of(text("a") + ARRAY + struct.pack("<IQ", 4, 2**60), 1),
    "2^60 texts": gguf_of(text("a") + ARRAY + struct.pack("<IQ", 8, 2**60), 1),
    "arrays in arrays": gguf_of(
        text("a") + ARRAY + struct.pack("<IQ", 9, 1) * 5000 + struct.pack("<IQ", 4, 0), 1
    ),
    "a value of kind 99": gguf_of(text("a") + struct.pack("<II", 99, 0), 1),
    "numbers of kind 99": gguf_of(text("a") + ARRAY + struct.pack("<IQ", 99, 1), 1),
    "a key twice": gguf_of((text("a") + struct.pack("<II", 4, 0)) * 2, 2),
    "alignment of 0": gguf_of(text("general.alignment") + struct.pack("<II", 4, 0), 1),
    "alignment of 3": gguf_of(text("general.alignment") + struct.pack("<II", 4, 3), 1),
    "alignment is a text": gguf_of(text("general.alignment") + struct.pack("<I", 8) + text("x"), 1),
    "2^32 axes": gguf_of(b"", 0, text("w") + struct.pack("<I", 2**32 - 1), 1),
    "a hundred axes": data([info("w", [1] * 100, 0, 0)]),
    "a tensor of kind 99": data([info("w", [8], 99, 0)]),
    "a tensor beyond the end": data([info("w", [8], 0, 2**40)]),
    "a tensor at 2^64": data([info("w", [8], 0, 2**64 - 32)]),
    "a tensor of 2^50 numbers": data([info("w", [2**50], 0, 0)]),
    "two tensors of one name": data([info("w", [8], 0, 0), info("w", [8], 0, 32)]),
    "two tensors in one place": data([info("v", [8], 0, 0), info("w", [8], 0, 0)]),
    "a tensor over half of another": data([info("v", [16], 0, 0), info("w", [8], 0, 32)]),
    "a tensor of no numbers": data([info("v", [0], 0, 0)]),
    "half a group": data([info("v", [16], 2, 0)]),
}


@pytest.mark.parametrize("damage", GGUF_DAMAGES)
def test_gguf(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(GGUF_DAMAGES[damage])
    line(lambda: read_gguf(path), str(path))


def test_gguf_of_the_same_layout_is_read(tmp_path: Path) -> None:
    """So the files above are refused for what is wrong with them."""
    path = tmp_path / "model.gguf"
    path.write_bytes(data([info("v", [2, 4], 0, 0), info("w", [8], 0, 32)]))
    assert {name: entry.shape for name, entry in read_gguf(path).tensors.items()} == {
        "v": (4, 2),
        "w": (8,),
    }
    np.testing.assert_array_equal(read_gguf(path).read("v"), np.zeros((4, 2), np.float32))


@pytest.mark.parametrize("kind", ["I8", "I32", "F64"])
def test_gguf_weights_of_other_dtypes(kind: str, tmp_path: Path) -> None:
    dtype = {"I8": np.int8, "I32": np.int32, "F64": np.float64}[kind]
    path = write_gguf(tmp_path / "model.gguf", tensors={"output_norm.weight": np.ones(16, dtype)})
    assert kind in gguf.GGMLQuantizationType.__members__
    line(lambda: hub.from_pretrained(path), "output_norm.weight", kind, "allowed:")
