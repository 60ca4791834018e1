"""Bundles on disk: what is saved comes back bit for bit, what is wrong is named, what stood there survives."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import functools
import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmodel import compress, layers, tree
from jaxmodel.compress import Magnitude, Rtn
from jaxmodel.errors import InputError
from jaxmodel.hub import Bundle, Tokenizer, bundle as bundles, from_pretrained, gguf as gguf_files, train_bpe
from jaxmodel.models import families
from jaxmodel.ops import Policy

GOLDENS = Path(__file__).parent / "goldens"
TOKENS = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
KINDS = ("gpt2", "llama")

# Layers that differ in bits, groups, sparsity and N:M; of gpt2's joined q, k, v some are compressed and some are not.
MIXED = (
    ("blocks/0/attn/q", (Rtn(4, group=16),)),
    ("blocks/0/mlp/(up|down)", (Magnitude(pattern=(2, 4)), Rtn(8))),
    ("blocks/1/attn/(q|k)", (Magnitude(0.7, scope="leaf"),)),
    ("blocks/1/attn/(v|o)", (Rtn(3, group=8, symmetric=False),)),
    ("blocks/1/mlp/.*[pn]", (Magnitude(pattern=(1, 4)),)),
    ("blocks/2/attn/.", (Rtn(5),)),
    ("blocks/2/mlp/down", (Magnitude(0.9), Rtn(1))),
    ("embed", (Rtn(6, activations="int8"),)),
    (".*", ()),
)
VARIANTS = ("plain", "bf16", "mixed", *compress.NAMED)


@functools.cache
def plain(kind: str, **change: Any) -> Bundle:
    module = families()[kind]
    model = module.model(dataclasses.replace(module.SIZES["tiny"], init_scale=0.2, **change), Policy())
    noise = lambda path, leaf: leaf + 0.1 * np.random.default_rng(len(path)).normal(size=leaf.shape).astype(np.float32)
    params = tree.map_leaves(noise, jax.jit(model.init)(jax.random.key(0)))
    return Bundle(model, params, None, {"name": f"tiny {kind}", "trained": {"steps": 3}})


@functools.cache
def variant(kind: str, name: str) -> Bundle:
    bundle = plain(kind)
    if name == "plain":
        return bundle
    if name == "bf16":
        return dataclasses.replace(bundle, params=tree.cast(bundle.params, "bfloat16"))
    return compress.compress_bundle(bundle, MIXED if name == "mixed" else compress.NAMED[name])[0]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a folder of each kind and variant that the tests below damage."""
    root = tmp_path_factory.mktemp("stored")
    for kind, name in (("gpt2", "plain"), ("llama", "plain"), ("llama", "mixed"), ("llama", "int4")):
        variant(kind, name).save_pretrained(root / f"{kind}-{name}")
    plain("llama", tied=True).save_pretrained(root / "llama-tied")
    shutil.copytree(GOLDENS / "llama-tied", root / "shards")
    assert all(from_pretrained(folder) for folder in root.iterdir())
    return root


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def refused(source: str | Path, *parts: str, absent: tuple[str, ...] = (), **options: Any) -> None:
    """Loading raises InputError in one line that has all the parts, and none of those that are to be absent."""
    with pytest.raises(InputError) as caught:
        from_pretrained(source, **options)
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message
    assert not any(part in message for part in absent), message


# --------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind: str, name: str, tmp_path: Path) -> None:
    bundle = variant(kind, name)
    back = from_pretrained(bundle.save_pretrained(tmp_path / "out"))
    assert tree.fingerprint(back.params) == tree.fingerprint(bundle.params)
    assert jax.tree.structure(back.params) == jax.tree.structure(bundle.params)  # the same segments, too
    assert back.model is bundle.model  # equal config and policy, so nothing is compiled again
    assert back.card == bundle.card and back.processor is None
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(back.params))
    if name == "mixed":
        assert len(bundle.params["blocks"]) == 3
        apply = jax.jit(bundle.model.apply)
        np.testing.assert_array_equal(apply(back.params, TOKENS).logits, apply(bundle.params, TOKENS).logits)


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
        *("0.attn.c_attn.q.weight_packed", "0.attn.c_attn.q.weight_scale", "0.attn.c_attn.k.weight"),
        *("0.attn.c_attn.v.weight", "0.attn.c_attn.bias", "1.attn.c_attn.bias"),
        *(f"1.attn.c_attn.{part}.weight_{name}" for part in "qk" for name in ("mask", "values")),
        *(f"1.attn.c_attn.v.weight_{name}" for name in ("packed", "scale", "minimum")),
        *(f"2.attn.c_attn.{part}.weight_{name}" for part in "qkv" for name in ("packed", "scale")),
        *(f"2.attn.c_attn.{part}.bias" for part in "qkv"),
    }
    assert tree.fingerprint(from_pretrained(tmp_path / "out").params) == tree.fingerprint(bundle.params)


