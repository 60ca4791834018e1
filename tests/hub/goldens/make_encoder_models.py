"""The tiny encoders that `make_encoders.py` writes: their configs, and what is stored of each."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import (
    BertConfig,
    CLIPConfig,
    Dinov2Config,
    DistilBertConfig,
    ModernBertConfig,
    RobertaConfig,
    SiglipConfig,
    SiglipVisionConfig,
    ViTConfig,
    XLMRobertaConfig,
)


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A model, the length of its padded row (of both, where none is padded), which gradients are
    stored, and sides of images that are not the config's.
    """

    kind: str
    config: Any
    short: int = 0
    gradients: str = ".*"
    sides: tuple[int, int] | None = None


def sizes(width: int, depth: int, heads: int, mlp: int, **more: Any) -> dict[str, Any]:
    """What the configs of all kinds have."""
    given = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": mlp,
    }
    return given | more


def labels(*names: str) -> dict[str, Any]:
    """Names of classes."""
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }


_FIRST = r".*(embeddings\.|LayerNorm|layer\.0\.).*|cls.*|classifier.*"
_ROBERTA = {
    "vocab_size": 71,
    "max_position_embeddings": 18,
    "type_vocab_size": 1,
    **sizes(12, 2, 2, 20),
}
_MODERN = {
    **{
        "vocab_size": 71,
        "max_position_embeddings": 16,
        "local_attention": 4,
        **sizes(12, 4, 3, 10),
    },
    **{
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
    },
}
_DINO = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "mlp_ratio": 2}
_DISTILBERT = {
    "vocab_size": 71,
    "max_position_embeddings": 16,
    "dim": 12,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 20,
}
MODELS = {
    "bert-a": Tiny(
        "BertForMaskedLM",
        BertConfig(
            vocab_size=97, max_position_embeddings=24, type_vocab_size=3, **sizes(16, 2, 4, 24)
        ),
        15,
        _FIRST,
    ),
    "bert-b": Tiny(
        "BertForSequenceClassification",
        BertConfig(
            vocab_size=101,
            max_position_embeddings=32,
            hidden_act="gelu_new",
            layer_norm_eps=1e-2,
            **sizes(12, 3, 1, 20),
            **labels("no", "perhaps", "yes"),
        ),
        9,
        _FIRST + r"|.*pooler.*",
    ),
    "bert-c": Tiny(
        "BertModel",
        BertConfig(vocab_size=89, max_position_embeddings=20, **sizes(16, 1, 2, 28)),
        13,
        r".*\.(query|key)\..*",
    ),
    "vit-a": Tiny(
        "ViTForImageClassification",
        ViTConfig(image_size=12, patch_size=4, **sizes(16, 2, 4, 24), **labels(*"xyz")),
    ),
    "vit-b": Tiny(
        "ViTForImageClassification",
        ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            qkv_bias=False,
            layer_norm_eps=1e-2,
            hidden_act="gelu_pytorch_tanh",
            **sizes(12, 3, 1, 20),
            **labels(*(f"class {i}" for i in range(12))),
        ),
        gradients=r".*(embeddings|layernorm|classifier|layer\.2\.).*",
    ),
    "vit-c": Tiny(
        "ViTModel",
        ViTConfig(image_size=10, patch_size=5, **sizes(18, 1, 3, 20)),
        gradients=r".*(pooler|token).*",
    ),
    "clip-a": Tiny(
        "CLIPModel",
        CLIPConfig(
            text_config={
                **sizes(16, 2, 4, 24),
                **{
                    "vocab_size": 97,
                    "max_position_embeddings": 12,
                    "bos_token_id": 0,
                    "eos_token_id": 2,
                    "pad_token_id": 1,
                },
            },
            vision_config=sizes(20, 1, 2, 28, image_size=12, patch_size=4),
            projection_dim=8,
        ),
        7,
        r"logit_scale|.*projection.*|.*embedding.*|.*layrnorm.*",
    ),
    "clip-b": Tiny(
        "CLIPModel",
        CLIPConfig(
            text_config={
                **sizes(12, 1, 1, 20, hidden_act="gelu"),
                **{
                    "vocab_size": 61,
                    "max_position_embeddings": 10,
                    "bos_token_id": 0,
                    "eos_token_id": 55,
                    "pad_token_id": 1,
                },
            },
            vision_config=sizes(
                16, 2, 4, 24, image_size=8, patch_size=4, hidden_act="gelu", layer_norm_eps=1e-2
            ),
            projection_dim=6,
        ),
        6,
        r"logit_scale|text_model.*(embedding|layer_norm).*|.*class_embedding.*",
    ),
}


