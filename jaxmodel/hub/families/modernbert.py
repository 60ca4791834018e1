"""Files of ModernBERT.

HF folders of ModernBertForMaskedLM, ModernBertForSequenceClassification and ModernBertModel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmodel.errors import InputError, unknown
from jaxmodel.hub.families.bert import (
    ACTIVATIONS,
    activation_to_hf,
    architecture,
    labels,
    labels_to_hf,
    linear_names,
    norm_names,
)
from jaxmodel.hub.names import Family, Name, fixed
from jaxmodel.models import modernbert
from jaxmodel.models.parts import pattern

_ARCHITECTURES = {
    "ModernBertForMaskedLM": "mlm",
    "ModernBertForSequenceClassification": "classify",
    "ModernBertModel": "embed",
}
_FIXED = {
    # in the earliest files; transformers does not read it
    "position_embedding_type": (
        "rope",
        "absolute",
        "sans_pos",
        None,
    ),
}
_POOLS = {"cls": "class", "mean": "mean"}
_LAYER = {"attn/o": "attn.Wo", "mlp/down": "mlp.Wo"}
_JOINED = {"attn.Wqkv": ("attn/q", "attn/k", "attn/v"), "mlp.Wi": ("mlp/gate", "mlp/up")}
_KINDS = {True: "sliding_attention", False: "full_attention"}
_BIASES = {
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "norm_bias": "norm_bias",
    "head_bias": "classifier_bias",
    "vocab_bias": "decoder_bias",
}


def _names(config: modernbert.Config) -> list[Name]:
    stem = "model.layers.{}"
    names = [
        Name("embed", "model.embeddings.tok_embeddings.weight"),
        *norm_names("embed_norm", "model.embeddings.norm"),
        *norm_names("norm", "model.final_norm"),
        *linear_names("head/dense", "head.dense"),
        *norm_names("head/norm", "head.norm"),
        Name("head/words", "decoder.weight"),
        Name("head/bias", "decoder.bias"),
        *linear_names("head/classes", "classifier"),
    ]
    for theirs, leaves in _JOINED.items():
        for i, ours in enumerate(leaves):
            part = (i, (1,) * len(leaves))
            for name in linear_names(f"blocks/{{}}/{ours}", f"{stem}.{theirs}"):
                names.append(dataclasses.replace(name, part=part))
    for part in ("attn_norm", "mlp_norm"):
        names += norm_names(f"blocks/{{}}/{part}", f"{stem}.{part}")
    for ours, theirs in _LAYER.items():
        names += linear_names(f"blocks/{{}}/{ours}", f"{stem}.{theirs}")
    return names


def _activation(hf: Mapping[str, Any], key: str) -> str:
    if hf.get(key, "gelu") not in ACTIVATIONS:
        raise unknown(f"config.json: {key}", hf.get(key), ACTIVATIONS)
    return ACTIVATIONS[hf.get(key, "gelu")]


def _from_hf(hf: Mapping[str, Any]) -> modernbert.Config:
    fixed(hf, _FIXED)
    head = _ARCHITECTURES[architecture(hf, _ARCHITECTURES, "ModernBertForMaskedLM")]
    depth = hf.get("num_hidden_layers", 22)
    every = hf.get("global_attn_every_n_layers", 3)
    types = hf.get("layer_types") or [_KINDS[bool(i % every)] for i in range(depth)]
    if set(types) - set(_KINDS.values()) or len(types) != depth:
        raise InputError(
            f"config.json: layer_types is {types!r:.60}; allowed: {' or '.join(_KINDS.values())} "
            f"for each of {depth} layers"
        )
    near = hf.get("local_attention", 128) // 2 + 1
    theta = {
        "full_attention": hf.get("global_rope_theta", 160000.0),
        "sliding_attention": hf.get("local_rope_theta", 10000.0),
    }
    for kind, rope in {
        kind: (hf.get("rope_parameters") or {}).get(kind) or {} for kind in theta
    }.items():
        theta[kind] = rope.get("rope_theta", theta[kind])
        if rope.get("rope_type", "default") != "default":
            raise InputError(
                f"config.json: the rope type {rope['rope_type']!r} is not supported; allowed: "
                "'default'"
            )
    if hf.get("rope_scaling"):
        raise InputError(
            "config.json: rope_scaling is given; allowed: none, because this family does not "
            "scale rotary frequencies"
        )
    if hf.get("classifier_pooling", "cls") not in _POOLS:
        raise unknown("config.json: classifier_pooling", hf["classifier_pooling"], _POOLS)
    return modernbert.Config(
        vocab=hf.get("vocab_size", 50368),
        width=hf.get("hidden_size", 768),
        depth=depth,
        heads=hf.get("num_attention_heads", 12),
        mlp_width=hf.get("intermediate_size", 1152),
        context=hf.get("max_position_embeddings", 8192),
        head=head,
        labels=labels(hf) if head == "classify" else (),
        pool=_POOLS[hf.get("classifier_pooling", "cls")] if head == "classify" else "class",
        windows=pattern(tuple(near if kind == _KINDS[True] else 0 for kind in types)),
        rope_base=float(theta["full_attention"]),
        local_rope_base=float(theta["sliding_attention"]),
        activation=_activation(hf, "hidden_activation"),
        head_activation=_activation(hf, "classifier_activation"),
        norm_eps=hf.get("norm_eps", 1e-5),
        init_scale=hf.get("initializer_range", 0.02),
        tied=hf.get("tie_word_embeddings", True) or head != "mlm",
        **{ours: hf.get(theirs, ours == "vocab_bias") for ours, theirs in _BIASES.items()},
    )


def _to_hf(c: modernbert.Config) -> dict[str, Any] | None:
    windows = c.window_of_layers()
    bases = {"full_attention": c.rope_base, "sliding_attention": c.local_rope_base}
    return {
        "architectures": [{ours: theirs for theirs, ours in _ARCHITECTURES.items()}[c.head]],
        "model_type": "modernbert",
        "vocab_size": c.vocab,
        "hidden_size": c.width,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "intermediate_size": c.mlp_width,
        "max_position_embeddings": c.context,
        "local_attention": 2 * (max(windows, default=0) - 1) if any(windows) else 128,
        "layer_types": [_KINDS[bool(window)] for window in windows],
        "global_rope_theta": c.rope_base,
        "local_rope_theta": c.local_rope_base,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()
        },
        "hidden_activation": activation_to_hf(c.activation),
        "classifier_activation": activation_to_hf(c.head_activation),
        "classifier_pooling": {ours: theirs for theirs, ours in _POOLS.items()}[c.pool],
        "norm_eps": c.norm_eps,
        "initializer_range": c.init_scale,
        "tie_word_embeddings": c.tied,
        **{theirs: getattr(c, ours) for ours, theirs in _BIASES.items()},
        # otherwise transformers takes the id of its own vocabulary; a tokenizer's id overrides it
        "pad_token_id": None,
        **(labels_to_hf(c.labels) if c.labels else {}),
    }


FAMILY = Family(
    "modernbert",
    kinds=("modernbert",),
    names=_names,
    config_from_hf=_from_hf,
    config_to_hf=_to_hf,
    ignored=r".*rotary_emb\.inv_freq",
    prefix="model.",
    unread=r"layer_norm_eps|unpad\w*",  # transformers reads norm_eps instead of layer_norm_eps
    copies={"decoder.weight": "embed"},
    head="decoder.weight",
)
