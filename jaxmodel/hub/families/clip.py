"""Files of CLIP: HF folders of CLIPModel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmodel.hub import keys
from jaxmodel.hub.families.bert import activation, activation_to_hf, architecture, linear_names, norm_names
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
_OLD_END = 2  # the first CLIP's files give this id for the end of a text, and mean the highest one


def _names(config: clip.Config) -> list[Name]:
    c, names = config.image, []
    for tower, stem in {"image": "vision_model", "text": "text_model"}.items():
        layer = f"{stem}.encoder.layers.{{}}"
        for ours, theirs in _LAYER.items():
            names += linear_names(f"{tower}/blocks/{{}}/{ours}", f"{layer}.{theirs}")
        names += norm_names(f"{tower}/blocks/{{}}/attn_norm", f"{layer}.layer_norm1")
        names += norm_names(f"{tower}/blocks/{{}}/mlp_norm", f"{layer}.layer_norm2")
    patch = Name("image/embed/patch", "vision_model.embeddings.patch_embedding.weight", trailing=(c.channels, c.patch, c.patch))
    return [
        *names,
        patch,
        Name("image/embed/class", "vision_model.embeddings.class_embedding"),
        Name("image/embed/positions", "vision_model.embeddings.position_embedding.weight"),
        *norm_names("image/embed_norm", "vision_model.pre_layrnorm"),  # so it is spelt there
        *norm_names("image/norm", "vision_model.post_layernorm"),
        Name("text/embed", "text_model.embeddings.token_embedding.weight"),
        Name("text/positions", "text_model.embeddings.position_embedding.weight"),
        *norm_names("text/norm", "text_model.final_layer_norm"),
        Name("image_map", "visual_projection.weight"),
        Name("text_map", "text_projection.weight"),
        Name("scale", "logit_scale"),
    ]


def _tower(hf: dict[str, Any], key: str, width: int, heads: int) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """One tower's part of config.json and what both have; `width` and `heads` are those of a missing key."""
    own = hf.get(key) or {}
    if (newer := hf.get(f"{key}_dict")) is not None:  # of the first files: where it is there, it says all
        own = own | keys.defaults()["clip"][key] | newer
    return own, {
        "width": own.get("hidden_size", width),
        "depth": own.get("num_hidden_layers", 12),
        "heads": own.get("num_attention_heads", heads),
        "mlp_width": own.get("intermediate_size", 4 * width),
        "activation": activation(own, "quick_gelu", f"config.json: {key}"),
        "norm_eps": own.get("layer_norm_eps", 1e-5),
        "init_scale": own.get("initializer_range", 0.02),
    }


def _from_hf(hf: dict[str, Any]) -> clip.Config:
    architecture(hf, ("CLIPModel",), "CLIPModel")
    text, of_text = _tower(hf, "text_config", 512, 8)
    image, of_image = _tower(hf, "vision_config", 768, 12)
    end = text.get("eos_token_id", 49407)
    context = text.get("max_position_embeddings", 77)
    size, patch = image.get("image_size", 224), image.get("patch_size", 32)
    channels = image.get("num_channels", 3)
    return clip.Config(
        text=clip.Text(text.get("vocab_size", 49408), **of_text, context=context, end=None if end == _OLD_END else end),
        image=vit.Config(size, patch, **of_image, channels=channels, embed_norm=True, patch_bias=False),
        shared=hf.get("projection_dim", 512),
        scale=float(hf.get("logit_scale_init_value", 2.6592)),
    )


def _tower_to_hf(kind: str, c: clip.Text | vit.Config, shared: int) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": c.width,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "intermediate_size": c.mlp_width,
        "hidden_act": activation_to_hf(c.activation),
        "layer_norm_eps": c.norm_eps,
        "initializer_range": c.init_scale,
        "projection_dim": shared,
    }


def _to_hf(config: clip.Config) -> dict[str, Any] | None:
    text, image = config.text, config.image
    plain = image.embed_norm and not image.patch_bias and image.qkv_bias and image.pool == "class" and not image.pool_dense
    if not plain or text.end == _OLD_END:
        return None
    of_text = {
        **_tower_to_hf("clip_text_model", text, config.shared),
        "vocab_size": text.vocab,
        "max_position_embeddings": text.context,
        "eos_token_id": _OLD_END if text.end is None else text.end,
    }
    of_image = {
        **_tower_to_hf("clip_vision_model", image, config.shared),
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
    module=clip,
    kinds=("clip",),
    names=_names,
    config_from_hf=_from_hf,
    config_to_hf=_to_hf,
    ignored=r"(text|vision)_model\.embeddings\.position_ids",
    unread="projection_dim",
)
