"""Files of Phi 3 and 4: HF folders of Phi3ForCausalLM.

There, q, k and v are one tensor, and so are gate and up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmodel.errors import InputError
from jaxmodel.hub.families import llama as of_llama
from jaxmodel.hub.names import Family, Name, fixed
from jaxmodel.models import llama
from jaxmodel.ops import RopeScaling

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
            f"config.json: the rope type {kind!r} is not read; allowed: 'default', 'longrope'"
        )
    turned = int(c.head_width * share)
    return dataclasses.replace(
        c,
        windows=(window,) if window else (),
        rotary_width=0 if turned == c.head_width else turned,
        rope_scaling=None if kind == "default" else _scaling(hf, rope, c.context),
    )


def _scaling(hf: Mapping[str, Any], rope: Mapping[str, Any], context: int) -> RopeScaling:
    trained = (
        rope.get("original_max_position_embeddings")
        or hf.get("original_max_position_embeddings")
        or 4096
    )
    factor = rope.get("factor")
    sharpen = rope.get("attention_factor")
    lists = []
    for key in ("short_factor", "long_factor"):
        if not isinstance(rope.get(key), list):
            raise InputError(
                f"config.json: {key} of the rope scaling is {rope.get(key)!r}; allowed: a list of "
                f"numbers"
            )
        lists.append(tuple(map(float, rope[key])))
    factor = float(context / trained if factor is None else factor)
    return RopeScaling(
        *("longrope", factor, trained),
        sharpen=None if sharpen is None else float(sharpen),
        near=lists[0],
        far=lists[1],
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
        sharpen = {} if s.sharpen is None else {"attention_factor": s.sharpen}
        hf["original_max_position_embeddings"] = s.context
        hf["rope_scaling"] = {
            "type": "longrope",
            "short_factor": list(s.near),
            "long_factor": list(s.far),
            **sharpen,
        }
        if s.factor != c.context / s.context:
            hf["rope_scaling"]["factor"] = s.factor
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