@pytest.mark.parametrize("name", ["plain", "bf16"])
def test_plain_folders_have_the_names_of_transformers(name: str, tmp_path: Path) -> None:
    for kind, golden in (("gpt2", "gpt2-a"), ("llama", "llama-untied")):
        tensors = load_file(variant(kind, name).save_pretrained(tmp_path / kind) / "model.safetensors")
        theirs = load_file(GOLDENS / golden / "model.safetensors")
        assert {key for key in tensors if ".2." not in key} == set(theirs)  # theirs has two layers
        assert {value.dtype.name for value in tensors.values()} == {"float32" if name == "plain" else "bfloat16"}


def test_saving_what_transformers_wrote_changes_no_tensor(tmp_path: Path) -> None:
    for golden in ("gpt2-a", "llama-untied"):
        bundle = from_pretrained(GOLDENS / golden)
        ours = load_file(bundle.save_pretrained(tmp_path / golden) / "model.safetensors")
        theirs = load_file(GOLDENS / golden / "model.safetensors")
        assert set(ours) == set(theirs) and all(np.array_equal(ours[key], theirs[key]) for key in theirs)
        config = json.loads((tmp_path / golden / "config.json").read_text())
        given = json.loads((GOLDENS / golden / "config.json").read_text())
        same = {key for key in config if key in given and config[key] == given[key]}
        assert set(config) - same <= {"n_ctx", "rope_theta", "bos_token_id", "eos_token_id"}


def test_policy_and_dtype(tmp_path: Path) -> None:
    policy = Policy(compute="bfloat16", stream="bfloat16", cache="float16", remat="dots", axes=(("B", "data"),))
    bundle = plain("llama")
    model = families()["llama"].model(bundle.model.config, policy)
    folder = dataclasses.replace(bundle, model=model).save_pretrained(tmp_path / "out")
    assert from_pretrained(folder).model.policy == dataclasses.replace(policy, axes=())  # axes belong to a mesh
    assert from_pretrained(folder, policy=Policy()).model.policy == Policy()
    half = from_pretrained(folder, dtype="float16")
    assert half.model.policy == dataclasses.replace(policy, axes=(), compute="float16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.params)} == {"float16"}
    compressed = from_pretrained(variant("llama", "int4").save_pretrained(tmp_path / "int4"), dtype="bfloat16")
    assert compressed.params["embed"].packed.dtype == jnp.int8  # only plain leaves are cast
    assert compressed.params["norm"]["weight"].dtype == jnp.bfloat16


def test_tokenizer_and_where_a_text_ends(tmp_path: Path) -> None:
    processor = train_bpe(["a newer text, and the newest"], vocab_size=260)
    folder = dataclasses.replace(plain("gpt2", vocab=260), processor=processor).save_pretrained(tmp_path / "out")
    back = from_pretrained(folder).processor
    assert back is not None and back.encode("a newer one") == processor.encode("a newer one")
    assert (back.eos_ids, back.bos_id, back.pad_id) == ((0,), 0, 0)
    config = json.loads((folder / "config.json").read_text())  # else transformers would end GPT-2's texts at 50256
    assert [config[f"{key}_token_id"] for key in ("bos", "eos", "pad")] == [0, 0, 0]


def test_equal_bundles_give_equal_files(tmp_path: Path) -> None:
    one, two = (variant("gpt2", "mixed").save_pretrained(tmp_path / name) for name in "ab")
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in two.iterdir()}