LATER = {
    "roberta-a": Tiny(
        "RobertaForMaskedLM", RobertaConfig(**_ROBERTA), 11, r".*embeddings\..*|lm_head.*"
    ),
    "roberta-b": Tiny(
        "RobertaForSequenceClassification",
        RobertaConfig(
            **_ROBERTA | {"hidden_act": "relu", "layer_norm_eps": 1e-2, "type_vocab_size": 2},
            **labels("no", "yes"),
        ),
        *(7, r".*embeddings\..*|classifier.*"),
    ),
    "xlm-roberta-a": Tiny(
        "XLMRobertaModel", XLMRobertaConfig(**_ROBERTA), 9, r".*\.(query|key)\..*|.*position.*"
    ),
    "distilbert-a": Tiny(
        "DistilBertForMaskedLM",
        DistilBertConfig(**_DISTILBERT, tie_word_embeddings=False),
        *(11, r".*embeddings\..*|vocab_.*"),
    ),
    "distilbert-b": Tiny(
        "DistilBertForSequenceClassification",
        DistilBertConfig(**_DISTILBERT | {"activation": "relu"}, **labels("no", "perhaps", "yes")),
        *(6, r".*embeddings\..*|(pre_)?classifier.*"),
    ),
    "distilbert-c": Tiny(
        "DistilBertModel", DistilBertConfig(**_DISTILBERT), 9, r".*(q_lin|lin2).*"
    ),
    "modernbert-a": Tiny(
        "ModernBertForMaskedLM",
        ModernBertConfig(**_MODERN),
        11,
        r".*(embeddings|layers\.0)\..*|head.*|decoder.*",
    ),
    "modernbert-b": Tiny(
        "ModernBertForSequenceClassification",
        ModernBertConfig(
            **_MODERN
            | {
                "classifier_pooling": "mean",
                "hidden_activation": "relu",
                "norm_eps": 1e-2,
                "num_hidden_layers": 2,
            },
            **labels("no", "perhaps", "yes"),
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters={
                "full_attention": {"rope_type": "default", "rope_theta": 50.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 9.0},
            },
        ),
        *(7, r".*layers\.1\..*|head.*|classifier.*"),
    ),
    "modernbert-c": Tiny("ModernBertModel", ModernBertConfig(**_MODERN), 9, r".*(Wqkv|norm).*"),
    "dinov2-a": Tiny(
        "Dinov2Model",
        Dinov2Config(image_size=12, patch_size=4, **_DINO),
        gradients=r".*(cls_token|patch|position|lambda|norm).*",
    ),
    "dinov2-b": Tiny(
        "Dinov2ForImageClassification",
        Dinov2Config(
            image_size=8,
            patch_size=4,
            **_DINO | {"num_channels": 1, "layer_norm_eps": 1e-2},
            **labels(*"xyz"),
        ),
        gradients=r".*(classifier|layer\.1).*",
    ),
    "dinov2-c": Tiny(
        "Dinov2Model",
        Dinov2Config(image_size=12, patch_size=4, qkv_bias=False, use_swiglu_ffn=True, **_DINO),
        gradients=r".*(position|lambda|layer\.1\.mlp).*",
        sides=(21, 8),
    ),
    "modernbert-d": Tiny(
        "ModernBertForSequenceClassification",
        ModernBertConfig(
            **_MODERN | {"classifier_pooling": "cls", "num_hidden_layers": 3},
            **labels("no", "yes"),
            **dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"), True),
        ),
        *(7, r".*layers\.2\..*|head.*|classifier.*"),
    ),
    "siglip-a": Tiny(
        "SiglipModel",
        SiglipConfig(
            text_config={
                **sizes(12, 2, 2, 20),
                "vocab_size": 61,
                "max_position_embeddings": 8,
                "projection_size": 16,
            },
            vision_config=sizes(
                16, 2, 4, 24, image_size=14, patch_size=4
            ),  # of which two pixels are left over
        ),
        gradients=r"logit_scale|text_model.head.*|vision_model.(head|embeddings).*",
    ),
    "siglip-b": Tiny(
        "SiglipModel",
        SiglipConfig(
            text_config={
                **sizes(12, 1, 3, 20, hidden_act="gelu"),
                "vocab_size": 61,
                "max_position_embeddings": 8,
            },
            vision_config=sizes(
                12, 1, 2, 20, image_size=8, patch_size=4, num_channels=1, layer_norm_eps=1e-2
            ),
        ),
        6,
        r"logit_scale|text_model.embeddings.*|.*post_layernorm.*",
    ),
    "siglip_vision_model-a": Tiny(
        "SiglipVisionModel",
        SiglipVisionConfig(image_size=8, patch_size=4, **sizes(12, 2, 3, 20)),
        gradients=r".*(head|embeddings).*",
    ),
    "siglip-c": Tiny(
        "SiglipForImageClassification",
        SiglipConfig(
            vision_config=sizes(12, 2, 2, 20, image_size=8, patch_size=4), **labels(*"xyz")
        ),
        gradients=r".*(classifier|post_layernorm|embeddings).*",
    ),
    "bert-d": Tiny(
        "BertForMaskedLM",
        BertConfig(
            vocab_size=61,
            max_position_embeddings=20,
            tie_word_embeddings=False,
            **sizes(12, 1, 2, 20),
        ),
        *(13, r".*word_embeddings.*|cls(?!\.predictions\.bias).*"),
    ),
    "modernbert-e": Tiny(
        "ModernBertForMaskedLM",
        ModernBertConfig(
            **_MODERN | {"num_hidden_layers": 1}, tie_word_embeddings=False, decoder_bias=False
        ),
        *(7, r".*embeddings\..*|head.*|decoder.*"),
    ),
    "roberta-c": Tiny(
        "RobertaForMaskedLM",
        RobertaConfig(**_ROBERTA | {"num_hidden_layers": 1}, tie_word_embeddings=False),
        *(11, r".*word_embeddings.*|lm_head(?!\.bias).*"),
    ),
}
SEEDS = {name: i for i, name in enumerate([*sorted(MODELS), *LATER])}
MODELS |= LATER
