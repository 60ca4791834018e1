"""Sources of trained weights for the known sizes."""

from __future__ import annotations

from jaxmodel.models import sizes

WEIGHTS = {
    "bert/bert-base": "google-bert/bert-base-uncased",
    "bert/bert-large": "google-bert/bert-large-uncased",
    "bert/distilbert-base": "distilbert/distilbert-base-uncased",
    "bert/minilm-l6": "all-minilm-l6-v2",
    "bert/roberta-base": "FacebookAI/roberta-base",
    "bert/roberta-large": "FacebookAI/roberta-large",
    "bert/xlm-roberta-base": "FacebookAI/xlm-roberta-base",
    "bert/xlm-roberta-large": "FacebookAI/xlm-roberta-large",
    "clip/clip-base-16": "openai/clip-vit-base-patch16",
    "clip/clip-base-32": "openai/clip-vit-base-patch32",
    "clip/clip-large-14": "openai/clip-vit-large-patch14",
    "clip/siglip-base-16": "google/siglip-base-patch16-224",
    "clip/siglip-large-16": "google/siglip-large-patch16-256",
    "clip/siglip-so400m-14": "google/siglip-so400m-patch14-384",
    "clip/siglip2-base-16": "google/siglip2-base-patch16-224",
    "gpt2/gpt2": "openai-community/gpt2",
    "gpt2/gpt2-large": "openai-community/gpt2-large",
    "gpt2/gpt2-medium": "openai-community/gpt2-medium",
    "gpt2/gpt2-xl": "openai-community/gpt2-xl",
    "gpt_oss/gpt-oss-120b": "openai/gpt-oss-120b",
    "gpt_oss/gpt-oss-20b": "openai/gpt-oss-20b",
    "llama/gemma-2-2b": "google/gemma-2-2b",
    "llama/gemma-3-1b": "google/gemma-3-1b-pt",
    "llama/gemma-3-4b": "google/gemma-3-4b-pt",
    "llama/gemma-3-12b": "google/gemma-3-12b-pt",
    "llama/granite-3.3-2b": "ibm-granite/granite-3.3-2b-base",
    "llama/llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama/llama-3-70b": "meta-llama/Meta-Llama-3-70B",
    "llama/llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama/llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama/mistral-7b": "mistralai/Mistral-7B-v0.1",
    "llama/mixtral-8x7b": "mistralai/Mixtral-8x7B-v0.1",
    "llama/olmo-2-1b": "allenai/OLMo-2-0425-1B",
    "llama/olmo-2-7b": "allenai/OLMo-2-1124-7B",
    "llama/olmo-3-7b": "allenai/Olmo-3-1025-7B",
    "llama/phi-3-mini-4k": "microsoft/Phi-3-mini-4k-instruct",
    "llama/phi-4": "microsoft/phi-4",
    "llama/qwen2-0.5b": "Qwen/Qwen2-0.5B",
    "llama/qwen2-7b": "Qwen/Qwen2-7B",
    "llama/qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "llama/qwen3-8b": "Qwen/Qwen3-8B",
    "llama/qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
    "llama/qwen3-235b-a22b": "Qwen/Qwen3-235B-A22B",
    "llama/smollm2-135m": "smollm2-135m-instruct-q4_1",
    "llama/smollm3-3b": "HuggingFaceTB/SmolLM3-3B-Base",
    "modernbert/modernbert-base": "answerdotai/ModernBERT-base",
    "modernbert/modernbert-large": "answerdotai/ModernBERT-large",
    "t5/flan-t5-small": "google/flan-t5-small",
    "t5/t5-base": "google-t5/t5-base",
    "t5/t5-small": "google-t5/t5-small",
    "t5/t5-v1.1-small": "google/t5-v1_1-small",
    "vit/dinov2-base": "facebook/dinov2-base",
    "vit/dinov2-giant": "facebook/dinov2-giant",
    "vit/dinov2-large": "facebook/dinov2-large",
    "vit/dinov2-small": "facebook/dinov2-small",
    "vit/vit-base-16": "google/vit-base-patch16-224",
    "vit/vit-large-16": "google/vit-large-patch16-224",
}
"""Size -> a hub id, `org/name`, or the name of a model in an installed package."""


def where(name: str) -> str | None:
    """Return where the trained weights of a size are published; None for an unknown size or none.

    Args:
      name: `family/size`, or the size alone where one family has it.

    >>> where("gpt2"), where("gpt2/gpt2-xl"), where("gpt2/tiny")
    ('openai-community/gpt2', 'openai-community/gpt2-xl', None)
    """
    alike = [size for size in WEIGHTS if name in (size, size.split("/", 1)[1])]
    known = [size for size in sizes() if name in (size, size.split("/", 1)[1])]
    return WEIGHTS[alike[0]] if len(alike) == 1 and alike == known else None