@pytest.mark.parametrize("recipe", ["int4", "sparse50-int8"])
def test_file_size_is_that_of_the_buffers(recipe: str, tmp_path: Path) -> None:
    bundle = plain("llama", width=256, heads=8, kv_heads=4, head_width=32, mlp_width=1024, vocab=2048)
    params, _ = compress.apply(compress.NAMED[recipe], bundle.params)
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


# ------------------------------------------------------------------------------------------------- bad folders


def _config(**change: Any) -> Callable[[Path], None]:
    """An edit of config.json; None removes the key."""

    def edit(folder: Path) -> None:
        given = json.loads((folder / "config.json").read_text()) | change
        (folder / "config.json").write_text(json.dumps({k: v for k, v in given.items() if v is not None}))

    return edit


def _ours(change: Callable[[dict[str, Any]], Any], signed: bool = False) -> Callable[[Path], None]:
    """An edit of jaxmodel.json; `signed` as if it had been written so."""

    def edit(folder: Path) -> None:
        edit_json(folder / "jaxmodel.json", change)
        if signed:
            edit_json(folder / "jaxmodel.json", lambda j: j.update(leaves_sha256=bundles.digest(j["leaves"])))

    return edit


def _field(**change: Any) -> Callable[[dict[str, Any]], None]:
    """Other static fields for one leaf of 4 bits."""
    return lambda j: j["leaves"][Q].update(change)


def _tensors(change: Callable[[dict[str, np.ndarray]], Any], file: str = "model.safetensors") -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file)

    return edit


def _put(name: str, change: Callable[[np.ndarray], np.ndarray], like: str | None = None) -> Callable[[Path], None]:
    """Another tensor of this name: a change of what is there, or of the tensor `like`."""
    return _tensors(lambda t: t.update({name: np.ascontiguousarray(change(t[like or name]))}))


def _text(file: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / file).write_text(text)


def _cut(file: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / file, size)


