"""Files of Qwen 3 with experts: HF folders of Qwen3MoeForCausalLM."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxmodel.hub.families import llama as of_llama
from jaxmodel.hub.names import Family, Name, fixed
from jaxmodel.models import llama

_EXPERTS = {"moe/gate": "gate_proj", "moe/up": "up_proj", "moe/down": "down_proj"}
_HAS = {"max_position_embeddings": 32768, "num_key_value_heads": 4, "use_sliding_window": False}


def _names(config: llama.Config) -> list[Name]:
    stem = "model.layers.{}.mlp"
    own = [Name("blocks/{}/moe/router", f"{stem}.gate.weight")]
    for ours, theirs in _EXPERTS.items():
        own.append(
            Name(
                f"blocks/{{}}/{ours}",
                f"{stem}.experts.{{expert}}.{theirs}.weight",
                experts=config.experts,
            )
        )
    return own + [name for name in of_llama.names(config) if "/moe/" not in name.path]


def _from_hf(hf: dict[str, Any]) -> llama.Config:
    fixed(
        hf, {"use_qk_norm": (True,), "shared_expert_intermediate_size": (0,), "mlp_bias": (False,)}
    )
    step = hf.get("decoder_sparse_step", 1)
    depth = hf["num_hidden_layers"]
    window = hf.get("sliding_window", 4096)
    dense = {i for i in range(depth) if (i + 1) % step} | set(hf.get("mlp_only_layers") or ())
    return dataclasses.replace(
        of_llama.plain(hf, **_HAS),
        windows=(window,) if window and hf.get("use_sliding_window") else (),
        qk_norm=True,
        experts=hf.get("num_experts", hf.get("num_local_experts", 128)),
        experts_per_token=hf.get("num_experts_per_tok", 8),
        balance=hf.get("router_aux_loss_coef", 0.001),
        expert_width=hf.get("moe_intermediate_size", 768),
        norm_topk=hf.get("norm_topk_prob", False),
        dense_layers=tuple(sorted(dense)),
    )


def _to_hf(c: llama.Config) -> dict[str, Any] | None:
    if not c.experts or not c.expert_width:
        return None
    return of_llama.common_to_hf(c, "qwen3_moe", "Qwen3MoeForCausalLM") | {
        "use_sliding_window": bool(c.windows),
        "sliding_window": max(c.windows, default=None),
        "num_experts": c.experts,
        "num_experts_per_tok": c.experts_per_token,
        "router_aux_loss_coef": c.balance,
        "moe_intermediate_size": c.expert_width,
        "norm_topk_prob": c.norm_topk,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(c.dense_layers),
    }


FAMILY = Family(
    "llama",
    kinds=("qwen3_moe",),
    names=_names,
    config_from_hf=_from_hf,
    config_to_hf=_to_hf,
    ignored=of_llama.FAMILY.ignored,
    copies=of_llama.FAMILY.copies,
    unread=of_llama.FAMILY.unread,
)
