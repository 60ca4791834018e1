"""Files of DINOv2: HF folders of Dinov2Model and Dinov2ForImageClassification."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmodel.hub.families.bert import activation, architecture, labels, linear_names, norm_names
from jaxmodel.hub.families.vit import sizes_to_hf
from jaxmodel.hub.names import Family, Name
from jaxmodel.models import vit

_CLASSES = ("Dinov2ForImageClassification", "Dinov2Model")
_LAYER = {
    "attn/q": "attention.attention.query",
    "attn/k": "attention.attention.key",
    "attn/v": "attention.attention.value",
    "attn/o": "attention.output.dense",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
}


def _names(c: vit.Config) -> list[Name]:
    patch = "dinov2.embeddings.patch_embeddings.projection"
    layer = "dinov2.encoder.layer.{}"
    names = [
        Name("embed/patch", f"{patch}.weight", trailing=(c.channels, c.patch, c.patch)),
        Name("embed/patch_bias", f"{patch}.bias"),
        Name("embed/class", "dinov2.embeddings.cls_token", lead=2),
        Name("embed/positions", "dinov2.embeddings.position_embeddings", lead=1),
        *norm_names("norm", "dinov2.layernorm"),
        *linear_names("head/classes", "classifier"),
    ]
    for part, number in (("attn", 1), ("mlp", 2)):
        names += norm_names(f"blocks/{{}}/{part}_norm", f"{layer}.norm{number}")
        names.append(Name(f"blocks/{{}}/{part}_scale", f"{layer}.layer_scale{number}.lambda1"))
    for ours, theirs in _LAYER.items():
        names += linear_names(f"blocks/{{}}/{ours}", f"{layer}.{theirs}")
    if c.gated:
        names = [name for name in names if "/mlp/" not in name.path]
        names += linear_names("blocks/{}/mlp/down", f"{layer}.mlp.weights_out")
        for i, ours in enumerate(("gate", "up")):
            for name in linear_names(f"blocks/{{}}/mlp/{ours}", f"{layer}.mlp.weights_in"):
                names.append(dataclasses.replace(name, part=(i, (1, 1))))
    return names


def _gated_width(width: int, ratio: float) -> int:
    """F of a feed-forward part with a gate: two thirds, in whole eights."""
    return (int(int(width * ratio) * 2 / 3) + 7) // 8 * 8


def _from_hf(hf: Mapping[str, Any]) -> vit.Config:
    classifies = architecture(hf, _CLASSES, "Dinov2Model") == "Dinov2ForImageClassification"
    gated = bool(hf.get("use_swiglu_ffn"))
    width = hf.get("hidden_size", 768)
    ratio = float(hf.get("mlp_ratio", 4))
    act = activation(hf, "gelu")
    return vit.Config(
        image=hf.get("image_size", 224),
        patch=hf.get("patch_size", 14),
        width=width,
        depth=hf.get("num_hidden_layers", 12),
        heads=hf.get("num_attention_heads", 12),
        mlp_width=_gated_width(width, ratio) if gated else int(width * ratio),
        labels=labels(hf) if classifies else (),
        channels=hf.get("num_channels", 3),
        pool="both" if classifies else "class",
        activation="silu" if gated else act,
        qkv_bias=hf.get("qkv_bias", True),
        norm_eps=hf.get("layer_norm_eps", 1e-6),
        init_scale=hf.get("initializer_range", 0.02),
        layer_scale=True,
        any_size=True,
        gated=gated,
    )


def _to_hf(c: vit.Config) -> dict[str, Any] | None:
    # transformers has only integer ratios
    widths = {
        _gated_width(c.width, float(n)) if c.gated else n * c.width: n for n in range(64, 0, -1)
    }
    if c.mlp_width not in widths:
        return None
    return {
        "architectures": [_CLASSES[0 if c.labels else 1]],
        "model_type": "dinov2",
        **sizes_to_hf(c),
        "mlp_ratio": widths[c.mlp_width],
        "use_swiglu_ffn": c.gated,
        # stands for hidden patches in pre-training; not kept
        "use_mask_token": False,
    }


FAMILY = Family(
    "vit",
    kinds=("dinov2",),
    names=_names,
    config_from_hf=_from_hf,
    config_to_hf=_to_hf,
    ignored=r"embeddings\.mask_token",
    prefix="dinov2.",
    # the outputs of a backbone, and initial values of scales that the file has
    unread="out_features|out_indices|stage_names|apply_layernorm|reshape_hidden_states|layerscale_value",
)
