"""Names, ropes and parts as others write them, against the same model as we would."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmodel import tree
from jaxmodel.errors import InputError
from jaxmodel.hub import from_pretrained
from jaxmodel.hub.families import family_of
from jaxmodel.hub.families.bert import activation, activation_to_hf
from jaxmodel.hub.families.llama import FAMILY
from jaxmodel.layers import ACTIVATIONS
from jaxmodel.models import llama
from jaxmodel.ops import RopeScaling

GOLDENS = Path(__file__).parent / "goldens"


def renamed(source: str, folder: Path, rename: Any) -> Path:
    shutil.copytree(GOLDENS / source, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {rename(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors"
    )
    return folder


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("model."),
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"language_model.{name}",
        lambda name: f"transformer.{name}",
    ],
)
def test_other_beginnings_of_names(rename: Any, tmp_path: Path) -> None:
    folder = renamed("llama-untied", tmp_path / "a", rename)
    want = tree.fingerprint(from_pretrained(GOLDENS / "llama-untied").params)
    assert tree.fingerprint(from_pretrained(folder).params) == want


@pytest.mark.parametrize("name", ["bert-a", "bert-b", "bert-c"])
def test_norms_by_their_first_names(name: str, tmp_path: Path) -> None:
    old = {"weight": "gamma", "bias": "beta"}
    rename = lambda n: (
        f"{n.rpartition('.')[0]}.{old[n.rpartition('.')[2]]}" if "LayerNorm" in n else n
    )
    folder = renamed(name, tmp_path / "a", rename)
    assert tree.fingerprint(from_pretrained(folder).params) == tree.fingerprint(
        from_pretrained(GOLDENS / name).params
    )


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
BARE = {key: value for key, value in YARN.items() if key != "original_max_position_embeddings"}


@pytest.mark.parametrize(
    ("keys", "base", "context"),
    [  # what transformers 5.24 computes with
        (
            {
                "rope_scaling": YARN,
                "rope_parameters": {"rope_type": "default", "rope_theta": 777.0},
            },
            10000.0,
            32,
        ),
        (
            {
                "rope_scaling": YARN,
                "rope_parameters": {"rope_type": "default"},
                "rope_theta": 555.0,
            },
            555.0,
            32,
        ),
        ({"rope_scaling": None, "rope_parameters": {**YARN, "rope_theta": 777.0}}, 777.0, 32),
        ({"rope_scaling": BARE, "original_max_position_embeddings": 16}, 10000.0, 16),
        (
            {
                "rope_parameters": {**YARN, "rope_theta": 777.0},
                "original_max_position_embeddings": 16,
            },
            777.0,
            16,
        ),
        ({"rope_scaling": BARE}, 10000.0, 128),
    ],
)
def test_a_rope_that_is_said_in_two_places(keys: dict[str, Any], base: float, context: int) -> None:
    sizes = {
        "vocab_size": 9,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 8,
    }
    config = FAMILY.config_from_hf(
        {"model_type": "llama", **sizes, "max_position_embeddings": 128, **keys}
    )
    assert (config.rope_base, config.rope_scaling) == (base, RopeScaling("yarn", 4.0, context))


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "bitsandbytes", "fp8"])
def test_a_refusal_names_who_quantised(method: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDENS / "llama-tied", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": method}})
    )
    with pytest.raises(
        InputError,
        match=f"the weights are quantised by {method}, which is not supported; load the",
    ):
        from_pretrained(tmp_path / "a")


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("pytorch_model.bin", "'pytorch_model.bin' is not supported .*safe_serialization=True"),
        ("model.gguf", "give the file itself: .*model.gguf"),
        ("consolidated.safetensors", "'consolidated.safetensors' is not in HF's layout"),
    ],
)
def test_a_folder_without_weights_that_are_read(file: str, says: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDENS / "llama-untied", tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").rename(tmp_path / "a" / file)
    with pytest.raises(InputError, match=f"'model.safetensors' is missing; {says}"):
        from_pretrained(tmp_path / "a")


def test_adapters_alone(tmp_path: Path) -> None:
    for said, base in (
        ("{}", "the model they were made for"),
        ('{"base_model_name_or_path": "org/base"}', "org/base"),
    ):
        (tmp_path / "adapter_config.json").write_text(said)
        with pytest.raises(
            InputError,
            match=f"it has adapters alone .*from_pretrained.'{base}', adapters='{tmp_path}'",
        ):
            from_pretrained(tmp_path)


def test_adapters_without_what_they_mean(tmp_path: Path) -> None:
    shutil.copytree(GOLDENS / "llama-untied", tmp_path / "a")
    shutil.copy(tmp_path / "a" / "model.safetensors", tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(
        InputError,
        match="'adapter_config.json' is missing, which describes 'adapter_model.safetensors'",
    ):
        from_pretrained(tmp_path / "a")


@pytest.mark.parametrize(
    ("config", "generation", "want"),
    [
        (
            {"bos_token_id": 3, "eos_token_id": 7, "pad_token_id": -1},
            {},
            {"bos_token_id": 3, "eos_token_id": 7, "pad_token_id": -1},
        ),
        (
            {"eos_token_id": 7},
            {"eos_token_id": [7, 9]},
            {"bos_token_id": None, "eos_token_id": [7, 9]},
        ),
        (
            {"bos_token_id": None, "eos_token_id": None},
            {},
            {"bos_token_id": None, "eos_token_id": None},
        ),
    ],
)
def test_the_ends_of_a_text_are_kept_without_a_tokenizer(
    config: Any, generation: Any, want: Any, tmp_path: Path
) -> None:
    shutil.copytree(GOLDENS / "llama-untied", tmp_path / "a")
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    hf = json.loads((tmp_path / "a" / "config.json").read_text())
    hf = {key: value for key, value in hf.items() if key not in keys} | config
    (tmp_path / "a" / "config.json").write_text(json.dumps(hf))
    (tmp_path / "a" / "generation_config.json").write_text(json.dumps(generation))
    once = from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    for folder in (once, from_pretrained(once).save_pretrained(tmp_path / "c")):
        saved = json.loads((folder / "config.json").read_text())
        assert {key: saved[key] for key in keys if key in saved} == want


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("llama-tied", "LlamaForSequenceClassification"),
        ("qwen2-a", "Qwen2ForTokenClassification"),
        ("gpt2-a", "GPT2ForSequenceClassification"),
        ("phi3-a", "Phi3ForSequenceClassification"),
    ],
)
def test_a_class_with_another_head_is_named(source: str, named: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDENS / source, tmp_path / "a")
    hf = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps(hf | {"architectures": [named]}))
    with pytest.raises(InputError, match=f"architectures has '{named}'"):
        from_pretrained(tmp_path / "a")


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_t5_without_its_shared_table(side: str, tmp_path: Path) -> None:
    rename = lambda name: f"{side}.embed_tokens.weight" if name == "shared.weight" else name
    folder = renamed("seq2seq/t5-tied", tmp_path / "a", rename)
    want = tree.fingerprint(from_pretrained(GOLDENS / "seq2seq" / "t5-tied").params)
    assert tree.fingerprint(from_pretrained(folder).params) == want


def test_a_head_of_its_own_is_kept_where_config_json_ties_it(tmp_path: Path) -> None:
    """As transformers 5.24 does: what both are is in the file."""
    shutil.copytree(GOLDENS / "llama-untied", tmp_path / "a")
    hf = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps(hf | {"tie_word_embeddings": True}))
    want = from_pretrained(GOLDENS / "llama-untied")
    found = from_pretrained(tmp_path / "a")
    assert found.model is want.model and tree.fingerprint(found.params) == tree.fingerprint(
        want.params
    )


_TANH = lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
_ERF = lambda x: 0.5 * x * (1 + np.array([math.erf(v / 2**0.5) for v in x]))
_SILU = lambda x: x / (1 + np.exp(-x))


@pytest.mark.parametrize(
    ("formula", "names"),
    [
        (_ERF, ("gelu", "gelu_python")),
        (
            _TANH,
            ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"),
        ),
        (_SILU, ("silu", "swish")),
        (lambda x: x / (1 + np.exp(-1.702 * x)), ("quick_gelu",)),
        (lambda x: np.maximum(x, 0), ("relu",)),
    ],
)
def test_activations_by_every_name_that_transformers_has_for_them(
    formula: Any, names: tuple[str, ...]
) -> None:
    x = np.linspace(-4, 4, 33)
    for name in names:
        ours = activation({"hidden_act": name}, "gelu")
        assert (
            np.abs(np.asarray(ACTIVATIONS[ours](jnp.asarray(x, jnp.float32))) - formula(x)).max()
            < 1e-6
        ), name
        assert activation({"hidden_act": activation_to_hf(ours)}, "") == ours


_GEMMA = {"qkv_bias": False, "query_scale": 20**-0.5, "qk_norm": False, "local_rope_base": None}
_SCALED = {"rope_scaling": RopeScaling("dynamic", 2.0, 64)}
_LONG = RopeScaling("longrope", 1.5, 64, near=(1.0,) * 4, far=(2.0, 3.0, 4.0, 5.0))


@pytest.mark.parametrize(
    ("kind", "size", "change"),
    [
        ("gemma2", "tiny-gemma", {**_GEMMA, **_SCALED}),
        ("gemma2", "tiny-gemma", {**_GEMMA, "windows": ()}),
        ("gemma2", "tiny-gemma", {**_GEMMA, "qkv_bias": True, "o_bias": True}),
        ("qwen3", "tiny", {"qk_norm": True, "qkv_bias": True, "o_bias": True}),
        ("smollm3", "tiny", {"windows": (3, 0)}),
        ("llama", "tiny", _SCALED),
        ("qwen2", "tiny", {"qkv_bias": True, "rope_scaling": _LONG}),
        ("mistral", "tiny", {"windows": (3,), "rope_scaling": _LONG}),
    ],
)
def test_what_a_kind_can_say_is_saved_as_it(kind: str, size: str, change: dict[str, Any]) -> None:
    """And read back as the same; nothing is stored under names that only we read."""
    config = dataclasses.replace(llama.SIZES[size], **change)
    family, hf = family_of(llama.model(config))
    assert hf["model_type"] == kind and family.config_from_hf(hf) == config
