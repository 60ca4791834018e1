"""Files of CLIP: HF folders of CLIPModel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmodel.hub import keys
from jaxmodel.hub.families.bert import (
    activation,
    activation_to_hf,
    architecture,
    linear_names,
    norm_names,
)
from jaxmodel.hub.names import Family, Name
from jaxmodel.models import clip, vit

_LAYER = {
    "attn/q": "self_attn.q_proj",
    "attn/k": "self_attn.k_proj",
    "attn/v": "self_attn.v_proj",
    "attn/o": "self_attn.out_proj",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
}
_OLD_END = 2  # the end-of-text id in files of the first CLIP, which stands for the highest id


def tower_names(stem: str, ours: str = "") -> list[Name]:
    """Return the entries of the layers of a CLIP or SigLIP tower.

    They are under `stem` in the files, and under `ours` in our tree.
    """
    layer = f"{stem}.encoder.layers.{{}}"
    names = []
    for leaf, theirs in _LAYER.items():
        names += linear_names(f"{ours}blocks/{{}}/{leaf}", f"{layer}.{theirs}")
    names += norm_names(f"{ours}blocks/{{}}/attn_norm", f"{layer}.layer_norm1")
    return names + norm_names(f"{ours}blocks/{{}}/mlp_norm", f"{layer}.layer_norm2")


def image_names(c: vit.Config, ours: str = "") -> list[Name]:
    """Return the entries that the image towers of CLIP and SigLIP have in common."""
    stem = "vision_model.embeddings"
    kernel = (c.channels, c.patch, c.patch)
    return [
        *tower_names("vision_model", ours),
        Name(f"{ours}embed/patch", f"{stem}.patch_embedding.weight", trailing=kernel),
        Name(f"{ours}embed/positions", f"{stem}.position_embedding.weight"),
        *norm_names(f"{ours}norm", "vision_model.post_layernorm"),
    ]


def text_names() -> list[Name]:
    """Return the entries that the text towers of CLIP and SigLIP have in common."""
    return [
        *tower_names("text_model", "text/"),
        Name("text/embed", "text_model.embeddings.token_embedding.weight"),
        Name("text/positions", "text_model.embeddings.position_embedding.weight"),
        *norm_names("text/norm", "text_model.final_layer_norm"),
    ]


def _names(config: clip.Config) -> list[Name]:
    return [
        *image_names(config.image, "image/"),
        *text_names(),
        Name("image/embed/class", "vision_model.embeddings.class_embedding"),
        *norm_names("image/embed_norm", "vision_model.pre_layrnorm"),  # (sic)
        Name("image_map", "visual_projection.weight"),
        Name("text_map", "text_projection.weight"),
        Name("scale", "logit_scale"),
    ]


def _part(hf: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the part of config.json that describes one tower."""
    own = hf.get(key) or {}
    # from the earliest files; if present, it is complete
    if (newer := hf.get(f"{key}_dict")) is not None:
        own = own | keys.defaults()["clip"][key] | newer
    return own


def tower(
    own: Mapping[str, Any], width: int, heads: int, act: str, eps: float, where: str
) -> dict[str, Any]:
    """Return the settings that both towers have, from their part of config.json or its defaults."""
    return {
        "width": own.get("hidden_size", width),
        "depth": own.get("num_hidden_layers", 12),
        "heads": own.get("num_attention_heads", heads),
        "mlp_width": own.get("intermediate_size", 4 * width),
        "activation": activation(own, act, where),
        "norm_eps": own.get("layer_norm_eps", eps),
        "init_scale": own.get("initializer_range", 0.02),
    }


def _from_hf(hf: dict[str, Any]) -> clip.Config:
    architecture(hf, ("CLIPModel",), "CLIPModel")
    text = _part(hf, "text_config")
    image = _part(hf, "vision_config")
    of_text = tower(text, 512, 8, "quick_gelu", 1e-5, "config.json: text_config")
    of_image = tower(image, 768, 12, "quick_gelu", 1e-5, "config.json: vision_config")
    end = text.get("eos_token_id", 49407)
    context = text.get("max_position_embeddings", 77)
    size = image.get("image_size", 224)
    patch = image.get("patch_size", 32)
    channels = image.get("num_channels", 3)
    return clip.Config(
        text=clip.Text(
            text.get("vocab_size", 49408),
            **of_text,
            context=context,
            end=None if end == _OLD_END else end,
        ),
        image=vit.Config(
            size, patch, **of_image, channels=channels, embed_norm=True, patch_bias=False
        ),
        shared=hf.get("projection_dim", 512),
        scale=float(hf.get("logit_scale_init_value", 2.6592)),
    )


def tower_to_hf(kind: str, c: clip.Text | vit.Config) -> dict[str, Any]:
    """Return the part of config.json that `tower` reads."""
    return {
        "model_type": kind,
        "hidden_size": c.width,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "intermediate_size": c.mlp_width,
        "hidden_act": activation_to_hf(c.activation),
        "layer_norm_eps": c.norm_eps,
        "initializer_range": c.init_scale,
    }


def _to_hf(config: clip.Config) -> dict[str, Any] | None:
    text = config.text
    image = config.image
    plain = (
        image.embed_norm
        and not image.patch_bias
        and image.qkv_bias
        and image.pool == "class"
        and not image.pool_dense
    )
    if not plain or config.sigmoid or text.end == _OLD_END:
        return None
    of_text = {
        **tower_to_hf("clip_text_model", text),
        "projection_dim": config.shared,
        "vocab_size": text.vocab,
        "max_position_embeddings": text.context,
        "eos_token_id": _OLD_END if text.end is None else text.end,
    }
    of_image = {
        **tower_to_hf("clip_vision_model", image),
        "projection_dim": config.shared,
        "image_size": image.image,
        "patch_size": image.patch,
        "num_channels": image.channels,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.shared,
        "logit_scale_init_value": config.scale,
        "text_config": of_text,
        "vision_config": of_image,
    }


FAMILY = Family(
    "clip",
    kinds=("clip",),
    names=_names,
    config_from_hf=_from_hf,
    config_to_hf=_to_hf,
    ignored=r"(text|vision)_model\.embeddings\.position_ids",
    unread="projection_dim",
)
