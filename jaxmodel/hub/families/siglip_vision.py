"""Files of SigLIP's image tower.

HF folders of SiglipVisionModel and SiglipForImageClassification, and that part of SiglipModel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmodel.hub.families.bert import (
    architecture,
    labels,
    labels_to_hf,
    linear_names,
    norm_names,
)
from jaxmodel.hub.families.clip import image_names, tower, tower_to_hf
from jaxmodel.hub.names import Family, Name, fixed
from jaxmodel.models import vit

_CLASSIFIER = "SiglipForImageClassification"


def names(c: vit.Config, ours: str = "") -> list[Name]:
    """Return the entries of the tower, which is under `ours` in our tree."""
    pool = f"{ours}attention_pool"
    head = "vision_model.head"
    found = [
        *image_names(c, ours),
        Name(f"{ours}embed/patch_bias", "vision_model.embeddings.patch_embedding.bias"),
        Name(f"{pool}/query", f"{head}.probe", lead=2),
        *norm_names(f"{pool}/norm", f"{head}.layernorm"),
        *linear_names(f"{pool}/attn/o", f"{head}.attention.out_proj"),
        *linear_names(f"{pool}/mlp/up", f"{head}.mlp.fc1"),
        *linear_names(f"{pool}/mlp/down", f"{head}.mlp.fc2"),
        *linear_names(f"{ours}head/classes", "classifier"),
    ]
    for i, leaf in enumerate(("q", "memory_k", "memory_v")):
        for end, kind in (("", "weight"), ("_bias", "bias")):
            found.append(
                Name(
                    f"{pool}/attn/{leaf}{end}",
                    f"{head}.attention.in_proj_{kind}",
                    part=(i, (1, 1, 1)),
                )
            )
    return found


def config_from_hf(hf: Mapping[str, Any], where: str = "config.json") -> vit.Config:
    """Make a config of the tower from config.json or its part `vision_config`."""
    fixed(hf, {"vision_use_head": (True,)})
    return vit.Config(
        image=hf.get("image_size", 224),
        patch=hf.get("patch_size", 16),
        **tower(hf, 768, 12, "gelu_pytorch_tanh", 1e-6, where),
        channels=hf.get("num_channels", 3),
        pool="attention",
    )


def config_to_hf(c: vit.Config) -> dict[str, Any]:
    """Return the keys that `config_from_hf` reads."""
    sizes = {"image_size": c.image, "patch_size": c.patch, "num_channels": c.channels}
    return {**tower_to_hf("siglip_vision_model", c), **sizes, "vision_use_head": True}


def _from_hf(hf: Mapping[str, Any]) -> vit.Config:
    classes = ("SiglipVisionModel", _CLASSIFIER)
    if architecture(hf, classes, "SiglipVisionModel") != _CLASSIFIER:
        return config_from_hf(hf)
    # which reads the mean of the patches, whether the tower has the head of the others or not
    tower = (hf.get("vision_config") or {}) | {"vision_use_head": True}
    config = config_from_hf(tower, "config.json: vision_config")
    return dataclasses.replace(config, pool="mean", labels=labels(hf))


def _to_hf(c: vit.Config) -> dict[str, Any] | None:
    if c.pool == "attention" and not c.labels:
        return {"architectures": ["SiglipVisionModel"], **config_to_hf(c)}
    if c.pool != "mean" or not c.labels:
        return None
    return {
        "architectures": [_CLASSIFIER],
        "model_type": "siglip",
        "vision_config": {**config_to_hf(c), "vision_use_head": False},
        **labels_to_hf(c.labels),
    }


FAMILY = Family(
    "vit",
    kinds=("siglip_vision_model",),
    names=names,
    config_from_hf=_from_hf,
    config_to_hf=_to_hf,
    classes=(_CLASSIFIER,),
    ignored=r"embeddings\.position_ids|head\.(probe|layernorm|attention|mlp).*",
    prefix="vision_model.",
    unread="text_config",
)