def _gone(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


EMBED, HEAD, WTE = "model.embed_tokens.weight", "lm_head.weight", "transformer.wte.weight"
C_ATTN = "transformer.h.1.attn.c_attn.weight"
Q, UP = (f"model.layers.0.{name}_proj.weight" for name in ("self_attn.q", "mlp.up"))
SHARD = "model-00002-of-00004.safetensors"


@pytest.mark.parametrize(
    ("source", "damage", "parts"),
    [
        ("gpt2-plain", _gone("config.json"), ["gpt2-plain", "'config.json' is missing"]),
        ("gpt2-plain", _text("config.json", "{'a': 1}"), ["config.json: not JSON"]),
        ("gpt2-plain", _text("config.json", "[1]"), ["config.json: its content is [1]; allowed: an object"]),
        ("gpt2-plain", _config(model_type="gpt-2"), ["model_type: 'gpt-2'", "nearest: gpt2"]),
        ("gpt2-plain", _config(model_type=["gpt2"]), ["model_type"]),
        ("gpt2-plain", _config(model_type=None), ["model_type", "allowed: ", "gpt2, "]),
        ("gpt2-plain", _config(n_embd=None), ["config.json: the key 'n_embd' is missing"]),
        ("gpt2-plain", _config(n_embd="32"), ['config.json: n_embd is "32"; allowed: a whole number']),
        ("gpt2-plain", _config(n_layer=-1), ["n_layer is -1; allowed"]),
        ("gpt2-plain", _config(tie_word_embeddings=False), ["tie_word_embeddings is False"]),
        ("gpt2-plain", _config(scale_attn_by_inverse_layer_idx=True), ["scale_attn_by_inverse_layer_idx is True"]),
        ("gpt2-plain", _config(activation_function="relu"), ["activation is 'gelu_tanh', but config.json says 'relu'"]),
        ("gpt2-plain", _config(n_inner=77), ["mlp_width is 0, but config.json says 77"]),
        ("llama-plain", _config(num_attention_heads=0, head_dim=None), ["config.json: num_attention_heads is 0; allowed"]),
        ("llama-plain", _config(hidden_act="gelu"), ["activation is 'silu', but config.json says 'gelu'"]),
        ("llama-plain", _config(mlp_bias=True), ["mlp_bias is False, but config.json says True"]),
        ("llama-plain", _config(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), ["rope scaling: 'dynamic'", "yarn"]),
        ("llama-plain", _config(rope_theta=500.0), ["rope_base is 10000.0", "config.json says 500.0"]),
        ("gpt2-plain", _gone("model.safetensors"), ["'model.safetensors' is missing"]),
        ("gpt2-plain", _cut("model.safetensors", 50_000), ["model.safetensors: not a whole safetensors file"]),
        ("gpt2-plain", _cut("model.safetensors", 100), ["not a whole safetensors file"]),
        ("gpt2-plain", _cut("model.safetensors", 0), ["not a whole safetensors file"]),
        ("gpt2-plain", _text("model.safetensors", "a text, renamed" * 9), ["not a whole safetensors file"]),
        ("gpt2-plain", _tensors(lambda t: t.pop(C_ATTN)), [f"{C_ATTN!r} is missing", "there is transformer.h."]),
        ("llama-plain", _tensors(lambda t: t.pop(HEAD)), ["'lm_head.weight' is missing"]),
        ("llama-mixed", _tensors(lambda t: t.pop(f"{Q}_scale")), [repr(Q), "scale"]),
        ("gpt2-plain", _put(C_ATTN, lambda a: a[:, 1:]), [f"{C_ATTN!r} has shape [32, 95]", "needs [32, 96]"]),
        ("gpt2-plain", _put(C_ATTN, lambda a: a.T), [f"{C_ATTN!r} has shape [96, 32]", "needs [32, 96]"]),
        ("llama-plain", _put(EMBED, lambda a: a[1:]), [f"{EMBED!r} has shape [255, 32]", "needs [256, 32]"]),
        ("llama-plain", _put(EMBED, lambda a: a.astype(np.int8)), [repr(EMBED), "is int8"]),
        ("llama-plain", _put("q.bias", lambda a: a[0], like=Q), ["1 tensors have no place", "'q.bias'"]),
        ("llama-tied", _put(HEAD, lambda a: a + 1, like=EMBED), ["'lm_head.weight' is not", "to which this config ties it"]),
        ("gpt2-plain", _put(HEAD, lambda a: a + 1, like=WTE), ["'lm_head.weight' is not", "to which this config ties it"]),
        ("llama-int4", _text("jaxmodel.json", "{"), ["jaxmodel.json: not JSON"]),
        ("llama-int4", _text("jaxmodel.json", "{}"), ["jaxmodel.json: format None", "allowed: 1"]),
        ("llama-int4", _ours(lambda j: j.update(format=2)), ["jaxmodel.json: format 2 is not read", "allowed: 1"]),
        ("llama-int4", _ours(lambda j: j.pop("policy")), ["jaxmodel.json: the key 'policy' is missing"]),
        ("llama-int4", _ours(lambda j: j.update(family="gpt2")), ["family is 'gpt2'", "says 'llama'"]),
        ("llama-int4", _ours(lambda j: j["config"].update(norm_eps=0.5)), ["norm_eps is 0.5", "says 1e-05"]),
        ("llama-int4", _ours(lambda j: j["policy"].update(dtype="f4")), ["policy: 'dtype'", "compute"]),
        ("llama-int4", _ours(lambda j: j["policy"].update(compute="f4")), ["policy.compute: 'f4'"]),
        ("llama-int4", _ours(_field(bits=2)), ["jaxmodel.json: the static fields", "leaves_sha256"]),
        ("llama-int4", _ours(_field(pad=0)), ["leaves_sha256"]),
        ("llama-int4", _ours(_field(activations="int8")), ["leaves_sha256"]),
        ("llama-mixed", _ours(lambda j: j["leaves"][UP].update(pattern=None)), ["leaves_sha256"]),
        ("llama-int4", _ours(_field(bits=3), signed=True), [repr(Q), "QTensor"]),
        ("llama-int4", _ours(_field(bits=9), signed=True), [repr(Q), "bits is 9; allowed: 1 to 8"]),
        ("llama-int4", _ours(_field(pad=31), signed=True), [repr(Q), "has shape [32, 33]", "needs [32, 32]"]),
        ("llama-int4", _ours(_field(pad="1"), signed=True), [repr(Q)]),
        ("llama-int4", _ours(_field(type="QTensors"), signed=True), [repr(Q), "'QTensors'", "nearest: QTensor"]),
        ("llama-int4", _ours(lambda j: j["leaves"].pop(Q), signed=True), [f"{Q!r} is missing", f"{Q}_packed"]),
        ("llama-int4", _put(f"{Q}_packed", lambda a: a.astype(np.int8)), [repr(Q), "packed has dtype int8"]),
        ("shards", _gone(SHARD), [f"{SHARD!r} is missing"]),
        ("shards", _cut(SHARD, 5000), [SHARD, "not a whole safetensors file"]),
        ("shards", _text("model.safetensors.index.json", "{}"), ["index.json", "'weight_map'"]),
        ("shards", _text("model.safetensors.index.json", "no"), ["index.json: not JSON"]),
        ("shards", _text("model.safetensors.index.json", '{"weight_map": {"a": "../b"}}'), ["'../b'", "in this folder"]),
        ("shards", _text("model.safetensors.index.json", '{"weight_map": {"a": "/b"}}'), ["'/b'", "in this folder"]),
        ("shards", _text("model.safetensors.index.json", '{"weight_map": {"a": 3}}'), ["weight_map.a is 3; allowed: a text"]),
        ("shards", _tensors(lambda t: t.popitem(), SHARD), ["is missing"]),
        ("gpt2-plain", _text("tokenizer.json", "{}"), ["tokenizer.json"]),
    ],
)
def test_bad_folder(source: str, damage: Callable[[Path], Any], parts: list[str], stored: Path, tmp_path: Path) -> None:
    folder = tmp_path / source
    shutil.copytree(stored / source, folder)
    damage(folder)
    refused(folder, *parts)


def test_a_tokenizer_larger_than_the_embedding(tmp_path: Path) -> None:
    """Neither saved nor loaded; but a special token without a role may lie behind, as in Gemma 3's of text, and padding."""
    bundle = dataclasses.replace(plain("gpt2", vocab=257), processor=train_bpe([], vocab_size=257))
    folder, processor = bundle.save_pretrained(tmp_path / "out"), train_bpe([], vocab_size=257)
    before = contents(folder)
    processor.backend.add_special_tokens(["<image>"])
    from_pretrained(dataclasses.replace(bundle, processor=processor).save_pretrained(folder))
    pads = dataclasses.replace(processor, pad_id=257)
    back = from_pretrained(dataclasses.replace(bundle, processor=pads).save_pretrained(folder))
    assert isinstance(back.processor, Tokenizer) and back.processor.pad_id == 257
    message = "the tokenizer's token '<image>' has id 257, but the embedding's are 0 to 256"
    begins = dataclasses.replace(processor, bos_id=257)
    save_refused(dataclasses.replace(bundle, processor=begins), folder, f"processor: {message}")
    begins.save(folder)
    refused(folder, f"{folder}: {message}")
    processor = train_bpe(["a newer text, and the newest"], vocab_size=260)
    processor.save(folder)
    refused(folder, "token 'ew' has id 257, but the embedding's are 0 to 256")
    bundle.save_pretrained(folder)
    assert contents(folder) == before


def test_a_copy_of_the_tied_embedding_is_no_error(stored: Path, tmp_path: Path) -> None:
    shutil.copytree(stored / "llama-tied", tmp_path / "a")
    _put(HEAD, np.copy, like=EMBED)(tmp_path / "a")
    assert tree.fingerprint(from_pretrained(tmp_path / "a").params) == tree.fingerprint(plain("llama", tied=True).params)


# -------------------------------------------------------------------------------------------------------- GGUF


def write_gguf(
    path: Path, architecture: str = "llama", tensors: dict[str, np.ndarray | None] | None = None, **metadata: Any
) -> Path:
    """The golden `llama-untied` as GGUF; `tensors` and `metadata` change what is in it, None leaves it out."""
    hf = load_file(GOLDENS / "llama-untied" / "model.safetensors")
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")}
    names |= {
        "model.layers": "blk",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
    }
    found: dict[str, np.ndarray | None] = {}
    for name, value in hf.items():
        if "q_proj" in name or "k_proj" in name:  # rotary halves become neighbours, a head of 4 rows at a time
            value = value.reshape(-1, 2, 2, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        found[name] = value
    keys = {"block_count": 2, "embedding_length": 16, "feed_forward_length": 24, "context_length": 2048}
    keys |= {"attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 4}
    keys |= {"rope.freq_base": 500.0, "attention.layer_norm_rms_epsilon": 1e-2}
    entries: dict[str, Any] = {f"llama.{key}": value for key, value in keys.items()}
    tokens = [chr(i) for i in range(33, 126)] + ["ab", "cd", "<s>", "</s>"]
    vocabulary = {"model": "gpt2", "tokens": tokens, "merges": ["a b", "c d"]}
    entries |= {f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()}
    writer = gguf.GGUFWriter(path, architecture)
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    for key, value in (entries | metadata).items():
        if value is not None:
            add[type(value)](key, value)
    for name, value in (found | (tensors or {})).items():
        if value is not None:
            writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_equals_the_folder(tmp_path: Path) -> None:
    bundle, folder = from_pretrained(write_gguf(tmp_path / "a.gguf")), from_pretrained(GOLDENS / "llama-untied")
    assert tree.fingerprint(bundle.params) == tree.fingerprint(folder.params)
    assert bundle.card["source"] == "a.gguf" and bundle.processor is not None and bundle.processor.vocab_size == 97
    epsilon = float(np.float32(1e-2))
    assert bundle.model.config == dataclasses.replace(folder.model.config, norm_eps=epsilon)
    saved = from_pretrained(bundle.save_pretrained(tmp_path / "out"))
    assert saved.model is bundle.model and saved.processor is not None and saved.processor.encode("abcd") == [93, 94]
    half = from_pretrained(tmp_path / "a.gguf", dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.params)} == {"bfloat16"}


K = "blk.1.attn_k.weight"


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"architecture": "mamba"}, ["general.architecture: 'mamba'", "allowed: llama"]),
        ({"architecture": "gpt2"}, ["general.architecture: 'gpt2'", "allowed: llama"]),
        ({"tensors": {K: None}}, ["a.gguf", f"{K!r} is missing"]),
        ({"tensors": {K: np.ones((8, 12), np.float32)}}, [f"{K!r} has shape [8, 12]", "needs [8, 16]"]),
        ({"tensors": {"rope_freqs.weight": np.ones(2, np.float32)}}, ["'rope_freqs.weight' has shape [2] and values up to 1"]),
        ({"llama.block_count": 1}, ["tensors have no place", "'blk.1."]),
        ({"llama.block_count": None}, ["'llama.block_count' is missing"]),
        ({"llama.rope.scaling.type": "yarn"}, ["rope scaling 'yarn'"]),
        ({"tokenizer.ggml.tokens": None}, ["'llama.vocab_size' is missing"]),
        ({"tokenizer.ggml.model": "bert"}, ["tokenizer.ggml.model: 'bert'"]),
        ({"llama.vocab_size": 96}, ["a.gguf: the tokenizer's token '</s>' has id 96, but the embedding's are 0 to 95"]),
    ],
)
def test_bad_gguf(options: dict[str, Any], parts: list[str], tmp_path: Path) -> None:
    refused(write_gguf(tmp_path / "a.gguf", **options), *parts)


