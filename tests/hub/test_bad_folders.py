"""Folders that are wrong in one place: each is refused in one line that names it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmodel import tree
from jaxmodel.hub import (
    Tokenizer,
    bundle as bundles,
    from_pretrained,
    train_bpe,
)
from tests.hub.conftest import (
    SHARD,
    contents,
    edit_json,
    plain,
    refused,
    save_refused,
)


def _config(**change: Any) -> Callable[[Path], None]:
    """An edit of config.json; None removes the key."""

    def edit(folder: Path) -> None:
        given = json.loads((folder / "config.json").read_text()) | change
        (folder / "config.json").write_text(
            json.dumps({k: v for k, v in given.items() if v is not None})
        )

    return edit


def _ours(change: Callable[[dict[str, Any]], Any], signed: bool = False) -> Callable[[Path], None]:
    """An edit of jaxmodel.json; `signed` as if it had been written so."""

    def edit(folder: Path) -> None:
        edit_json(folder / "jaxmodel.json", change)
        if signed:
            edit_json(
                folder / "jaxmodel.json",
                lambda j: j.update(leaves_sha256=bundles.digest(j["leaves"])),
            )

    return edit


def _field(**change: Any) -> Callable[[dict[str, Any]], None]:
    """Other static fields for one leaf of 4 bits."""
    return lambda j: j["leaves"][Q].update(change)


def _tensors(
    change: Callable[[dict[str, np.ndarray]], Any], file: str = "model.safetensors"
) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file)

    return edit


def _put(
    name: str, change: Callable[[np.ndarray], np.ndarray], like: str | None = None
) -> Callable[[Path], None]:
    """Another tensor of this name: a change of what is there, or of the tensor `like`."""
    return _tensors(lambda t: t.update({name: np.ascontiguousarray(change(t[like or name]))}))


def _text(file: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / file).write_text(text)


def _cut(file: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / file, size)


def _gone(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
WTE = "transformer.wte.weight"
C_ATTN = "transformer.h.1.attn.c_attn.weight"
Q, UP = (f"model.layers.0.{name}_proj.weight" for name in ("self_attn.q", "mlp.up"))


@pytest.mark.parametrize(
    ("source", "damage", "parts"),
    [
        ("gpt2-plain", _gone("config.json"), ["gpt2-plain", "'config.json' is missing"]),
        ("gpt2-plain", _text("config.json", "{'a': 1}"), ["config.json: not JSON"]),
        (
            "gpt2-plain",
            _text("config.json", "[1]"),
            ["config.json: its content is [1]; allowed: an object"],
        ),
        ("gpt2-plain", _config(model_type="gpt-2"), ["model_type: 'gpt-2'", "nearest: gpt2"]),
        ("gpt2-plain", _config(model_type=["gpt2"]), ["model_type"]),
        ("gpt2-plain", _config(model_type=None), ["model_type", "allowed: ", "gpt2, "]),
        ("gpt2-plain", _config(n_embd=None), ["config.json: the key 'n_embd' is missing"]),
        (
            "gpt2-plain",
            _config(n_embd="32"),
            ['config.json: n_embd is "32"; allowed: a whole number'],
        ),
        ("gpt2-plain", _config(n_layer=-1), ["n_layer is -1; allowed"]),
        ("gpt2-plain", _config(tie_word_embeddings=False), ["tied is True, but config.json"]),
        (
            "gpt2-plain",
            _config(scale_attn_by_inverse_layer_idx=True),
            ["scale_attn_by_inverse_layer_idx is True"],
        ),
        (
            "gpt2-plain",
            _config(activation_function="relu"),
            ["activation is 'gelu_tanh', but config.json says 'relu'"],
        ),
        ("gpt2-plain", _config(n_inner=77), ["mlp_width is 0, but config.json says 77"]),
        (
            "llama-plain",
            _config(num_attention_heads=0, head_dim=None),
            ["config.json: num_attention_heads is 0; allowed"],
        ),
        (
            "llama-plain",
            _config(hidden_act="gelu"),
            ["activation is 'silu', but config.json says 'gelu'"],
        ),
        ("llama-plain", _config(mlp_bias=True), ["mlp_bias is False, but config.json says True"]),
        (
            "llama-plain",
            _config(rope_scaling={"rope_type": "axial", "factor": 2.0}),
            ["the rope type: 'axial'", "yarn"],
        ),
        (
            "llama-plain",
            _config(rope_theta=500.0),
            ["rope_base is 10000.0", "config.json says 500.0"],
        ),
        ("gpt2-plain", _gone("model.safetensors"), ["'model.safetensors' is missing"]),
        (
            "gpt2-plain",
            _cut("model.safetensors", 50_000),
            ["model.safetensors: not a complete safetensors file"],
        ),
        ("gpt2-plain", _cut("model.safetensors", 100), ["not a complete safetensors file"]),
        ("gpt2-plain", _cut("model.safetensors", 0), ["not a complete safetensors file"]),
        (
            "gpt2-plain",
            _text("model.safetensors", "a text, renamed" * 9),
            ["not a complete safetensors file"],
        ),
        (
            "gpt2-plain",
            _tensors(lambda t: t.pop(C_ATTN)),
            [f"{C_ATTN!r} is missing", "nearest: transformer.h."],
        ),
        ("llama-plain", _tensors(lambda t: t.pop(HEAD)), ["'lm_head.weight' is missing"]),
        ("llama-mixed", _tensors(lambda t: t.pop(f"{Q}_scale")), [repr(Q), "scale"]),
        (
            "gpt2-plain",
            _put(C_ATTN, lambda a: a[:, 1:]),
            [f"{C_ATTN!r} has shape [32, 95]", "needs [32, 96]"],
        ),
        (
            "gpt2-plain",
            _put(C_ATTN, lambda a: a.T),
            [f"{C_ATTN!r} has shape [96, 32]", "needs [32, 96]"],
        ),
        (
            "llama-plain",
            _put(EMBED, lambda a: a[1:]),
            [f"{EMBED!r} has shape [255, 32]", "needs [256, 32]"],
        ),
        ("llama-plain", _put(EMBED, lambda a: a.astype(np.int8)), [repr(EMBED), "is int8"]),
        (
            "llama-plain",
            _put("q.bias", lambda a: a[0], like=Q),
            ["1 tensors have no place", "'q.bias'"],
        ),
        (
            "llama-tied",
            _put(HEAD, lambda a: a + 1, like=EMBED),
            ["'lm_head.weight' differs", "to which this config ties it"],
        ),
        (
            "gpt2-plain",
            _put(HEAD, lambda a: a + 1, like=WTE),
            ["'lm_head.weight' differs", "to which this config ties it"],
        ),
        ("llama-int4-rtn", _text("jaxmodel.json", "{"), ["jaxmodel.json: not JSON"]),
        (
            "llama-int4-rtn",
            _text("jaxmodel.json", "{}"),
            ["jaxmodel.json: format None", "allowed: 1"],
        ),
        (
            "llama-int4-rtn",
            _ours(lambda j: j.update(format=2)),
            ["jaxmodel.json: format 2 is not supported", "allowed: 1"],
        ),
        (
            "llama-int4-rtn",
            _ours(lambda j: j.pop("policy")),
            ["jaxmodel.json: the key 'policy' is missing"],
        ),
        (
            "llama-int4-rtn",
            _ours(lambda j: j.update(family="gpt2")),
            ["family is 'gpt2'", "says 'llama'"],
        ),
        (
            "llama-int4-rtn",
            _ours(lambda j: j["config"].update(norm_eps=0.5)),
            ["norm_eps is 0.5", "says 1e-05"],
        ),
        (
            "llama-int4-rtn",
            _ours(lambda j: j["policy"].update(dtype="f4")),
            ["policy: 'dtype'", "compute"],
        ),
        (
            "llama-int4-rtn",
            _ours(lambda j: j["policy"].update(compute_dtype="f4")),
            ["policy.compute_dtype: 'f4'"],
        ),
        (
            "llama-int4-rtn",
            _ours(_field(bits=2)),
            ["jaxmodel.json: the static fields", "leaves_sha256"],
        ),
        ("llama-int4-rtn", _ours(_field(pad=2)), ["leaves_sha256"]),
        ("llama-int4-rtn", _ours(_field(activations="int8")), ["leaves_sha256"]),
        ("llama-mixed", _ours(lambda j: j["leaves"][UP].update(pattern=None)), ["leaves_sha256"]),
        ("llama-int4-rtn", _ours(_field(bits=3), signed=True), [repr(Q), "QTensor"]),
        (
            "llama-int4-rtn",
            _ours(_field(bits=9), signed=True),
            [repr(Q), "bits is 9; allowed: 1 to 8"],
        ),
        (
            "llama-int4-rtn",
            _ours(_field(pad=31), signed=True),
            [repr(Q), "has shape [32, 1]", "needs [32, 32]"],
        ),
        ("llama-int4-rtn", _ours(_field(pad="1"), signed=True), [repr(Q)]),
        (
            "llama-int4-rtn",
            _ours(_field(type="QTensors"), signed=True),
            [repr(Q), "'QTensors'", "nearest: QTensor"],
        ),
        (
            "llama-int4-rtn",
            _ours(lambda j: j["leaves"].pop(Q), signed=True),
            [f"{Q!r} is missing", f"{Q}_packed"],
        ),
        (
            "llama-int4-rtn",
            _put(f"{Q}_packed", lambda a: a.astype(np.int8)),
            [repr(Q), "packed has dtype int8"],
        ),
        ("shards", _gone(SHARD), [f"{SHARD!r} is missing"]),
        ("shards", _cut(SHARD, 5000), [SHARD, "not a complete safetensors file"]),
        ("shards", _text("model.safetensors.index.json", "{}"), ["index.json", "'weight_map'"]),
        ("shards", _text("model.safetensors.index.json", "no"), ["index.json: not JSON"]),
        (
            "shards",
            _text("model.safetensors.index.json", '{"weight_map": {"a": "../b"}}'),
            ["'../b'", "in this folder"],
        ),
        (
            "shards",
            _text("model.safetensors.index.json", '{"weight_map": {"a": "/b"}}'),
            ["'/b'", "in this folder"],
        ),
        (
            "shards",
            _text("model.safetensors.index.json", '{"weight_map": {"a": 3}}'),
            ["weight_map.a is 3; allowed: a text"],
        ),
        ("shards", _tensors(lambda t: t.popitem(), SHARD), ["is missing"]),
        ("gpt2-plain", _text("tokenizer.json", "{}"), ["tokenizer.json"]),
    ],
)
def test_bad_folder(
    source: str, damage: Callable[[Path], Any], parts: list[str], stored: Path, tmp_path: Path
) -> None:
    folder = tmp_path / source
    shutil.copytree(stored / source, folder)
    damage(folder)
    refused(folder, *parts)


def test_a_tokenizer_larger_than_the_embedding(tmp_path: Path) -> None:
    """Neither saved nor loaded; but a special token without a role may lie behind, as in Gemma 3's
    of text, and padding.
    """
    bundle = dataclasses.replace(plain("gpt2", vocab=257), processor=train_bpe([], vocab_size=257))
    folder = bundle.save_pretrained(tmp_path / "out")
    processor = train_bpe([], vocab_size=257)
    before = contents(folder)
    processor.backend.add_special_tokens(["<image>"])
    from_pretrained(dataclasses.replace(bundle, processor=processor).save_pretrained(folder))
    pads = dataclasses.replace(processor, pad_id=257)
    back = from_pretrained(dataclasses.replace(bundle, processor=pads).save_pretrained(folder))
    assert isinstance(back.processor, Tokenizer) and back.processor.pad_id == 257
    message = "the tokenizer's token '<image>' has id 257, but the embedding has the ids 0 to 256"
    begins = dataclasses.replace(processor, bos_id=257)
    save_refused(dataclasses.replace(bundle, processor=begins), folder, f"processor: {message}")
    begins.save(folder)
    refused(folder, f"{folder}: {message}")
    processor = train_bpe(["a newer text, and the newest"], vocab_size=260)
    processor.save(folder)
    refused(folder, "token 'ew' has id 257, but the embedding has the ids 0 to 256")
    bundle.save_pretrained(folder)
    assert contents(folder) == before


def test_a_copy_of_the_tied_embedding_is_no_error(stored: Path, tmp_path: Path) -> None:
    shutil.copytree(stored / "llama-tied", tmp_path / "a")
    _put(HEAD, np.copy, like=EMBED)(tmp_path / "a")
    assert tree.fingerprint(from_pretrained(tmp_path / "a").params) == tree.fingerprint(
        plain("llama", tied=True).params
    )
