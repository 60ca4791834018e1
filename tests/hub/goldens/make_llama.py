"""The goldens of the Llama family: see `make_goldens.py`, which has the commands, what is written,
and the code.
"""

from __future__ import annotations

from typing import Any

from make_goldens import Tiny, main
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)


def sizes(vocab: int, depth: int = 2, kv_heads: int = 2, **more: Any) -> dict[str, Any]:
    """What the configs of all kinds have; four heads of width 4 unless said otherwise."""
    given = {
        "vocab_size": vocab,
        "hidden_size": 16,
        "num_hidden_layers": depth,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "intermediate_size": 20,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-3,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    return given | more


def rope(kind: str, base: float = 500.0, **more: Any) -> dict[str, Any]:
    """The parameters of a rope that was trained on 16 positions, fewer than any text here."""
    trained = {"original_max_position_embeddings": 16} if kind in ("llama3", "yarn") else {}
    return {"rope_parameters": {"rope_type": kind, "rope_theta": base, **trained, **more}}


_OLD = r"model\.(embed_tokens|layers\.1\.self_attn\.k_proj|layers\.0\.self_attn\.q_proj)\.weight"
_BIASES = r"model\.layers\.1\..*bias"
_FIRST = r"model\.layers\.0\..*"
_SECOND = r"model\.(norm|layers\.1)\..*"
_SCALED = r"model\.(embed_tokens|norm|layers\.1)\..*"
_GEMMA = {"head_dim": 6, "attention_bias": True}
_DIVISORS = {
    "short_factor": [1.0, 1.2],
    "long_factor": [1.5, 5.0],
    "original_max_position_embeddings": 32,
}
_TINY_IMAGE = {
    **{"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8},
    **{"image_size": 4, "patch_size": 4, "vision_use_head": False},
}
_QWEN_MOE = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS = {
    "llama-untied": Tiny(
        3,
        LlamaConfig(
            vocab_size=97,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=24,
            max_position_embeddings=2048,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            rms_norm_eps=1e-2,
        ),
        *(24, 11, _OLD),
        dtype="float32",
    ),
    "llama-tied": Tiny(
        2,
        LlamaConfig(
            vocab_size=101,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=12,  # not hidden_size / heads
            intermediate_size=24,
            max_position_embeddings=24,
            tie_word_embeddings=True,
        ),
        *(24, 17, _OLD),
        dtype="float32",
        shard="12KB",  # several files and an index
    ),
    "llama-linear": Tiny(4, LlamaConfig(**sizes(53, **rope("linear", factor=4.0))), 18, 9, _SECOND),
    "llama-llama3": Tiny(
        5, LlamaConfig(**sizes(59, head_dim=8, **rope("llama3", 100.0, **_LLAMA3))), 18, 10, _SECOND
    ),
    "llama-yarn": Tiny(
        6,
        LlamaConfig(
            **sizes(61, kv_heads=1, head_dim=16, **rope("yarn", 100.0, factor=4.0, beta_fast=4.0))
        ),
        18,
        11,
        _SECOND,
    ),
    "llama-dynamic": Tiny(
        31,
        LlamaConfig(**sizes(53, head_dim=6, **rope("dynamic", 100.0, factor=3.0))),
        18,
        9,
        _SECOND,
    ),
    "llama-biased": Tiny(
        13,
        LlamaConfig(**sizes(53, attention_bias=True, mlp_bias=True, **rope("default"))),
        17,
        9,
        _BIASES,
    ),
    "llama-relu": Tiny(
        30, LlamaConfig(**sizes(53, hidden_act="relu", **rope("default"))), 17, 9, _SECOND
    ),
    "mistral-a": Tiny(
        7, MistralConfig(**sizes(53, sliding_window=5, **rope("default"))), 18, 9, _SECOND
    ),
    "mistral-b": Tiny(
        8,
        MistralConfig(
            **sizes(59, kv_heads=1, head_dim=6, sliding_window=2, tie_word_embeddings=True)
        ),
        *(17, 12, _SECOND),
    ),
    "qwen2-a": Tiny(
        9, Qwen2Config(**sizes(61, initializer_range=0.03, **rope("default"))), 18, 10, _SECOND
    ),
    "qwen2-b": Tiny(
        10,
        Qwen2Config(
            **sizes(
                53,
                kv_heads=4,
                use_sliding_window=True,
                sliding_window=4,
                max_window_layers=1,
                tie_word_embeddings=True,
                **rope("longrope", **_DIVISORS),
            )
        ),
        *(17, 13, _SECOND),
    ),
    "qwen3-a": Tiny(
        11, Qwen3Config(**sizes(59, head_dim=8, tie_word_embeddings=True)), 18, 9, _SECOND
    ),
    "qwen3-b": Tiny(
        12,
        Qwen3Config(
            **sizes(
                61,
                kv_heads=1,
                head_dim=6,
                use_sliding_window=True,
                sliding_window=6,
                max_window_layers=1,
                attention_bias=True,
            ),
            **rope("yarn", 1000.0, factor=4.0, attention_factor=1.3),
        ),
        *(18, 12, _SECOND),
    ),
    "gemma2-a": Tiny(
        13,
        Gemma2Config(
            **sizes(53, sliding_window=4, **_GEMMA),
            **{
                "query_pre_attn_scalar": 20,
                "attn_logit_softcapping": 2.0,
                "final_logit_softcapping": 3.0,
            },
        ),
        *(17, 11, _SCALED),
    ),
    "gemma3_text-a": Tiny(
        14,
        Gemma3TextConfig(
            **sizes(59, 3, kv_heads=1, sliding_window=3, **_GEMMA),
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            query_pre_attn_scalar=10,
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
            },
        ),
        *(17, 12, r"model\.(norm|layers\.2)\..*"),
    ),
    "mixtral-a": Tiny(15, MixtralConfig(**sizes(53, 1), num_local_experts=4), 17, 11, _FIRST),
    "mixtral-b": Tiny(
        16,
        MixtralConfig(
            **sizes(61, kv_heads=1, head_dim=6, sliding_window=5, tie_word_embeddings=True),
            **{"num_local_experts": 5, "num_experts_per_tok": 3},
        ),
        *(18, 9, _SECOND),
    ),
    "qwen3_moe-a": Tiny(
        17,
        Qwen3MoeConfig(
            **sizes(53, 3, head_dim=6, **_QWEN_MOE, mlp_only_layers=[1]), norm_topk_prob=True
        ),
        17,
        11,
        _FIRST,
    ),
    "qwen3_moe-b": Tiny(
        18,
        Qwen3MoeConfig(
            **sizes(
                59,
                kv_heads=4,
                attention_bias=True,
                **_QWEN_MOE,
                decoder_sparse_step=2,
                use_sliding_window=True,
                sliding_window=5,
            )
        ),
        *(17, 9, _SECOND),
    ),
    "gemma3-a": Tiny(
        19,
        Gemma3Config(
            text_config={
                **sizes(61, 3, kv_heads=1, sliding_window=3, head_dim=6, attention_bias=False),
                **{
                    "query_pre_attn_scalar": 10,
                    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                },
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
                    "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
                },
            },
            vision_config=_TINY_IMAGE,
            mm_tokens_per_image=1,
            **{
                "image_token_index": 60,
                "boi_token_index": 58,
                "eoi_token_index": 59,
                "bos_token_id": 0,
                "eos_token_id": 0,
            },
        ),
        *(17, 12, r"model\.(norm|layers\.2)\..*"),
    ),
    "olmo2-a": Tiny(
        20, Olmo2Config(**sizes(53, attention_bias=True, **rope("default"))), 18, 9, _SECOND
    ),
    "olmo3-a": Tiny(
        21,
        Olmo3Config(
            **sizes(59, 3, kv_heads=4, sliding_window=4),
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
                "full_attention": rope("yarn", factor=4.0, beta_fast=4.0, attention_factor=1.2)[
                    "rope_parameters"
                ],
            },
        ),
        *(18, 11, r"model\.(norm|layers\.2)\..*"),
    ),
    "olmo3-b": Tiny(
        22,
        Olmo3Config(**sizes(53, 4, sliding_window=5, tie_word_embeddings=True)),
        17,
        11,
        r"model\.layers\.3\..*",
    ),
    "smollm3-a": Tiny(
        23, SmolLM3Config(**sizes(53, 4, **rope("default"))), 18, 9, r"model\.layers\.3\..*"
    ),
    "smollm3-b": Tiny(
        24,
        SmolLM3Config(
            **sizes(
                59,
                3,
                head_dim=6,
                tie_word_embeddings=False,
                attention_bias=True,
                mlp_bias=True,
                use_sliding_window=False,  # layer_types alone counts
                sliding_window=4,
            ),
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            no_rope_layers=[0, 1, 0],
        ),
        *(17, 12, _SECOND),
    ),
    "granite-a": Tiny(
        25,
        GraniteConfig(
            **sizes(
                53,
                tie_word_embeddings=True,
                attention_bias=True,
                mlp_bias=True,
                **rope("default"),
            ),
            **{
                "embedding_multiplier": 3.0,
                "residual_multiplier": 0.4,
                "attention_multiplier": 0.3,
                "logits_scaling": 0.7,
            },
        ),
        *(18, 10, _SCALED),
    ),
    "gpt_oss-a": Tiny(
        28,
        GptOssConfig(
            **sizes(
                53,
                head_dim=6,
                sliding_window=4,
                num_local_experts=4,
                num_experts_per_tok=2,
                swiglu_limit=0.8,
            ),
            **rope("yarn", 100.0, factor=4.0, beta_fast=4.0, truncate=False),
        ),
        *(18, 11, r"model\.layers\.1\..*"),
    ),
    "phi3-a": Tiny(
        26,
        Phi3Config(
            **sizes(
                53, sliding_window=6, partial_rotary_factor=0.5, original_max_position_embeddings=64
            )
        ),
        *(18, 11, _SECOND),
    ),
    "phi3-b": Tiny(
        27,
        Phi3Config(
            **sizes(59, num_attention_heads=2, kv_heads=1, original_max_position_embeddings=32),
            rope_parameters={
                **{"rope_type": "longrope", "rope_theta": 100.0, "partial_rotary_factor": 0.75},
                **{
                    "original_max_position_embeddings": 32,
                    "short_factor": [1.0, 1.2, 1.5],
                    "long_factor": [1.0, 3.0, 7.0],
                },
            },
        ),
        *(18, 9, _SECOND),
    ),
}

