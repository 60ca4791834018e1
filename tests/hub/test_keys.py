"""No key of config.json that would change a model is passed over: each kind, each key that
transformers writes, and any other.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxmodel.errors import InputError
from jaxmodel.hub import from_pretrained
from jaxmodel.hub.bundle import read_config
from jaxmodel.hub.families import OWN, families
from jaxmodel.hub.keys import HARMLESS, Keys, defaults

KINDS = sorted(
    kind for family in families().values() for kind in family.kinds if not kind.startswith(OWN)
)
# What transformers does not use either where the other keys are as they are by default.
WITHOUT_EFFECT = {
    "dinov2": {
        *(
            "out_features",
            "out_indices",
            "stage_names",
            "apply_layernorm",
            "reshape_hidden_states",
        ),  # of a backbone
        "layerscale_value",
    },
    "distilbert": {"sinusoidal_pos_embds"},
    "gemma3": {"mm_tokens_per_image", "vision_config"},
    "gemma3_text": {"_sliding_window_pattern"},  # layer_types says it
    "gpt2": {"summary_activation", "summary_proj_to_labels", "summary_type", "summary_use_proj"},
    "phi3": {"original_max_position_embeddings"},
    "qwen2": {"max_window_layers", "sliding_window"},  # use_sliding_window is false
    "qwen3": {"max_window_layers", "sliding_window"},
    "qwen3_moe": {"sliding_window"},
    "smollm3": {"no_rope_layer_interval", "sliding_window", "use_sliding_window"},
    "t5": {"feed_forward_proj"},  # dense_act_fn and is_gated_act say it
    "vit": {"encoder_stride"},
}


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Any]:
    def read(hf: dict[str, Any], **options: Any) -> Any:
        (tmp_path / "config.json").write_text(json.dumps(hf))
        return read_config(tmp_path, **options)[1:]

    return read


def other(value: Any) -> Any:
    """A value of the same kind that is another."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, dict):
        return value | {"odd": 1}
    return {int: 7, float: 7.5, str: "odd", list: ["odd"], type(None): 3}[type(value)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_changes_the_config_or_is_refused(kind: str, read: Any) -> None:
    hf = defaults()[kind]
    usual = read(hf)
    silent = set()
    for key, value in hf.items():
        try:
            if read(hf | {key: other(value)}) == usual and not HARMLESS.fullmatch(key):
                silent.add(key)
        except InputError as error:
            assert "\n" not in str(error)
    assert silent == WITHOUT_EFFECT.get(kind, set())


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_key_is_refused_unless_it_says_nothing(kind: str, read: Any) -> None:
    hf = defaults()[kind]
    for value in (None, False, 0, "", [], {}):
        assert read(hf | {"attention_sharpness": value}) == read(hf)
    for value in (True, 2, 0.5, "yes", [1], {"a": 1}):
        with pytest.raises(
            InputError,
            match=r"attention_sharpness is .*, which is not supported "
            r".*ignore=\['attention_sharpness'\]",
        ):
            read(hf | {"attention_sharpness": value})
        assert read(hf | {"attention_sharpness": value}, ignore=["attention_sharpness"]) == read(hf)


TOWERS = [
    (kind, tower) for kind in ("clip", "siglip") for tower in ("text_config", "vision_config")
]


@pytest.mark.parametrize(("kind", "tower"), [*TOWERS, ("gemma3", "text_config")])
def test_keys_of_a_tower(kind: str, tower: str, read: Any) -> None:
    hf = defaults()[kind]
    odd = hf | {tower: hf[tower] | {"depth_scale": 2.0}}
    with pytest.raises(InputError, match=rf"{tower}\.depth_scale is 2\.0"):
        read(odd)
    assert read(odd, ignore=[f"{tower}.depth_scale"]) == read(hf)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_keys_of_a_rope(key: str, read: Any) -> None:
    hf = {k: v for k, v in defaults()["llama"].items() if k != "rope_parameters"}
    with pytest.raises(InputError, match=rf"{key}\.mrope_section is \[8, 4\]"):
        read(hf | {key: {"rope_type": "linear", "factor": 2.0, "mrope_section": [8, 4]}})
    with pytest.raises(InputError, match="partial_rotary_factor of the rope scaling is 0.5"):
        read(
            hf
            | {key: {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
        )


# What published models have in config.json beside what transformers 5.24 writes by default, and
# means no other model.
_BERT = {
    "directionality": "bidi",
    "pooler_fc_size": 768,
    "pooler_num_attention_heads": 12,
    "pooler_num_fc_layers": 3,
}
_BERT |= {
    "pooler_size_per_head": 128,
    "pooler_type": "first_token_transform",
    "position_embedding_type": "absolute",
}
_GPT2 = {
    "n_ctx": 1024,
    "summary_first_dropout": 0.1,
    "task_specific_params": {"text-generation": {"do_sample": True}},
}
_QWEN = {
    "max_window_layers": 21,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "use_mrope": False,
}
_MOE = {
    "max_window_layers": 62,
    "qkv_bias": False,
    "use_qk_norm": True,
    "shared_expert_intermediate_size": 0,
}
_PHI = {
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "full_attn_mod": 1,
    "interpolate_factor": 1,
}
_MODERN = {
    "layer_norm_eps": 1e-5,
    "position_embedding_type": "absolute",
    "global_attn_every_n_layers": 3,
}
_OLD = {
    "bad_words_ids": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "max_length": 20,
    "temperature": 1.0,
    "top_k": 50,
}
_OLD |= {
    "length_penalty": 1.0,
    "pruned_heads": {},
    "torchscript": False,
    "cross_attention_hidden_size": None,
}
PUBLISHED = [
    ("bert", _BERT | {"gradient_checkpointing": False, "finetuning_task": "rte"}),
    ("bert", {"_num_labels": 2, "output_past": True, "transformers_version": "4.6.0.dev0", **_OLD}),
    (
        "clip",
        {"text_config_dict": None, "vision_config_dict": None, "logit_scale_init_value": 2.6592},
    ),
    (
        "distilbert",
        {"sinusoidal_pos_embds": True, "tie_weights_": True, "output_past": True, "prefix": None},
    ),
    (
        "gemma2",
        {
            "cache_implementation": "hybrid",
            "hidden_act": "gelu_pytorch_tanh",
            "sliding_window_size": 4096,
        },
    ),
    (
        "gemma3_text",
        {
            "sliding_window_pattern": 6,
            "cache_implementation": "hybrid",
            "_sliding_window_pattern": 6,
        },
    ),
    ("gemma3", {"boi_token_index": 255999, "eoi_token_index": 256000, "mm_tokens_per_image": 64}),
    (
        "gpt2",
        _GPT2 | {"scale_attn_weights": True, "reorder_and_upcast_attn": True, "n_inner": None},
    ),
    (
        "gpt_oss",
        {
            "experts_per_token": 4,
            "initial_context_length": 4096,
            "max_seq_len_cached": None,
            "swiglu_limit": 7.0,
        },
    ),
    ("granite", {"rope_scaling": None, "use_cache": True, "unsloth_fixed": True}),
    (
        "llama",
        {
            "is_llama_config": True,
            "rope_interleaved": False,
            "transformers.js_config": {"dtype": "q4"},
            "pretraining_tp": 2,
        },
    ),
    (
        "llama",
        {
            "max_sequence_length": 2048,
            "_attn_implementation_autoset": True,
            "torch_dtype": "float16",
            "pad_token_id": -1,
        },
    ),
    ("mistral", {"unsloth_version": "2025.12.5", "_name_or_path": "somewhere", "use_sdpa": True}),
    ("mixtral", {"router_jitter_noise": 0.01, "output_router_logits": False}),
    (
        "modernbert",
        _MODERN
        | {
            "reference_compile": True,
            "repad_logits_with_grad": False,
            "gradient_checkpointing": False,
        },
    ),
    (
        "phi3",
        _PHI
        | {"mlp_bias": False, "lm_head_bias": False, "attention_bias": False, "resid_pdrop": 0.1},
    ),
    ("qwen2", _QWEN),
    ("qwen3", {"max_window_layers": 36, "rope_scaling": None}),
    ("qwen3_moe", _MOE | {"router_aux_loss_coef": 0.001}),
    ("siglip", {"initializer_factor": 1.0, "text_config": {"model_type": "siglip_text_model"}}),
    ("siglip_vision_model", {"vision_use_head": True, "attn_implementation": None}),
    ("smollm3", {"max_window_layers": 28, "pretraining_tp": 2}),
    (
        "t5",
        {
            "n_positions": 512,
            "output_past": True,
            "task_specific_params": {"summarization": {"num_beams": 4}},
        },
    ),
    (
        "vit",
        {"padding": "max_length", "max_length": 128, "problem_type": "single_label_classification"},
    ),
    (
        "xlm-roberta",
        {"output_past": True, "position_embedding_type": "absolute", "classifier_dropout": 0.1},
    ),
]


@pytest.mark.parametrize(("kind", "more"), PUBLISHED)
def test_what_published_models_say_is_read(kind: str, more: dict[str, Any], read: Any) -> None:
    read(defaults()[kind] | more)


def test_the_first_clips_say_a_tower_twice(read: Any) -> None:
    """As transformers reads them: the second says all of a tower, what it leaves out included."""
    hf = defaults()["clip"]
    text = hf["text_config"] | {"num_hidden_layers": 3, "hidden_act": "gelu"}
    (config, _) = read(hf | {"text_config": text, "text_config_dict": {"num_hidden_layers": 5}})
    assert (config.text.depth, config.text.activation) == (5, "quick_gelu")


def test_a_copy_of_the_keys_that_knows_nothing_is_found_out() -> None:
    hf = Keys({"a": 1, "b": 2})
    assert ({"a": 0, "c": 3} | hf | {"b": 4}) == {"a": 1, "b": 4, "c": 3} and not hf.asked
    assert ({"c": 3} | hf)["a"] == 1 and (hf | {"d": 1}).get("z") is None and hf.asked == {"a", "z"}
    assert {**hf}["b"] == 2 and "b" not in hf.asked


def test_ignore_is_an_argument_of_from_pretrained(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    shutil.copytree(Path(__file__).parent / "goldens" / "llama-tied", folder)
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(hf | {"embedding_gain": 3.0}))
    with pytest.raises(InputError, match="embedding_gain is 3.0"):
        from_pretrained(folder)
    want = from_pretrained(Path(__file__).parent / "goldens" / "llama-tied").model
    assert from_pretrained(folder, ignore="embedding_gain").model is want
    with pytest.raises(InputError, match="ignore: .* only a folder or a hub id has a config.json"):
        from_pretrained("smollm2-135m", ignore=["a"])