# ------------------------------------------------------------------------------------------------------- saving


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def save_refused(bundle: Bundle, out: Path, *parts: str) -> None:
    """Saving raises InputError in one line, and everything in the folder of `out` is as before."""
    before = contents(out.parent)
    with pytest.raises(InputError) as caught:
        bundle.save_pretrained(out)
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message
    assert contents(out.parent) == before and not [path for path in out.parent.iterdir() if path.name.startswith(".")]


def test_takes_the_place_of_a_whole_bundle(tmp_path: Path, stored: Path) -> None:
    out = tmp_path / "models" / "out"
    processor = train_bpe([], vocab_size=257)
    dataclasses.replace(plain("gpt2", vocab=257), processor=processor).save_pretrained(str(out))  # parents are made
    shutil.copy(stored / "shards" / SHARD, out)
    variant("llama", "int4").save_pretrained(out)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "jaxmodel.json", "model.safetensors"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert out.stat().st_mode & 0o777 == 0o755
    (tmp_path / "link").symlink_to(out)
    plain("gpt2").save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and from_pretrained(out).model is plain("gpt2").model
    (tmp_path / "empty").mkdir()
    assert from_pretrained(plain("gpt2").save_pretrained(tmp_path / "empty")).card == plain("gpt2").card


def test_where_a_bundle_cannot_go(tmp_path: Path, stored: Path) -> None:
    (tmp_path / "file").write_text("mine")
    save_refused(plain("gpt2"), tmp_path / "file", "out: ", "file' is a file; a folder is needed")
    with pytest.raises(InputError, match="below' cannot be made .*; choose a place"):
        plain("gpt2").save_pretrained(tmp_path / "file" / "below")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("mine")
    save_refused(plain("gpt2"), tmp_path / "photos", "'a.jpg'", "choose an empty or new folder")
    shutil.copytree(stored / "gpt2-plain", tmp_path / "bundle")
    (tmp_path / "bundle" / "notes.txt").write_text("mine")  # a bundle, but not only
    save_refused(plain("gpt2"), tmp_path / "bundle", "'notes.txt'")
    (tmp_path / "weights").mkdir()
    shutil.copy(stored / "gpt2-plain" / "model.safetensors", tmp_path / "weights")
    save_refused(plain("gpt2"), tmp_path / "weights", "no config.json")