_TIED = {"tied": True, "head_width": 12, "rope_base": 500.0, "norm_eps": 1e-2}
_PLAIN_GEMMA = {"qkv_bias": False, "query_scale": 20**-0.5}
_OLMO = {"qk_norm": True, "wide_qk_norm": True, "pre_norms": False, "post_norms": True}
_YARN = {"kind": "yarn", "factor": 4.0, "context": 32, "sharpen": 1.2}
_LONG = {"kind": "longrope", "factor": 2.0, "context": 64, "near": [1.0, 1.5], "far": [1.0, 4.0]}
_LONG8 = {**_LONG, "near": [1.0] * 4, "far": [3.0] * 4}
WRITTEN = {
    "llama": ("llama", "tiny", {}),
    "llama-tied": ("llama", "tiny", _TIED),
    "llama-bf16": ("llama", "tiny", {}),
    "llama-biased": ("llama", "tiny", {"qkv_bias": True, "o_bias": True, "mlp_bias": True}),
    "llama-linear": ("llama", "tiny", {"rope_scaling": {"kind": "linear", "factor": 4.0}}),
    "llama-llama3": (
        "llama",
        "tiny",
        {"rope_scaling": {"kind": "llama3", "factor": 8.0, "context": 16}},
    ),
    "llama-yarn": (
        "llama",
        "tiny",
        {"rope_scaling": {"kind": "yarn", "factor": 4.0, "context": 16, "sharpen": 1.2}},
    ),
    "llama-dynamic": (
        "llama",
        "tiny",
        {"rope_scaling": {"kind": "dynamic", "factor": 2.0, "context": 64}},
    ),
    "llama-longrope": ("llama", "tiny", {"rope_scaling": _LONG8}),
    "llama-yarn-plain": (
        "llama",
        "tiny",
        {"rope_scaling": {"kind": "yarn", "factor": 4.0, "context": 16}},
    ),
    "mistral": ("llama", "tiny", {"windows": [5]}),
    "qwen2": ("llama", "tiny", {"qkv_bias": True}),
    "qwen2-window": ("llama", "tiny", {"qkv_bias": True, "windows": [0, 7], "tied": True}),
    "qwen3": ("llama", "tiny", {"qk_norm": True}),
    "qwen3-biased": ("llama", "tiny", {"qk_norm": True, "qkv_bias": True, "o_bias": True}),
    "qwen3-window": ("llama", "tiny", {"qk_norm": True, "windows": [0, 0, 7], "tied": True}),
    "gemma2": ("llama", "tiny-gemma", {**_PLAIN_GEMMA, "qk_norm": False, "local_rope_base": None}),
    "gemma3_text": (
        "llama",
        "tiny-gemma",
        {**_PLAIN_GEMMA, "attn_softcap": None, "logit_softcap": None},
    ),
    "gemma3_text-scaled": (
        *("llama", "tiny-gemma"),
        {**_PLAIN_GEMMA, "attn_softcap": None, "rope_scaling": {"kind": "linear", "factor": 8.0}},
    ),
    "olmo2": ("llama", "tiny", _OLMO),
    "olmo3": (
        "llama",
        "tiny",
        {
            **_OLMO,
            "windows": [5, 0],
            "local_rope_base": 1000.0,
            "rope_base": 1000.0,
            "rope_scaling": _YARN,
        },
    ),
    "smollm3": ("llama", "tiny", {"still": [False, True], "windows": [0, 5], "tied": True}),
    "granite": (
        "llama",
        "tiny",
        {"query_scale": 0.3, "embed_scale": 2.0, "residual_scale": 0.3, "logit_divisor": 3.0},
    ),
    "granite-biased": (
        "llama",
        "tiny",
        {"query_scale": 0.3, "qkv_bias": True, "o_bias": True, "mlp_bias": True},
    ),
    "phi3": ("llama", "tiny", {"rotary_width": 4, "windows": [5]}),
    "phi3-long": ("llama", "tiny", {"rotary_width": 4, "rope_scaling": _LONG}),
    "phi3-long-bf16": (
        "llama",
        "tiny",
        {"rope_scaling": {**_LONG, "near": [1.0] * 4, "far": [3.0] * 4, "sharpen": 1.2}},
    ),
    "qwen3_moe": (
        "llama",
        "tiny-moe",
        {"qk_norm": True, "expert_width": 24, "norm_topk": False, "dense_layers": [1]},
    ),
    "qwen3_moe-bf16": ("llama", "tiny-moe", {"qk_norm": True, "expert_width": 48, "windows": [5]}),
    "gpt_oss": ("gpt_oss", "tiny", {"limit": 0.5, "rope_scaling": {**_YARN, "truncate": False}}),
    "mixtral": ("llama", "tiny-moe", {}),
    "mixtral-window": ("llama", "tiny-moe", {"windows": [5], "experts_per_token": 3, "tied": True}),
    "mixtral-bf16": ("llama", "tiny-moe", {}),
}


if __name__ == "__main__":
    main(MODELS, WRITTEN)
