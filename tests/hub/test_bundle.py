"""Bundles on disk: what is saved comes back bit for bit, what is wrong is named, what stood there
survives.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxmodel import compress, tree
from jaxmodel.hub import (
    from_pretrained,
    gguf as gguf_files,
    train_bpe,
)
from jaxmodel.models import families
from jaxmodel.ops import Policy
from tests.hub.conftest import (
    GOLDENS,
    KINDS,
    TOKENS,
    VARIANTS,
    plain,
    refused,
    variant,
    write_gguf,
)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind: str, name: str, tmp_path: Path) -> None:
    bundle = variant(kind, name)
    back = from_pretrained(bundle.save_pretrained(tmp_path / "out"))
    assert tree.fingerprint(back.params) == tree.fingerprint(bundle.params)
    assert jax.tree.structure(back.params) == jax.tree.structure(
        bundle.params
    )  # the same segments, too
    assert back.model is bundle.model  # equal config and policy, so nothing is compiled again
    assert back.card == bundle.card and back.processor is None
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(back.params))
    if name == "mixed":
        assert len(bundle.params["blocks"]) == 3
        apply = jax.jit(bundle.model.apply)
        np.testing.assert_array_equal(
            apply(back.params, TOKENS).logits, apply(bundle.params, TOKENS).logits
        )


def test_parts_of_gpt2s_joined_tensor(tmp_path: Path) -> None:
    """Joined while all are plain and alike; by name where one is compressed or of another dtype."""
    bundle = variant("gpt2", "mixed")
    blocks = {**bundle.params["blocks"]}
    blocks["2"] = {**blocks["2"], "attn": {**blocks["2"]["attn"]}}
    blocks["2"]["attn"]["v_bias"] = blocks["2"]["attn"]["v_bias"].astype(jnp.bfloat16)
    bundle = dataclasses.replace(bundle, params={**bundle.params, "blocks": blocks})
    tensors = load_file(bundle.save_pretrained(tmp_path / "out") / "model.safetensors")
    assert tensors["transformer.h.0.attn.c_attn.bias"].shape == (96,)
    attn = {key.removeprefix("transformer.h.") for key in tensors if "c_attn" in key}
    assert attn == {
        *(
            "0.attn.c_attn.q.weight_packed",
            "0.attn.c_attn.q.weight_scale",
            "0.attn.c_attn.k.weight",
        ),
        *("0.attn.c_attn.v.weight", "0.attn.c_attn.bias", "1.attn.c_attn.bias"),
        *(f"1.attn.c_attn.{part}.weight_{name}" for part in "qk" for name in ("mask", "values")),
        *(f"1.attn.c_attn.v.weight_{name}" for name in ("packed", "scale", "minimum")),
        *(f"2.attn.c_attn.{part}.weight_{name}" for part in "qkv" for name in ("packed", "scale")),
        *(f"2.attn.c_attn.{part}.bias" for part in "qkv"),
    }
    assert tree.fingerprint(from_pretrained(tmp_path / "out").params) == tree.fingerprint(
        bundle.params
    )


@pytest.mark.parametrize("name", ["plain", "bf16"])
def test_plain_folders_have_the_names_of_transformers(name: str, tmp_path: Path) -> None:
    for kind, golden in (("gpt2", "gpt2-a"), ("llama", "llama-untied")):
        tensors = load_file(
            variant(kind, name).save_pretrained(tmp_path / kind) / "model.safetensors"
        )
        theirs = load_file(GOLDENS / golden / "model.safetensors")
        assert {key for key in tensors if ".2." not in key} == set(theirs)  # theirs has two layers
        assert {value.dtype.name for value in tensors.values()} == {
            "float32" if name == "plain" else "bfloat16"
        }


def test_saving_what_transformers_wrote_changes_no_tensor(tmp_path: Path) -> None:
    for golden in ("gpt2-a", "llama-untied"):
        bundle = from_pretrained(GOLDENS / golden)
        ours = load_file(bundle.save_pretrained(tmp_path / golden) / "model.safetensors")
        theirs = load_file(GOLDENS / golden / "model.safetensors")
        assert set(ours) == set(theirs) and all(
            np.array_equal(ours[key], theirs[key]) for key in theirs
        )
        config = json.loads((tmp_path / golden / "config.json").read_text())
        given = json.loads((GOLDENS / golden / "config.json").read_text())
        same = {key for key in config if key in given and config[key] == given[key]}
        assert set(config) - same <= {"n_ctx", "rope_theta", "bos_token_id", "eos_token_id"}


def test_policy_and_dtype(tmp_path: Path) -> None:
    policy = Policy(
        compute_dtype="bfloat16",
        activation_dtype="bfloat16",
        cache_dtype="float16",
        remat="dots",
        axes=(("B", "data"),),
    )
    bundle = plain("llama")
    model = families()["llama"].model(bundle.model.config, policy)
    folder = dataclasses.replace(bundle, model=model).save_pretrained(tmp_path / "out")
    assert from_pretrained(folder).model.policy == dataclasses.replace(
        policy, axes=()
    )  # axes belong to a mesh
    assert from_pretrained(folder, policy=Policy()).model.policy == Policy()
    half = from_pretrained(folder, dtype="float16")
    assert half.model.policy == dataclasses.replace(policy, axes=(), compute_dtype="float16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.params)} == {"float16"}
    compressed = from_pretrained(
        variant("llama", "int4-rtn").save_pretrained(tmp_path / "int4"), dtype="bfloat16"
    )
    assert compressed.params["embed"].packed.dtype == jnp.int8  # only plain leaves are cast
    assert compressed.params["norm"]["weight"].dtype == jnp.bfloat16


def test_tokenizer_and_where_a_text_ends(tmp_path: Path) -> None:
    processor = train_bpe(["a newer text, and the newest"], vocab_size=260)
    folder = dataclasses.replace(plain("gpt2", vocab=260), processor=processor).save_pretrained(
        tmp_path / "out"
    )
    back = from_pretrained(folder).processor
    assert back is not None and back.encode("a newer one") == processor.encode("a newer one")
    assert (back.eos_ids, back.bos_id, back.pad_id) == ((0,), 0, 0)
    config = json.loads(
        (folder / "config.json").read_text()
    )  # else transformers would end GPT-2's texts at 50256
    assert [config[f"{key}_token_id"] for key in ("bos", "eos", "pad")] == [0, 0, 0]


def test_equal_bundles_give_equal_files(tmp_path: Path) -> None:
    one, two = (variant("gpt2", "mixed").save_pretrained(tmp_path / name) for name in "ab")
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {
        p.name: p.read_bytes() for p in two.iterdir()
    }


@pytest.mark.parametrize("recipe", ["int4-rtn", "magnitude(0.5) | rtn(8)"])
def test_file_size_is_that_of_the_buffers(recipe: str, tmp_path: Path) -> None:
    bundle = plain(
        "llama", width=256, heads=8, kv_heads=4, head_width=32, mlp_width=1024, vocab=2048
    )
    params, _ = compress.apply(compress.get_recipe(recipe), bundle.params, axes=bundle.model.axes)
    folder = dataclasses.replace(bundle, params=params).save_pretrained(tmp_path / "out")
    size = (folder / "model.safetensors").stat().st_size
    assert tree.nbytes(params) < size < 1.01 * tree.nbytes(params)


def test_missing_extras(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("org/name", "'huggingface_hub'", "pip install 'jaxmodel[hub]'")
    monkeypatch.setitem(sys.modules, "gguf", None)
    gguf_files._reader_class.cache_clear()
    try:
        refused(path, "'gguf'", "pip install 'jaxmodel[hub]'", absent=("damaged", "a.gguf"))
    finally:
        gguf_files._reader_class.cache_clear()