def test_params_that_do_not_fit_the_config(tmp_path: Path) -> None:
    bundle = plain("llama")
    fused = dataclasses.replace(bundle, params=layers.fuse(bundle.params))
    save_refused(fused, tmp_path / "out", "'blocks/0/attn/k' is missing", "fused")
    short = dataclasses.replace(bundle, params={**bundle.params, "embed": bundle.params["embed"][:-1]})
    save_refused(short, tmp_path / "out", "'embed' has shape [255, 32]", "needs [256, 32]")
    assert not (tmp_path / "out").exists()


def test_others_may_read_a_bundle_if_the_umask_lets_them(tmp_path: Path) -> None:
    """Each file as any new file, and a folder that is replaced stays as open as it was."""
    for umask, mode in ((0o022, 0o644), (0o007, 0o660), (0o077, 0o600)):
        old = os.umask(umask)
        try:
            folder = plain("gpt2").save_pretrained(tmp_path / f"out-{umask}")
        finally:
            os.umask(old)
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {mode}
        assert folder.stat().st_mode & 0o777 == 0o777 & ~umask
    folder.chmod(0o770)
    plain("gpt2").save_pretrained(folder)
    assert folder.stat().st_mode & 0o777 == 0o770


@pytest.mark.parametrize("stage", ["save_file", "write_text", "fsync", "mkdir", "rename"])
def test_full_disk(stage: str, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(stored / "gpt2-plain", tmp_path / "out")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner = {"save_file": bundles, "write_text": Path, "fsync": os, "mkdir": Path, "rename": Path}[stage]
    if stage == "rename":  # where folders cannot be swapped at once: the second rename fails, the first is undone
        monkeypatch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace())
        rename = Path.rename
        second = lambda a, b: not a.name.endswith("-old") and b.name == "out"
        monkeypatch.setattr(Path, "rename", lambda a, b: full() if second(a, b) else rename(a, b))
    elif stage == "fsync":  # of a file; a folder need not be synced
        fsync = os.fsync
        monkeypatch.setattr(os, "fsync", lambda fd: full() if os.path.isfile(f"/proc/self/fd/{fd}") else fsync(fd))
    else:
        monkeypatch.setattr(owner, stage, full)
    save_refused(variant("llama", "plain"), tmp_path / "out", "cannot be written", "No space left", "is unchanged")
    monkeypatch.undo()
    assert tree.fingerprint(from_pretrained(tmp_path / "out").params) == tree.fingerprint(plain("gpt2").params)


