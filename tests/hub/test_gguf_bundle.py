"""Bundles out of GGUF files: equal to those of the folders, or refused in one line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest

from jaxmodel import tree
from jaxmodel.hub import (
    from_pretrained,
    gguf as gguf_files,
)
from tests.hub.conftest import (
    GOLDENS,
    refused,
    write_gguf,
)


def test_gguf_equals_the_folder(tmp_path: Path) -> None:
    bundle = from_pretrained(write_gguf(tmp_path / "a.gguf"))
    folder = from_pretrained(GOLDENS / "llama-untied")
    assert tree.fingerprint(bundle.params) == tree.fingerprint(folder.params)
    assert (
        bundle.card["source"] == "a.gguf"
        and bundle.processor is not None
        and bundle.processor.vocab_size == 97
    )
    epsilon = float(np.float32(1e-2))
    assert bundle.model.config == dataclasses.replace(folder.model.config, norm_eps=epsilon)
    saved = from_pretrained(bundle.save_pretrained(tmp_path / "out"))
    assert (
        saved.model is bundle.model
        and saved.processor is not None
        and saved.processor.encode("abcd") == [93, 94]
    )
    half = from_pretrained(tmp_path / "a.gguf", dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.params)} == {"bfloat16"}


K = "blk.1.attn_k.weight"


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"architecture": "mamba"}, ["general.architecture: 'mamba'", "allowed: llama"]),
        ({"architecture": "gpt2"}, ["general.architecture: 'gpt2'", "allowed: llama"]),
        ({"tensors": {K: None}}, ["a.gguf", f"{K!r} is missing"]),
        (
            {"tensors": {K: np.ones((8, 12), np.float32)}},
            [f"{K!r} has shape [8, 12]", "needs [8, 16]"],
        ),
        (
            {"tensors": {"rope_freqs.weight": np.ones(2, np.float32)}},
            ["'rope_freqs.weight' has shape [2] and values up to 1"],
        ),
        ({"llama.block_count": 1}, ["tensors have no place", "'blk.1."]),
        ({"llama.block_count": None}, ["'llama.block_count' is missing"]),
        ({"llama.rope.scaling.type": "yarn"}, ["rope scaling 'yarn'"]),
        ({"tokenizer.ggml.tokens": None}, ["'llama.vocab_size' is missing"]),
        ({"tokenizer.ggml.model": "bert"}, ["tokenizer.ggml.model: 'bert'"]),
        (
            {"llama.vocab_size": 96},
            [
                "a.gguf: the tokenizer's token '</s>' has id 96, but the embedding has "
                "the ids 0 to 95"
            ],
        ),
    ],
)
def test_bad_gguf(options: dict[str, Any], parts: list[str], tmp_path: Path) -> None:
    refused(write_gguf(tmp_path / "a.gguf", **options), *parts)


@pytest.mark.parametrize("part", [1, 2])
def test_a_model_in_several_gguf_files(part: int, tmp_path: Path) -> None:
    """As gguf-split leaves it: all from any of its parts; a part that is missing or moved
    is named.
    """
    whole = write_gguf(tmp_path / "whole.gguf")
    held = gguf_files.read_gguf(whole)
    names = list(held.tensors)
    for i, some in enumerate((names[:5], names[5:])):
        writer = gguf.GGUFWriter(tmp_path / f"m-0000{i + 1}-of-00002.gguf", "llama")
        if i == 0:
            for key, value in held.metadata.items():
                if (
                    not key.startswith("general.")
                    and isinstance(value, int | float)
                    and not isinstance(value, bool)
                ):
                    (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(
                        key, value
                    )
            writer.add_uint32("llama.vocab_size", 97)
            writer.add_tokenizer_model("gpt2")
            writer.add_token_list(held.metadata["tokenizer.ggml.tokens"])
            writer.add_token_merges(held.metadata["tokenizer.ggml.merges"])
        for key, value in {
            "split.no": i,
            "split.count": 2,
            "split.tensors.count": len(names),
        }.items():
            writer.add_uint16(key, value)
        for name in some:
            writer.add_tensor(name, held.read(name))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    one, other = (tmp_path / f"m-0000{n}-of-00002.gguf" for n in (part, 3 - part))
    found = gguf_files.read_gguf(one)
    assert list(found.tensors) == names and all(
        np.array_equal(found.read(n), held.read(n)) for n in names
    )
    assert found.metadata["llama.embedding_length"] == held.metadata["llama.embedding_length"]
    other.rename(tmp_path / "elsewhere.gguf")
    refused(one, f"is one of 2 parts, and {other.name!r} is not beside it")
    refused(
        tmp_path / "elsewhere.gguf",
        "is one of 2 parts; its name must end with -00001-of-00002.gguf",
    )
