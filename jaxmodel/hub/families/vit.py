"""Files of the vision transformer: HF folders of ViTForImageClassification and ViTModel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmodel.hub.families.bert import (
    activation,
    activation_to_hf,
    architecture,
    labels,
    labels_to_hf,
    linear_names,
    norm_names,
)
from jaxmodel.hub.names import Family, Name, fixed
from jaxmodel.models import vit

_LAYER = {
    "attn/q": "attention.attention.query",
    "attn/k": "attention.attention.key",
    "attn/v": "attention.attention.value",
    "attn/o": "attention.output.dense",
    "mlp/up": "intermediate.dense",
    "mlp/down": "output.dense",
}


def _names(c: vit.Config) -> list[Name]:
    patch = "vit.embeddings.patch_embeddings.projection"
    names = [
        Name("embed/patch", f"{patch}.weight", trailing=(c.channels, c.patch, c.patch)),
        Name("embed/patch_bias", f"{patch}.bias"),
        Name("embed/class", "vit.embeddings.cls_token", lead=2),
        Name("embed/positions", "vit.embeddings.position_embeddings", lead=1),
        *norm_names("blocks/{}/attn_norm", "vit.encoder.layer.{}.layernorm_before"),
        *norm_names("blocks/{}/mlp_norm", "vit.encoder.layer.{}.layernorm_after"),
        *norm_names("norm", "vit.layernorm"),
        *linear_names("head/pool", "vit.pooler.dense"),
        *linear_names("head/classes", "classifier"),
    ]
    for ours, theirs in _LAYER.items():
        names += linear_names(f"blocks/{{}}/{ours}", f"vit.encoder.layer.{{}}.{theirs}")
    return names


def _from_hf(hf: Mapping[str, Any]) -> vit.Config:
    classifies = (
        architecture(hf, _CLASSES, "ViTForImageClassification") == "ViTForImageClassification"
    )
    fixed(hf, {"pooler_act": ("tanh",), "pooler_output_size": (hf["hidden_size"], None)})
    return vit.Config(
        image=hf.get("image_size", 224),
        patch=hf.get("patch_size", 16),
        width=hf["hidden_size"],
        depth=hf["num_hidden_layers"],
        heads=hf["num_attention_heads"],
        mlp_width=hf["intermediate_size"],
        labels=labels(hf) if classifies else (),
        channels=hf.get("num_channels", 3),
        pool_dense=not classifies and hf.get("add_pooling_layer", True),
        activation=activation(hf, "gelu"),
        qkv_bias=hf.get("qkv_bias", True),
        norm_eps=hf.get("layer_norm_eps", 1e-12),
        init_scale=hf.get("initializer_range", 0.02),
    )


_CLASSES = ("ViTForImageClassification", "ViTModel")


def _to_hf(c: vit.Config) -> dict[str, Any] | None:
    if c.pool != "class" or c.embed_norm or not c.patch_bias or (c.labels and c.pool_dense):
        return None
    hf = {
        "architectures": [_CLASSES[0 if c.labels else 1]],
        "model_type": "vit",
        "intermediate_size": c.mlp_width,
    }
    # A ViTModel's config.json does not say whether there is a pooler: in transformers this is an
    # argument of the class. The key is ours.
    return hf | sizes_to_hf(c) | ({} if c.labels else {"add_pooling_layer": c.pool_dense})


def sizes_to_hf(c: vit.Config) -> dict[str, Any]:
    """Return the keys that the config.json of every vision transformer has."""
    return {
        "image_size": c.image,
        "patch_size": c.patch,
        "num_channels": c.channels,
        "hidden_size": c.width,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "hidden_act": activation_to_hf(c.activation),
        "qkv_bias": c.qkv_bias,
        "layer_norm_eps": c.norm_eps,
        "initializer_range": c.init_scale,
        **(labels_to_hf(c.labels) if c.labels else {}),
    }


FAMILY = Family(
    "vit",
    kinds=("vit",),
    names=_names,
    config_from_hf=_from_hf,
    config_to_hf=_to_hf,
    prefix="vit.",
    unread=r"encoder_stride|padding",
)