def test_swap_without_the_systems_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = plain("gpt2").save_pretrained(tmp_path / "out")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace(renameat2=lambda *args: -1))
    variant("llama", "plain").save_pretrained(out)
    assert from_pretrained(out).model is plain("llama").model and [path.name for path in tmp_path.iterdir()] == ["out"]


# In a process of its own: a file larger than the system allows, then a kill.
PROGRAM = """
import os, resource, signal, sys
from jaxmodel import hub, tree
from jaxmodel.errors import InputError
from jaxmodel.hub import bundle as bundles
from jaxmodel.hub import files

source, out, stage = sys.argv[1:]
bundle = hub.from_pretrained(source)
if stage == "weights":
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        bundle.save_pretrained(out)
    except InputError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
print(sorted(os.listdir(os.path.dirname(out))), flush=True)

def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

save_file = bundles.save_file
def half(tensors, path, metadata):
    save_file(tensors, path, metadata)
    os.truncate(path, os.path.getsize(path) // 2)
    kill()

sync = files._sync
if stage == "weights":
    bundles.save_file = half
else:
    files._sync = lambda path: kill() if path == bundles.Path(out).parent else sync(path)
bundle.save_pretrained(out)
"""


@pytest.mark.parametrize("stage", ["weights", "swapped"])
def test_file_limit_and_kill(stage: str, stored: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(stored / "gpt2-plain", out)
    command = [sys.executable, "-c", PROGRAM, str(stored / "llama-plain"), str(out), stage]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2])
    assert done.returncode == -9, done.stderr
    *message, listing = done.stdout.splitlines()
    assert listing == "['out']"
    if stage == "weights":
        assert len(message) == 1 and "cannot be written" in message[0] and "File too large" in message[0]
        assert contents(out) == contents(stored / "gpt2-plain")
        kind = "gpt2"
    else:
        kind = "llama"
    assert tree.fingerprint(from_pretrained(out).params) == tree.fingerprint(plain(kind).params)
    assert stage == "swapped" or len(list(tmp_path.iterdir())) == 2  # what the kill left beside is in nobody's way
    plain("llama").save_pretrained(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # and is cleared away
    assert from_pretrained(out).model is plain("llama").model


@pytest.mark.parametrize("part", [1, 2])
def test_a_model_in_several_gguf_files(part: int, tmp_path: Path) -> None:
    """As gguf-split leaves it: all from any of its parts; a part that is missing or moved is named."""
    whole = write_gguf(tmp_path / "whole.gguf")
    held = gguf_files.read_gguf(whole)
    names = list(held.tensors)
    for i, some in enumerate((names[:5], names[5:])):
        writer = gguf.GGUFWriter(tmp_path / f"m-0000{i + 1}-of-00002.gguf", "llama")
        if i == 0:
            for key, value in held.metadata.items():
                if not key.startswith("general.") and isinstance(value, int | float) and not isinstance(value, bool):
                    (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)
            writer.add_uint32("llama.vocab_size", 97)
            writer.add_tokenizer_model("gpt2")
            writer.add_token_list(held.metadata["tokenizer.ggml.tokens"])
            writer.add_token_merges(held.metadata["tokenizer.ggml.merges"])
        for key, value in {"split.no": i, "split.count": 2, "split.tensors.count": len(names)}.items():
            writer.add_uint16(key, value)
        for name in some:
            writer.add_tensor(name, held.read(name))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    one, other = (tmp_path / f"m-0000{n}-of-00002.gguf" for n in (part, 3 - part))
    found = gguf_files.read_gguf(one)
    assert list(found.tensors) == names and all(np.array_equal(found.read(n), held.read(n)) for n in names)
    assert found.metadata["llama.embedding_length"] == held.metadata["llama.embedding_length"]
    other.rename(tmp_path / "elsewhere.gguf")
    refused(one, f"is one of 2 parts, and {other.name!r} is not beside it")
    refused(tmp_path / "elsewhere.gguf", "is one of 2 parts; its name must end with -00001-of-00002.gguf")
