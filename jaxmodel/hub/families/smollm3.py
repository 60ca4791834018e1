"""Files of SmolLM3: HF folders of SmolLM3ForCausalLM."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxmodel.errors import InputError
from jaxmodel.hub.families import llama as of_llama
from jaxmodel.hub.names import Family
from jaxmodel.models import llama
from jaxmodel.models.parts import pattern

_HAS = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 4,
    "rope_theta": 2e6,
    "tie_word_embeddings": True,
}


def _from_hf(hf: dict[str, Any]) -> llama.Config:
    depth = hf["num_hidden_layers"]
    every = hf.get("no_rope_layer_interval", 4)
    turned = hf.get("no_rope_layers")
    turned = [bool((i + 1) % every) for i in range(depth)] if turned is None else turned
    if not isinstance(turned, list) or len(turned) < depth:
        raise InputError(
            f"config.json: no_rope_layers is {turned!r:.60}; allowed: a list with 1 or 0 for each "
            f"of {depth} layers"
        )
    still = tuple(not turns for turns in turned[:depth])
    # where layer_types is given, it alone says which layers have windows
    some = bool(hf.get("use_sliding_window") and hf.get("sliding_window"))
    kinds = {True: "sliding_attention", False: "full_attention"}
    types = hf.get("layer_types") or [kinds[some and s] for s in still]
    windows = of_llama.windows_of(hf | {"layer_types": types})
    return dataclasses.replace(
        of_llama.plain(hf | {"layer_types": None}, **_HAS),
        still=pattern(still),
        windows=windows,
    )


def _to_hf(c: llama.Config) -> dict[str, Any] | None:
    if not c.still and not c.windows:
        return None
    windows = c.window_of_layers()
    return of_llama.common_to_hf(c, "smollm3", "SmolLM3ForCausalLM") | {
        "mlp_bias": c.mlp_bias,
        "no_rope_layers": [
            int(not (c.still and c.still[i % len(c.still)])) for i in range(c.depth)
        ],
        "use_sliding_window": any(windows),
        "sliding_window": max(windows) or None,
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
    }


FAMILY = Family(
    "llama",
    kinds=("smollm3",),
    names=of_llama.names,
    config_from_hf=_from_hf,
    config_to_hf=_to_hf,
    ignored=of_llama.FAMILY.ignored,
    copies=of_llama.FAMILY.copies,
    unread=of_llama.FAMILY.unread,
)
