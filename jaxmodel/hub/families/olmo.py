"""Files of OLMo 2 and 3: HF folders of Olmo2ForCausalLM and Olmo3ForCausalLM."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxmodel.hub.families import llama as of_llama
from jaxmodel.hub.names import Family, fixed
from jaxmodel.models import llama

_THETA = 500000.0


def _from_hf(hf: dict[str, Any]) -> llama.Config:
    fixed(hf, {"mlp_bias": (False,)})
    third = hf["model_type"] == "olmo3"
    theta = hf.get("rope_theta", _THETA if third else 10000.0)
    parts = dict(hf.get("rope_parameters") or {})
    if third:  # only layers with full attention are scaled
        nested = "full_attention" in parts or "sliding_attention" in parts
        far, near = (
            (parts.get("full_attention") or {}, parts.get("sliding_attention") or {})
            if nested
            else (parts, {})
        )
        far = {"rope_theta": theta, **far, **(hf.get("rope_scaling") or {})}
        near = {"rope_theta": far["rope_theta"], **near}
        hf = hf | {
            "rope_scaling": None,
            "rope_parameters": {"full_attention": far, "sliding_attention": near},
        }
    config = of_llama.plain(
        hf | {"layer_types": None} if third else hf, rms_norm_eps=1e-5, rope_theta=theta
    )
    windows: tuple[int, ...] = ()
    if third:
        depth = config.depth
        window = hf.get("sliding_window", 4096)
        types = hf.get("layer_types") or [
            ("sliding" if (i + 1) % 4 else "full") + "_attention" for i in range(depth)
        ]
        windows = of_llama.windows_of(
            {
                "model_type": "olmo3",
                "num_hidden_layers": depth,
                "sliding_window": window,
                "layer_types": types,
            }
        )
    return dataclasses.replace(
        config,
        windows=windows,
        local_rope_base=config.local_rope_base if any(windows) else None,
        qk_norm=True,
        wide_qk_norm=True,
        pre_norms=False,
        post_norms=True,
    )


def _to_hf(c: llama.Config) -> dict[str, Any] | None:
    if c.pre_norms or c.head_width * c.heads != c.width:
        return None
    if not c.windows:
        return of_llama.common_to_hf(c, "olmo2", "Olmo2ForCausalLM")
    hf = of_llama.common_to_hf(c, "olmo3", "Olmo3ForCausalLM")
    windows = c.window_of_layers()
    kinds = {True: "sliding_attention", False: "full_attention"}
    far = {"rope_type": "default", **hf.get("rope_scaling", {}), "rope_theta": c.rope_base}
    near = {"rope_type": "default", "rope_theta": c.local_rope_base}
    return hf | {
        "sliding_window": max(windows),
        "layer_types": [kinds[bool(window)] for window in windows],
        "rope_parameters": {kinds[False]: far, kinds[True]: near},
    }


FAMILY = Family(
    "llama",
    kinds=("olmo2", "olmo3"),
    names=of_llama.names,
    config_from_hf=_from_hf,
    config_to_hf=_to_hf,
    ignored=of_llama.FAMILY.ignored,
    copies=of_llama.FAMILY.copies,
    unread=of_llama.FAMILY.unread,
)
