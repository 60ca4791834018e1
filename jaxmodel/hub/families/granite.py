"""Files of Granite 3: HF folders of GraniteForCausalLM."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxmodel.hub.families import llama as of_llama
from jaxmodel.hub.names import Family
from jaxmodel.models import llama

_FACTORS = {  # ours -> theirs
    "embed_scale": "embedding_multiplier",
    "query_scale": "attention_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_divisor": "logits_scaling",
}


def _from_hf(hf: dict[str, Any]) -> llama.Config:
    factors = {ours: float(hf.get(theirs, 1.0)) for ours, theirs in _FACTORS.items()}
    return dataclasses.replace(of_llama.plain(hf), **factors)  # pyright: ignore[reportArgumentType]


def _to_hf(c: llama.Config) -> dict[str, Any] | None:
    if c.query_scale is None:
        return None
    factors = {theirs: getattr(c, ours) for ours, theirs in _FACTORS.items()}
    return of_llama.common_to_hf(c, "granite", "GraniteForCausalLM") | {
        "mlp_bias": c.mlp_bias,
        **factors,
    }


FAMILY = Family(
    "llama",
    kinds=("granite",),
    names=of_llama.names,
    config_from_hf=_from_hf,
    config_to_hf=_to_hf,
    ignored=of_llama.FAMILY.ignored,
    copies=of_llama.FAMILY.copies,
    unread=of_llama.FAMILY.unread,
)
