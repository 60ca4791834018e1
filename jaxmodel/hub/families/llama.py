"""Files of the Llama family: Llama, Mistral, Mixtral, Qwen 2 and 3, Gemma 2 and 3 (text)."""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmodel.errors import InputError, unknown
from jaxmodel.hub.families.bert import activation, activation_to_hf
from jaxmodel.hub.gguf import GGUFFile
from jaxmodel.hub.names import Family, Name, fixed
from jaxmodel.models import llama
from jaxmodel.models.parts import pattern
from jaxmodel.ops import RopeScaling
from jaxmodel.ops.rope import KINDS as ROPES, rope_frequencies

_GEMMA = ("gemma2", "gemma3_text")
_BIASED = ("llama", "qwen3", *_GEMMA)  # which can have biases of q, k, v and o

# Defaults of missing keys, where they differ from the default at the key's first use below.
_LONG = {"max_position_embeddings": 131072}
_GROUPED = {"num_key_value_heads": 8}
_QWEN = {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096}
_GEMMA_HAS = {
    "head_dim": 256,
    "num_key_value_heads": 4,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {**_LONG, **_GROUPED, "sliding_window": 4096},
    "mixtral": {
        **_LONG,
        **_GROUPED,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_local_experts": 8,
    },
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
    "gemma2": {
        **_GEMMA_HAS,
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {**_GEMMA_HAS, **_LONG, "rope_theta": 1e6},
}
KINDS = tuple(_DEFAULTS)

# what a scaling of the rotation is made of -> the key of config.json
_OPTIONS = {
    "llama3": {"low": "low_freq_factor", "high": "high_freq_factor"},
    "yarn": {"fast": "beta_fast", "slow": "beta_slow", "sharpen": "attention_factor"},
    "longrope": {"sharpen": "attention_factor"},
}

# leaf -> HF, GGUF
_LAYER = {
    "attn_norm/weight": ("input_layernorm.weight", "attn_norm.weight"),
    "attn/q": ("self_attn.q_proj.weight", "attn_q.weight"),
    "attn/k": ("self_attn.k_proj.weight", "attn_k.weight"),
    "attn/v": ("self_attn.v_proj.weight", "attn_v.weight"),
    "attn/o": ("self_attn.o_proj.weight", "attn_output.weight"),
    "mlp_norm/weight": ("post_attention_layernorm.weight", "ffn_norm.weight"),
    "mlp/gate": ("mlp.gate_proj.weight", "ffn_gate.weight"),
    "mlp/up": ("mlp.up_proj.weight", "ffn_up.weight"),
    "mlp/down": ("mlp.down_proj.weight", "ffn_down.weight"),
    "attn/q_bias": ("self_attn.q_proj.bias", "attn_q.bias"),
    "attn/k_bias": ("self_attn.k_proj.bias", "attn_k.bias"),
    "attn/v_bias": ("self_attn.v_proj.bias", "attn_v.bias"),
    "attn/o_bias": ("self_attn.o_proj.bias", "attn_output.bias"),
    "mlp/gate_bias": ("mlp.gate_proj.bias", "ffn_gate.bias"),
    "mlp/up_bias": ("mlp.up_proj.bias", "ffn_up.bias"),
    "mlp/down_bias": ("mlp.down_proj.bias", "ffn_down.bias"),
    "attn/q_norm/weight": ("self_attn.q_norm.weight", "attn_q_norm.weight"),
    "attn/k_norm/weight": ("self_attn.k_norm.weight", "attn_k_norm.weight"),
    "moe/router": ("block_sparse_moe.gate.weight", "ffn_gate_inp.weight"),
}
_EXPERTS = {
    "moe/gate": ("block_sparse_moe.experts.{expert}.w1.weight", "ffn_gate_exps.weight"),
    "moe/up": ("block_sparse_moe.experts.{expert}.w3.weight", "ffn_up_exps.weight"),
    "moe/down": ("block_sparse_moe.experts.{expert}.w2.weight", "ffn_down_exps.weight"),
}
_POST_NORMS = {
    "attn_post_norm/weight": "post_attention_layernorm.weight",
    "mlp_norm/weight": "pre_feedforward_layernorm.weight",
    "mlp_post_norm/weight": "post_feedforward_layernorm.weight",
}
_TOP = {
    "embed": ("model.embed_tokens.weight", "token_embd.weight"),
    "norm/weight": ("model.norm.weight", "output_norm.weight"),
    "head": ("lm_head.weight", "output.weight"),
}


def names(config: llama.Config) -> list[Name]:
    """Return the entries of these files."""
    layer = {ours: theirs for ours, (theirs, _) in _LAYER.items()} | (
        _POST_NORMS if config.post_norms else {}
    )
    entries = [
        Name(f"blocks/{{}}/{ours}", f"model.layers.{{}}.{theirs}") for ours, theirs in layer.items()
    ]
    # transformers joins gate, up and experts in memory, but not in files
    for ours, (
        theirs,
        _,
    ) in _EXPERTS.items():
        entries.append(
            Name(f"blocks/{{}}/{ours}", f"model.layers.{{}}.{theirs}", experts=config.experts)
        )
    return entries + [Name(ours, theirs) for ours, (theirs, _) in _TOP.items()]


def config_from_hf(hf: dict[str, Any]) -> llama.Config:
    """Make a config from a config.json of these kinds."""
    kind = hf["model_type"]
    gemma = hf["model_type"] in _GEMMA
    causal(hf)
    hf = _DEFAULTS[kind] | hf
    biased = bool(hf.get("attention_bias")) and kind in _BIASED
    without = {} if kind in _BIASED else {"attention_bias": (False,)}
    without |= {} if kind == "llama" else {"mlp_bias": (False,)}
    act = (
        activation(hf, "gelu_pytorch_tanh", key="hidden_activation")
        if gemma
        else activation(hf, "silu")
    )
    if kind == "gemma3_text":  # transformers reads the key but does not use it
        fixed(hf, {"attn_logit_softcapping": (None,)})
    fixed(
        hf,
        {
            **without,
            "use_bidirectional_attention": (False, None),
            "partial_rotary_factor": (1.0, None),
        },
    )
    heads = hf["num_attention_heads"]
    local = None
    # If both are present, rope_scaling counts, with the context beside it: people add it to files
    # that transformers 5 saved.
    rope = hf.get("rope_parameters") or {}
    extended = hf.get("rope_scaling") or {}
    if "full_attention" in rope and "full_attention" not in extended:
        rope = {**rope, "full_attention": {**rope["full_attention"], **extended}}
    else:
        rope = extended or rope
    if (
        trained := hf.get("original_max_position_embeddings")
    ) is not None and "full_attention" not in rope:
        rope = {**rope, "original_max_position_embeddings": trained}
    if "full_attention" in rope:  # transformers 5: one entry for each kind of layer
        local = rope.get("sliding_attention", {})
        rope = rope["full_attention"]
    elif kind == "gemma3_text":
        local = {"rope_theta": hf.get("rope_local_base_freq", 10000.0)}
    if local is not None and local.get("rope_type", "default") != "default":
        raise InputError(
            f"config.json: the rope type {local['rope_type']!r} in layers with a window is not "
            "supported"
        )
    scaling = scaling_from_hf(rope, hf.get("max_position_embeddings", 2048))
    caps = {"attn_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"}
    softcaps: dict[str, Any] = {ours: hf.get(theirs) for ours, theirs in caps.items() if gemma}
    return llama.Config(
        vocab=hf["vocab_size"],
        width=hf["hidden_size"],
        depth=hf["num_hidden_layers"],
        heads=heads,
        kv_heads=hf.get("num_key_value_heads") or heads,
        head_width=hf.get("head_dim") or hf["hidden_size"] // heads,
        mlp_width=hf["intermediate_size"],
        context=context_of(scaling, hf.get("max_position_embeddings", 2048)),
        rope_base=float(rope.get("rope_theta", hf.get("rope_theta", 10000.0))),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        tied=hf.get("tie_word_embeddings", False),
        init_scale=hf.get("initializer_range", 0.02),
        rope_scaling=scaling,
        windows=windows_of(hf),
        local_rope_base=None if local is None else float(local["rope_theta"]),
        qkv_bias=kind == "qwen2" or biased,
        o_bias=biased,
        mlp_bias=kind == "llama" and bool(hf.get("mlp_bias")),
        qk_norm=kind in ("qwen3", "gemma3_text"),
        activation=act,
        norm_offset=1.0 if gemma else 0.0,
        post_norms=gemma,
        embed_scale=hf["hidden_size"] ** 0.5 if gemma else 1.0,
        query_scale=hf.get("query_pre_attn_scalar", 256) ** -0.5 if gemma else None,
        experts=hf["num_local_experts"] if kind == "mixtral" else 0,
        experts_per_token=hf.get("num_experts_per_tok", 2) if kind == "mixtral" else 2,
        balance=hf.get("router_aux_loss_coef", 0.001)
        if kind == "mixtral"
        else llama.Config.balance,
        **softcaps,
    )


def causal(hf: Mapping[str, Any]) -> None:
    """Refuse a class whose head does not predict the next token.

    Raises:
      InputError: such a class.
    """
    for named in hf.get("architectures") or ():
        if re.search(r"For(?!CausalLM|ConditionalGeneration)[A-Z]", named):
            raise InputError(
                f"config.json: architectures has {named!r}; allowed: of this family, the "
                "next-token head alone"
            )


def plain(hf: dict[str, Any], **defaults: Any) -> llama.Config:
    """Return the config of the keys that mean the same in Llama; other families start from it.

    Args:
      hf: config.json.
      defaults: values of missing keys.
    """
    return config_from_hf(defaults | hf | {"model_type": "llama"})


def scaling_from_hf(rope: Mapping[str, Any], context: int) -> RopeScaling | None:
    """Return the scaling in `rope_scaling` or `rope_parameters`, for `context` tokens."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) not in (1.0, None):
        raise InputError(
            f"config.json: partial_rotary_factor of the rope scaling is "
            f"{rope['partial_rotary_factor']!r}; allowed: 1.0"
        )
    if kind == "default":
        return None
    if kind not in ROPES:
        raise unknown("config.json: the rope type", kind, ("default", *ROPES))
    options: dict[str, Any] = {
        ours: float(rope[theirs])
        for ours, theirs in _OPTIONS.get(kind, {}).items()
        if rope.get(theirs) is not None
    }
    trained = int(rope.get("original_max_position_embeddings") or context)
    if kind == "longrope":
        # of which only the gain is made: 1 for a context that did not grow
        factor = context / trained if rope.get("factor") is None else float(rope["factor"])
        near, far = (_divisors(rope, key) for key in ("short_factor", "long_factor"))
        return RopeScaling(kind, max(factor, 1.0), trained, **options, near=near, far=far)
    if rope.get("factor") is None:
        raise InputError(f"config.json: the rope scaling {kind!r} has no factor")
    factor = float(rope["factor"])
    trained = {"linear": 0, "dynamic": context}.get(kind, trained)
    if kind == "yarn" and rope.get("truncate") is False:
        options["truncate"] = False
    if kind == "yarn" and rope.get("mscale") and rope.get("mscale_all_dim"):
        gains = (0.1 * rope[key] * math.log(factor) + 1 for key in ("mscale", "mscale_all_dim"))
        options.setdefault("sharpen", operator.truediv(*gains))
    return RopeScaling(kind, factor, trained, **options)


def _divisors(rope: Mapping[str, Any], key: str) -> tuple[float, ...]:
    if not isinstance(rope.get(key), list):
        raise InputError(
            f"config.json: {key} of the rope scaling is {rope.get(key)!r}; allowed: a list of "
            f"numbers"
        )
    return tuple(map(float, rope[key]))


def context_of(scaling: RopeScaling | None, said: int) -> int:
    """Return the longest sequence of a model whose config.json says `said` positions.

    Of a "dynamic" scaling these are the positions of the training, beyond which it begins.
    """
    if scaling is None or scaling.kind != "dynamic":
        return said
    return int(said * scaling.factor)


def windows_of(hf: dict[str, Any]) -> tuple[int, ...]:
    """Return the windows of the layers, as the shortest pattern that repeats."""
    window = hf.get("sliding_window")
    depth = hf["num_hidden_layers"]
    alike = {
        "llama": "full_attention",
        "mistral": "sliding_attention",
        "mixtral": "sliding_attention",
    }
    kind = hf["model_type"]
    types = hf.get("layer_types")
    near_from = hf.get("max_window_layers", 28)
    every = {"gemma2": 2, "gemma3_text": hf.get("sliding_window_pattern") or 6}
    if unknown := set(types or ()) - {"sliding_attention", "full_attention"}:
        raise InputError(
            f"config.json: layer_types has {min(unknown)!r}; allowed: 'sliding_attention', "
            f"'full_attention'"
        )
    # transformers ignores the key there
    if kind in alike and types and window and set(types) != {alike[kind]}:
        raise InputError(
            f"config.json: layer_types is {types!r:.60}; allowed: {alike[kind]!r} alone, because "
            f"{kind!r} has it in every layer"
        )
    if (
        not window
        or kind == "llama"
        or (kind in ("qwen2", "qwen3") and not hf.get("use_sliding_window"))
    ):
        return ()
    if types is None:
        if kind in ("qwen2", "qwen3"):
            near = [i >= near_from for i in range(depth)]
        else:
            near = [
                kind in ("mistral", "mixtral") or bool((i + 1) % every[kind]) for i in range(depth)
            ]
        types = ["sliding_attention" if n else "full_attention" for n in near]
    windows = tuple(window if t == "sliding_attention" else 0 for t in types)
    return pattern(windows)


def _kind(c: llama.Config) -> str | None:
    """Return the `model_type` whose models have exactly this config; None if there is none."""
    if c.o_bias or c.mlp_bias:
        kind = _kind(dataclasses.replace(c, qkv_bias=False, o_bias=False, mlp_bias=False))
        has = kind in _BIASED and c.qkv_bias == c.o_bias and (kind == "llama" or not c.mlp_bias)
        return kind if has else None
    if (c.norm_offset == 1.0) != c.post_norms:
        return None
    if c.post_norms:
        # files store an integer
        scaled = c.query_scale is not None and round(c.query_scale**-2) ** -0.5 == c.query_scale
        if (
            c.experts
            or c.qkv_bias
            or c.embed_scale != c.width**0.5
            or not scaled
            or len(set(c.windows) - {0}) > 1
        ):
            return None
        if c.qk_norm:
            return (
                "gemma3_text" if c.local_rope_base is not None and c.attn_softcap is None else None
            )
        return "gemma2" if c.local_rope_base is None else None
    plain = (
        c.embed_scale == 1
        and c.query_scale is None
        and c.attn_softcap is None
        and c.logit_softcap is None
    )
    if not plain or c.local_rope_base is not None or (c.qk_norm and c.qkv_bias):
        return None
    if c.experts:
        return "mixtral" if not (c.qk_norm or c.qkv_bias) and len(c.windows) <= 1 else None
    if c.qk_norm or c.qkv_bias:
        return "qwen3" if c.qk_norm else "qwen2"
    if len(c.windows) > 1:
        return None
    return "mistral" if any(c.windows) else "llama"


_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


def common_to_hf(c: llama.Config, kind: str, architecture: str) -> dict[str, Any]:
    """Return the keys of config.json that every kind has."""
    hf: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": kind,
        "vocab_size": c.vocab,
        "hidden_size": c.width,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_width,
        "intermediate_size": c.mlp_width,
        "max_position_embeddings": c.context,
        "rope_theta": c.rope_base,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied,
        "initializer_range": c.init_scale,
        "attention_bias": c.o_bias,
    }
    hf["hidden_activation" if kind in _GEMMA else "hidden_act"] = activation_to_hf(c.activation)
    if c.rope_scaling is not None:
        hf["rope_scaling"] = scaling_to_hf(c.rope_scaling)
        if c.rope_scaling.kind == "dynamic":
            hf["max_position_embeddings"] = c.rope_scaling.context
    return hf


def config_to_hf(c: llama.Config) -> dict[str, Any] | None:
    """Return the config.json of the kind that fits this config; None if there is none."""
    kind = _kind(c)
    if kind is None:
        return None
    hf = common_to_hf(c, kind, _CLASSES[kind])
    if kind == "llama":
        hf["mlp_bias"] = c.mlp_bias
    windows = c.window_of_layers()
    if kind != "llama":
        hf["sliding_window"] = max(windows) or None
    if kind in ("qwen2", "qwen3"):
        hf["use_sliding_window"] = any(windows)
    if kind == "mixtral":
        hf |= {
            "num_local_experts": c.experts,
            "num_experts_per_tok": c.experts_per_token,
            "router_aux_loss_coef": c.balance,
        }
    if kind in (*_GEMMA, "qwen2", "qwen3"):
        hf["layer_types"] = ["sliding_attention" if w else "full_attention" for w in windows]
    if kind in _GEMMA:
        assert c.query_scale is not None
        hf["query_pre_attn_scalar"] = round(c.query_scale**-2)
        hf |= {"attn_logit_softcapping": c.attn_softcap, "final_logit_softcapping": c.logit_softcap}
    if kind == "gemma3_text":
        hf["rope_local_base_freq"] = c.local_rope_base
    return hf


def scaling_to_hf(s: RopeScaling) -> dict[str, Any]:
    """Return the object of config.json that describes a scaling."""
    hf: dict[str, Any] = {"rope_type": s.kind, "factor": s.factor}
    if s.kind not in ("linear", "dynamic"):
        hf["original_max_position_embeddings"] = s.context
    hf |= {theirs: getattr(s, ours) for ours, theirs in _OPTIONS.get(s.kind, {}).items()}
    if s.kind == "yarn":
        hf["truncate"] = s.truncate
    if s.kind == "longrope":
        hf |= {"short_factor": list(s.near), "long_factor": list(s.far)}
    return hf


# --------------------------------------------------------------------------------------------- GGUF


def _gguf_names(config: llama.Config) -> list[Name]:
    # For its own rotation, llama.cpp reorders the rotary pairs of q and k, but only in files of the
    # architecture "llama"
    paired = not (config.qkv_bias or config.qk_norm)
    heads = {"attn/q": config.heads, "attn/k": config.kv_heads} if paired else {}
    layer = {ours: theirs for ours, (_, theirs) in (_LAYER | _EXPERTS).items()}
    entries = [
        Name(f"blocks/{{}}/{ours}", f"blk.{{}}.{theirs}", pairs=heads.get(ours, 0))
        for ours, theirs in layer.items()
    ]
    return entries + [Name(ours, theirs) for ours, (_, theirs) in _TOP.items()]


def _from_gguf(file: GGUFFile) -> llama.Config:
    metadata = file.metadata
    kind = file.metadata["general.architecture"]

    def get(key: str, *default: Any) -> Any:
        if f"{kind}.{key}" in metadata:
            return metadata[f"{kind}.{key}"]
        if default:
            return default[0]
        raise InputError(f"the metadata '{kind}.{key}' is missing")

    scaling = get("rope.scaling.type", "none")
    if scaling != "none":
        raise InputError(f"the rope scaling {scaling!r} is not supported; allowed: 'none'")
    heads = get("attention.head_count")
    width = get("embedding_length")
    if not isinstance(heads, int) or heads < 1 or not isinstance(width, int):
        raise InputError(
            f"attention.head_count, embedding_length: {heads!r}, {width!r}; allowed: whole numbers "
            "of at least 1"
        )
    head_width = get("attention.key_length", get("rope.dimension_count", width // heads))
    turned = get("rope.dimension_count", head_width)
    # its rows are ordered for the rotation of whole heads
    if turned != head_width and kind == "llama":
        raise InputError(
            f"rope.dimension_count is {turned}; allowed: {head_width}, the width of a head"
        )
    base = float(get("rope.freq_base", 10000.0))
    return llama.Config(
        vocab=get("vocab_size", None)
        or len(metadata.get("tokenizer.ggml.tokens") or get("vocab_size")),
        width=width,
        depth=get("block_count"),
        heads=heads,
        kv_heads=get("attention.head_count_kv", heads),
        head_width=head_width,
        mlp_width=get("feed_forward_length"),
        context=get("context_length"),
        rope_base=base,
        norm_eps=float(np.float32(get("attention.layer_norm_rms_epsilon"))),
        tied="output.weight" not in file.tensors,
        rope_scaling=_scaling_of_divisors(file.read(_DIVISORS), head_width, base)
        if _DIVISORS in file.tensors
        else None,
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        experts=get("expert_count", 0),
        experts_per_token=get("expert_used_count", 2),
        rotary_width=0 if turned == head_width else turned,
    )


_DIVISORS = "rope_freqs.weight"


def _scaling_of_divisors(divisors: np.ndarray, head_width: int, base: float) -> RopeScaling:
    """Return the scaling of Llama 3 from the frequency divisors that llama.cpp's files keep.

    Raises:
      InputError: the divisors do not follow from the constants of Llama 3.1 and later.
    """
    factor = float(divisors.max(initial=0))
    if divisors.shape == (head_width // 2,) and factor > 1:
        scaling = RopeScaling("llama3", factor, context=8192)
        frequency = rope_frequencies(head_width, base)
        # the accuracy of float32
        if np.allclose(divisors, frequency / scaling.apply(frequency, base), rtol=2e-5, atol=0):
            return scaling
    raise InputError(
        f"the tensor {_DIVISORS!r} has shape {list(divisors.shape)} and values up to {factor:g}; "
        f"allowed: {head_width // 2} "
        "divisors of the rope scaling 'llama3' with the constants 1, 4 and 8192"
    )


FAMILY = Family(
    "llama",
    kinds=KINDS,
    names=names,
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    ignored=r".*rotary_emb\.inv_freq",
    # Gemma states these elsewhere
    unread="is_llama_config|hidden_act|sliding_window_size|_sliding_window_pattern",
    copies={"lm_head.weight": "embed"},
    gguf_kinds=("llama", "qwen2", "qwen3"),
    gguf_names=_gguf_names,
    config_from_gguf=_from_gguf,
    gguf_ignored=re.escape(_DIVISORS),
)
