"""Files of GPT-2: HF folders, where q, k and v are one tensor `[in, out]`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmodel.hub.families.bert import activation, activation_to_hf
from jaxmodel.hub.families.llama import causal
from jaxmodel.hub.names import Family, Name, fixed
from jaxmodel.models import gpt2

_FIXED = {
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


def _names(config: gpt2.Config) -> list[Name]:
    names = [
        Name("embed", "transformer.wte.weight"),
        Name("head", "lm_head.weight"),
        Name("positions", "transformer.wpe.weight"),
        Name("norm/weight", "transformer.ln_f.weight"),
        Name("norm/bias", "transformer.ln_f.bias"),
    ]
    layer = "blocks/{}/"
    stem = "transformer.h.{}."
    for ours, theirs in {"attn_norm": "ln_1", "mlp_norm": "ln_2"}.items():
        names += [
            Name(f"{layer}{ours}/{kind}", f"{stem}{theirs}.{kind}") for kind in ("weight", "bias")
        ]
    for i, leaf in enumerate("qkv"):
        names.append(
            Name(
                f"{layer}attn/{leaf}",
                f"{stem}attn.c_attn.weight",
                transposed=True,
                part=(i, (1, 1, 1)),
            )
        )
        names.append(
            Name(f"{layer}attn/{leaf}_bias", f"{stem}attn.c_attn.bias", part=(i, (1, 1, 1)))
        )
    for ours, theirs in {
        "attn/o": "attn.c_proj",
        "mlp/up": "mlp.c_fc",
        "mlp/down": "mlp.c_proj",
    }.items():
        names.append(Name(layer + ours, f"{stem}{theirs}.weight", transposed=True))
        names.append(Name(f"{layer}{ours}_bias", f"{stem}{theirs}.bias"))
    return names


def _from_hf(hf: Mapping[str, Any]) -> gpt2.Config:
    fixed(hf, _FIXED)
    causal(hf)
    inner = hf.get("n_inner")
    return gpt2.Config(
        vocab=hf["vocab_size"],
        width=hf["n_embd"],
        depth=hf["n_layer"],
        heads=hf["n_head"],
        context=hf.get("n_positions", 1024),
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        init_scale=hf.get("initializer_range", 0.02),
        activation=activation(hf, "gelu_new", key="activation_function"),
        mlp_width=0 if inner in (None, 4 * hf["n_embd"]) else inner,
        tied=hf.get("tie_word_embeddings", True),
    )


def _to_hf(config: gpt2.Config) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab,
        "n_embd": config.width,
        "n_layer": config.depth,
        "n_head": config.heads,
        "n_positions": config.context,
        "n_ctx": config.context,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_scale,
        "activation_function": "gelu_new"
        if config.activation == "gelu_tanh"
        else activation_to_hf(config.activation),
        "n_inner": config.mlp_width or None,
        "tie_word_embeddings": config.tied,
    }


FAMILY = Family(
    "gpt2",
    kinds=("gpt2",),
    names=_names,
    config_from_hf=_from_hf,
    config_to_hf=_to_hf,
    ignored=r".*\.attn\.(masked_)?bias",
    prefix="transformer.",
    # the second head of GPT2DoubleHeadsModel
    unread=r"n_ctx|n_special|predict_special_tokens|summary_\w+",
    copies={"lm_head.weight": "embed"},
)
