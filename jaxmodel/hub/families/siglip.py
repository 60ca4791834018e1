"""Files of SigLIP, and of SigLIP 2 for images of one size: HF folders of SiglipModel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmodel.errors import InputError
from jaxmodel.hub.families import siglip_vision
from jaxmodel.hub.families.bert import architecture, linear_names
from jaxmodel.hub.families.clip import text_names, tower, tower_to_hf
from jaxmodel.hub.names import Family, Name
from jaxmodel.models import clip


def _names(config: clip.Config) -> list[Name]:
    return [
        *siglip_vision.names(config.image, "image/"),
        *text_names(),
        *linear_names("text_map", "text_model.head"),
        Name("scale", "logit_scale", lead=1),
        Name("bias", "logit_bias", lead=1),
    ]


def _from_hf(hf: Mapping[str, Any]) -> clip.Config:
    architecture(hf, ("SiglipModel",), "SiglipModel")
    text = hf.get("text_config") or {}
    of_text = tower(text, 768, 12, "gelu_pytorch_tanh", 1e-6, "config.json: text_config")
    context = text.get("max_position_embeddings", 64)
    image = siglip_vision.config_from_hf(
        hf.get("vision_config") or {}, "config.json: vision_config"
    )
    shared = text.get("projection_size") or of_text["width"]
    if shared != image.width:
        raise InputError(
            f"config.json: text_config.projection_size is {shared}; allowed: {image.width}, the "
            f"image tower's width"
        )
    return clip.Config(
        text=clip.Text(text.get("vocab_size", 32000), **of_text, context=context),
        image=image,
        shared=shared,
        scale=clip.SIGLIP_SCALE,
        sigmoid=True,
    )


def _to_hf(config: clip.Config) -> dict[str, Any] | None:
    if not config.sigmoid:
        return None
    text = config.text
    of_text = {
        **tower_to_hf("siglip_text_model", text),
        "vocab_size": text.vocab,
        "max_position_embeddings": text.context,
        "projection_size": config.shared,
    }
    of_image = siglip_vision.config_to_hf(config.image)
    return {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "text_config": of_text,
        "vision_config": of_image,
    }


FAMILY = Family(
    "clip",
    kinds=("siglip",),
    names=_names,
    config_from_hf=_from_hf,
    config_to_hf=_to_hf,
    ignored=r"(text|vision)_model\.embeddings\.position_ids",
)
