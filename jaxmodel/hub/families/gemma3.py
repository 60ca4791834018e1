"""The text part of Gemma 3's multimodal files: HF folders of Gemma3ForConditionalGeneration.

The image tower and the layer that connects it are left out, as the bundle's card says; a text with
an image token is refused. The model is saved as `gemma3_text`, which has the same text part alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmodel.errors import InputError
from jaxmodel.hub.families import llama as of_llama
from jaxmodel.hub.names import Family
from jaxmodel.models import llama

_HAS = {  # defaults of text_config
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
}


def _from_hf(hf: dict[str, Any]) -> llama.Config:
    text = hf.get("text_config")
    if not isinstance(text, dict):
        raise InputError(f"config.json: text_config is {text!r}; allowed: an object")
    tied = {"tie_word_embeddings": hf["tie_word_embeddings"]} if "tie_word_embeddings" in hf else {}
    return of_llama.config_from_hf(_HAS | text | tied | {"model_type": "gemma3_text"})


def _card(hf: Mapping[str, Any]) -> dict[str, Any]:
    token = hf.get("image_token_index", hf.get("image_token_id", 262144))
    return {"left_out": "vision_tower, multi_modal_projector", "image_tokens": [token]}


FAMILY = Family(
    "llama",
    kinds=("gemma3",),
    names=of_llama.names,
    config_from_hf=_from_hf,
    config_to_hf=lambda config: None,
    ignored=rf"(model\.)?(vision_tower|multi_modal_projector)\..*|{of_llama.FAMILY.ignored}",
    copies=of_llama.FAMILY.copies,
    spellings=(
        ("model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.", "model.language_model."),
    ),
    card=_card,
    unread=f"vision_config|mm_tokens_per_image|{of_llama.FAMILY.unread}",
)
