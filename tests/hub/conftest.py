"""Small bundles of ours and of others, on disk, for the tests of what is saved and read."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxmodel import compress, tree
from jaxmodel.compress import Magnitude, Rtn
from jaxmodel.errors import InputError
from jaxmodel.hub import (
    Bundle,
    from_pretrained,
)
from jaxmodel.models import families
from jaxmodel.ops import Policy

GOLDENS = Path(__file__).parent / "goldens"
SHARD = "model-00002-of-00004.safetensors"
TOKENS = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
KINDS = ("gpt2", "llama")

# Layers that differ in bits, groups, sparsity and N:M; of gpt2's joined q, k, v some are compressed
# and some are not.
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
BY_WEIGHTS = [name for name, recipe in compress.RECIPES.items() if not recipe.needs]
VARIANTS = ("plain", "bf16", "mixed", *BY_WEIGHTS, "magnitude(0.5) | rtn(8)")


@functools.cache
def plain(kind: str, **change: Any) -> Bundle:
    module = families()[kind]
    model = module.model(
        dataclasses.replace(module.SIZES["tiny"], init_scale=0.2, **change), Policy()
    )
    noise = lambda path, leaf: (
        leaf + 0.1 * np.random.default_rng(len(path)).normal(size=leaf.shape).astype(np.float32)
    )
    params = tree.map_leaves(noise, jax.jit(model.init)(jax.random.key(0)))
    return Bundle(model, params, None, {"name": f"tiny {kind}", "trained": {"steps": 3}})


@functools.cache
def variant(kind: str, name: str) -> Bundle:
    bundle = plain(kind)
    if name == "plain":
        return bundle
    if name == "bf16":
        return dataclasses.replace(bundle, params=tree.cast(bundle.params, "bfloat16"))
    recipe = MIXED if name == "mixed" else compress.get_recipe(name)
    return compress.compress_bundle(bundle, recipe)[0]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a folder of each kind and variant that the tests below damage."""
    root = tmp_path_factory.mktemp("stored")
    for kind, name in (
        ("gpt2", "plain"),
        ("llama", "plain"),
        ("llama", "mixed"),
        ("llama", "int4-rtn"),
    ):
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
    """Loading raises InputError in one line that has all the parts, and none of those that are to
    be absent.
    """
    with pytest.raises(InputError) as caught:
        from_pretrained(source, **options)
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message
    assert not any(part in message for part in absent), message


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def save_refused(bundle: Bundle, out: Path, *parts: str) -> None:
    """Saving raises InputError in one line, and everything in the folder of `out` is as before."""
    before = contents(out.parent)
    with pytest.raises(InputError) as caught:
        bundle.save_pretrained(out)
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message
    assert contents(out.parent) == before and not [
        path for path in out.parent.iterdir() if path.name.startswith(".")
    ]


def write_gguf(
    path: Path,
    architecture: str = "llama",
    tensors: dict[str, np.ndarray | None] | None = None,
    **metadata: Any,
) -> Path:
    """The golden `llama-untied` as GGUF; `tensors` and `metadata` change what is in it, None leaves
    it out.
    """
    hf = load_file(GOLDENS / "llama-untied" / "model.safetensors")
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
    }
    names |= {
        "self_attn.o_proj": "attn_output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    names |= {f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")}
    names |= {
        "model.layers": "blk",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
    }
    found: dict[str, np.ndarray | None] = {}
    for name, value in hf.items():
        if (
            "q_proj" in name or "k_proj" in name
        ):  # rotary halves become neighbours, a head of 4 rows at a time
            value = value.reshape(-1, 2, 2, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        found[name] = value
    keys = {
        "block_count": 2,
        "embedding_length": 16,
        "feed_forward_length": 24,
        "context_length": 2048,
    }
    keys |= {"attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 4}
    keys |= {"rope.freq_base": 500.0, "attention.layer_norm_rms_epsilon": 1e-2}
    entries: dict[str, Any] = {f"llama.{key}": value for key, value in keys.items()}
    tokens = [chr(i) for i in range(33, 126)] + ["ab", "cd", "<s>", "</s>"]
    vocabulary = {"model": "gpt2", "tokens": tokens, "merges": ["a b", "c d"]}
    entries |= {f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()}
    writer = gguf.GGUFWriter(path, architecture)
    add = {
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
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
