"""Files of Phi 3 and 4: HF folders of Phi3ForCausalLM.

There, q, k and v are one tensor, and so are gate and up.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxmodel.errors import InputError
from jaxmodel.hub.families import llama as of_llama
from jaxmodel.hub.names import Family, Name, fixed
from jaxmodel.models import llama

_LONG = ("longrope", "su", "yarn")  # Phi's names of one scaling; early files have the latter two


def _names(config: llama.Config) -> list[Name]:
    c = config
    own = []
    for tensor, leaves, sizes in (
        ("self_attn.qkv_proj", ("attn/q", "attn/k", "attn/v"), (c.heads, c.kv_heads, c.kv_heads)),
        ("mlp.gate_up_proj", ("mlp/gate", "mlp/up"), (1, 1)),
    ):
        for i, leaf in enumerate(leaves):
            own.append(
                Name(f"blocks/{{}}/{leaf}", f"model.layers.{{}}.{tensor}.weight", part=(i, sizes))
            )
    paths = {name.path for name in own}
    return own + [name for name in of_llama.names(config) if name.path not in paths]


def _from_hf(hf: dict[str, Any]) -> llama.Config:
    # keys of Phi 4 mini
    fixed(hf, {"full_attn_mod": (1,), "interpolate_factor": (1,), "lm_head_bias": (False,)})
    fixed(hf, {"attention_bias": (False,), "mlp_bias": (False,)})
    rope = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    theta = rope.get("rope_theta", hf.get("rope_theta", 10000.0))
    share = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0))
    plain = {
        "rope_theta": theta,
        **dict.fromkeys(("rope_scaling", "rope_parameters", "partial_rotary_factor")),
    }
    c = of_llama.plain(hf | plain, rms_norm_eps=1e-5, max_position_embeddings=4096)
    kind = rope.get("rope_type", rope.get("type", "default"))
    window = hf.get("sliding_window")
    if kind not in ("default", *_LONG):
        raise InputError(
            f"config.json: the rope type {kind!r} is not supported; allowed: 'default', 'longrope'"
        )
    turned = int(c.head_width * share)
    trained = rope.get("original_max_position_embeddings") or hf.get(
        "original_max_position_embeddings"
    )
    long = {"rope_type": "longrope", "original_max_position_embeddings": trained or 4096}
    return dataclasses.replace(
        c,
        windows=(window,) if window else (),
        rotary_width=0 if turned == c.head_width else turned,
        rope_scaling=None
        if kind == "default"
        else of_llama.scaling_from_hf(rope | long | {"partial_rotary_factor": None}, c.context),
    )


def _to_hf(c: llama.Config) -> dict[str, Any] | None:
    if c.head_width * c.heads != c.width or (
        c.rope_scaling is not None and c.rope_scaling.kind != "longrope"
    ):
        return None
    plain = dataclasses.replace(c, rope_scaling=None)
    hf = of_llama.common_to_hf(plain, "phi3", "Phi3ForCausalLM") | {
        "sliding_window": max(c.windows, default=None)
    }
    hf |= {
        "partial_rotary_factor": (c.rotary_width or c.head_width) / c.head_width,
        "pad_token_id": None,
    }
    if (s := c.rope_scaling) is not None:
        said = of_llama.scaling_to_hf(s)
        hf["original_max_position_embeddings"] = said.pop("original_max_position_embeddings")
        if s.factor == c.context / s.context:
            del said["factor"]
        said["type"] = said.pop("rope_type")
        hf["rope_scaling"] = {key: value for key, value in said.items() if value is not None}
    return hf


FAMILY = Family(
    "llama",
    kinds=("phi3",),
    names=_names,
    config_from_hf=_from_hf,
    config_to_hf=_to_hf,
    ignored=of_llama.FAMILY.ignored,
    copies=of_llama.FAMILY.copies,
    unread=of_llama.FAMILY.unread,
)
