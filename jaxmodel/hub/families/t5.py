"""Files of T5: HF folders of the original form, of version 1.1 and of Flan-T5."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmodel.errors import unknown
from jaxmodel.hub.families.bert import activation
from jaxmodel.hub.names import Family, Name, fixed
from jaxmodel.models import t5

_FIXED = {"is_encoder_decoder": (True,), "classifier_dropout": (0.0, 0)}


def _names(config: t5.Config) -> list[Name]:
    names = [Name("embed", "shared.weight"), Name("head", "lm_head.weight")]
    _, gated = t5.FORMS[config.mlp]
    mlp = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if gated else {"up": "wi", "down": "wo"}
    for ours, theirs, reads in (("encoder/", "encoder", False), ("", "decoder", True)):
        names.append(Name(f"{ours}norm/weight", f"{theirs}.final_layer_norm.weight"))
        table = f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        names.append(Name(f"{ours}positions", table))
        layer = f"{ours}blocks/{{}}/"
        stem = f"{theirs}.block.{{}}.layer"
        last = 2 if reads else 1
        parts = {f"attn/{x}": f"0.SelfAttention.{x}" for x in "qkvo"} | {
            "attn_norm/weight": "0.layer_norm"
        }
        if reads:
            cross = {"q": "q", "memory_k": "k", "memory_v": "v", "o": "o"}
            parts |= {f"cross/{x}": f"1.EncDecAttention.{y}" for x, y in cross.items()}
            parts["cross_norm/weight"] = "1.layer_norm"
        parts |= {f"mlp/{x}": f"{last}.DenseReluDense.{y}" for x, y in mlp.items()} | {
            "mlp_norm/weight": f"{last}.layer_norm"
        }
        names += [Name(layer + x, f"{stem}.{y}.weight") for x, y in parts.items()]
    return names


def _form(hf: Mapping[str, Any]) -> str:
    """Return the feed-forward form, one of `t5.FORMS`; keys derived from its name take precedence.

    Raises:
      InputError: another form.
    """
    said = hf.get("feed_forward_proj", "relu")
    # the tanh form of GELU is meant, not the exact one
    usual = "gelu_new" if said == "gated-gelu" else said.removeprefix("gated-")
    act = activation(hf, usual, key="dense_act_fn")
    gated = hf.get("is_gated_act", said.startswith("gated-"))
    forms = {
        ("relu", False): "relu",
        ("gelu_tanh", True): "gated-gelu",
        ("silu", True): "gated-silu",
    }
    if (act, gated) not in forms:
        raise unknown(
            "config.json: feed_forward_proj (or dense_act_fn)", "gated-" * gated + act, t5.FORMS
        )
    return forms[act, gated]


def _tied(config: t5.Config, tied: bool) -> t5.Config:
    """Return the config with or without its own head, with the same scale of the head's input."""
    plain = dataclasses.replace(config, tied=tied, head_scale=None)
    return (
        plain
        if plain.scale == config.scale
        else dataclasses.replace(plain, head_scale=config.scale)
    )


def _from_hf(hf: Mapping[str, Any]) -> t5.Config:
    fixed(hf, _FIXED)
    # transformers 5 always writes true; the tensors of the file decide (`_tied`)
    tied = hf.get("tie_word_embeddings", True)
    config = _untouched(hf, tied)
    scaled = hf.get("scale_decoder_outputs", tied)
    return (
        config
        if scaled == tied
        else dataclasses.replace(config, head_scale=config.width**-0.5 if scaled else 1.0)
    )


def _untouched(hf: Mapping[str, Any], tied: bool) -> t5.Config:
    """Return the config without the scale of the head's input."""
    return t5.Config(
        vocab=hf["vocab_size"],
        width=hf["d_model"],
        encoder_depth=hf["num_layers"],
        depth=hf["num_layers"]
        if hf.get("num_decoder_layers") is None
        else hf["num_decoder_layers"],
        heads=hf["num_heads"],
        head_width=hf["d_kv"],
        mlp_width=hf["d_ff"],
        mlp=_form(hf),
        tied=tied,
        buckets=hf.get("relative_attention_num_buckets", 32),
        distance=hf.get("relative_attention_max_distance", 128),
        norm_eps=hf.get("layer_norm_epsilon", 1e-6),
        dropout=hf.get("dropout_rate", 0.1),
        init_scale=hf.get("initializer_factor", 1.0),
        start=hf.get("decoder_start_token_id", hf.get("pad_token_id", 0)) or 0,
        context=hf.get("n_positions", 512),
    )


def _to_hf(config: t5.Config) -> dict[str, Any] | None:
    if config.scale not in (1.0, config.width**-0.5):
        return None
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": config.vocab,
        "d_model": config.width,
        "num_layers": config.encoder_depth,
        "num_decoder_layers": config.depth,
        "num_heads": config.heads,
        "d_kv": config.head_width,
        "d_ff": config.mlp_width,
        "feed_forward_proj": config.mlp,
        "tie_word_embeddings": config.tied,
        "scale_decoder_outputs": config.scale != 1.0,
        "relative_attention_num_buckets": config.buckets,
        "relative_attention_max_distance": config.distance,
        "layer_norm_epsilon": config.norm_eps,
        "dropout_rate": config.dropout,
        "initializer_factor": config.init_scale,
        "decoder_start_token_id": config.start,
        "pad_token_id": config.start,
        "n_positions": config.context,
    }


FAMILY = Family(
    "t5",
    kinds=("t5",),
    names=_names,
    config_from_hf=_from_hf,
    config_to_hf=_to_hf,
    spellings=(
        ("shared.weight", "encoder.embed_tokens.weight"),
        ("shared.weight", "decoder.embed_tokens.weight"),
    ),
    # older files have a table in the first cross-attention layer, which no T5 uses
    ignored=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    settle=lambda config, own: _tied(config, not own),  # a model without a head is always tied
    copies={
        "encoder.embed_tokens.weight": "embed",
        "decoder.embed_tokens.weight": "embed",
        "lm_head.weight": "embed",
    },
)
