"""Models inside of GGUF files equal those of the folders that they were made from."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxmodel import tree
from jaxmodel.errors import InputError
from jaxmodel.hub import from_pretrained
from jaxmodel.models import llama
from jaxmodel.ops import rope
from tests.hub.test_goldens import GOLDENS, logits_of, near

# --------------------------------------------------------------------------------------------- GGUF


def write_gguf(
    path: Path,
    name: str,
    architecture: str,
    base: float | None = None,
    divisors: np.ndarray | None = None,
) -> Path:
    """A golden as GGUF, with the names and keys of the gguf package; with another rope where `base`
    and `divisors` are given.
    """
    hf = load_file(GOLDENS / name / "model.safetensors")
    config = json.loads((GOLDENS / name / "config.json").read_text())
    heads = config["num_attention_heads"]
    kv_heads = config["num_key_value_heads"]
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH[architecture.upper()], config["num_hidden_layers"]
    )
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(base or config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
    if "num_local_experts" in config:
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
    vocabulary = ["AB", *(chr(i) for i in range(65, 64 + config["vocab_size"]))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_merges(["A B"])
    if divisors is not None:
        writer.add_tensor(f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS]}.weight", divisors)
    experts: dict[str, list[np.ndarray]] = {}
    for key in sorted(hf):
        value, (stem, suffix) = hf[key].astype(np.float32), key.rsplit(".", 1)
        if architecture == "llama" and re.search(
            "[qk]_proj", key
        ):  # rotary halves become neighbours
            count = heads if "q_proj" in key else kv_heads
            value = (
                value.reshape(count, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
            )
        if ".experts." in stem:
            experts.setdefault(re.sub(r"experts\.\d+", "experts", stem), []).append(value)
        else:
            writer.add_tensor(f"{names.get_name(stem)}.{suffix}", value)
    for stem, values in experts.items():
        writer.add_tensor(f"{names.get_name(stem)}.weight", np.stack(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("name", "architecture"), [("qwen2-a", "qwen2"), ("qwen3-a", "qwen3"), ("mixtral-a", "llama")]
)
def test_gguf_equals_the_folder(name: str, architecture: str, tmp_path: Path) -> None:
    ours = from_pretrained(write_gguf(tmp_path / "a.gguf", name, architecture))
    theirs = from_pretrained(GOLDENS / name)
    assert tree.fingerprint(ours.params) == tree.fingerprint(theirs.params)
    config = theirs.model.config
    unsaid = {"init_scale": 0.02, "balance": llama.Config.balance}
    assert ours.model.config == dataclasses.replace(
        config, norm_eps=float(np.float32(config.norm_eps)), **unsaid
    )


def llama3_divisors(width: int, base: float, factor: float, context: float = 8192) -> np.ndarray:
    """What converters to GGUF write for Llama 3.1 and later: float32, from the lengths of the
    waves.
    """
    length = np.float32(2 * np.pi) * np.float32(base) ** (
        np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    )
    kept = (np.float32(context) / length - np.float32(1)) / np.float32(3)
    between = np.float32(1) / ((np.float32(1) - kept) / np.float32(factor) + kept)
    return np.where(
        length < context / 4, np.float32(1), np.where(length > context, np.float32(factor), between)
    )


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_rope_of_llama_3_in_gguf(factor: float, tmp_path: Path) -> None:
    """Such files say it by a tensor of divisors alone; from that comes the scaling of config.json,
    and with it the logits.
    """
    divisors = llama3_divisors(16, 5e5, factor)
    assert (
        divisors.dtype == np.float32
        and set(divisors[:4]) == {1.0}
        and 1 < divisors[4] < divisors[5] == factor
    )
    ours = from_pretrained(write_gguf(tmp_path / "a.gguf", "llama-yarn", "llama", 5e5, divisors))
    scaling = rope.RopeScaling("llama3", factor, 8192)
    assert ours.model.config.rope_scaling == scaling and ours.model.config.rope_base == 5e5
    saved = json.loads((ours.save_pretrained(tmp_path / "out") / "config.json").read_text())[
        "rope_scaling"
    ]
    assert (
        saved["rope_type"] == "llama3"
        and saved["factor"] == factor
        and saved["original_max_position_embeddings"] == 8192
    )
    theirs = from_pretrained(GOLDENS / "llama-yarn")
    model = llama.model(
        dataclasses.replace(theirs.model.config, rope_base=5e5, rope_scaling=scaling)
    )
    inputs = {
        "tokens": np.arange(6, dtype=np.int32)[None],
        "positions": np.array([[0, 1, 2, 700, 5000, 9000]], np.int32),
    }
    logits = logits_of(ours, **inputs)
    near(logits, np.asarray(logits_of(dataclasses.replace(theirs, model=model), **inputs)), 1e-5)
    plain = llama.model(dataclasses.replace(model.config, rope_scaling=None))
    assert (
        np.abs(logits - logits_of(dataclasses.replace(theirs, model=plain), **inputs)).max() > 1e-2
    )


@pytest.mark.parametrize(
    "divisors",
    [
        llama3_divisors(16, 5e5, 8.0, context=4096),
        llama3_divisors(16, 1e4, 8.0),  # of another base than the file's
        llama3_divisors(16, 5e5, 8.0)[:-1],
        np.ones(8, np.float32),
        np.full(8, 4.0, np.float32),
    ],
)
def test_other_divisors_of_the_rope_are_refused(divisors: np.ndarray, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", "llama-yarn", "llama", 5e5, divisors)
    message = (
        rf"'rope_freqs.weight' has shape \[{len(divisors)}\].*; allowed: 8 divisors of .*'llama3'"
    )
    with pytest.raises(InputError, match=message):
        from_pretrained(path)
