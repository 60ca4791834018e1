"""Weights that other people trained, and our own on disk: HF folders, GGUF files, tokenizers, names per family."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxmodel.hub.adapters import add_adapters, save_adapters
    from jaxmodel.hub.bundle import Bundle, check_target, need_processor
    from jaxmodel.hub.images import ImageProcessor
    from jaxmodel.hub.pretrained import KNOWN, from_pretrained
    from jaxmodel.hub.tokenizer import Tokenizer, train_bpe

_HOMES = {  # imported when used: `jaxmodel.data` asks for the images alone, without JAX
    "KNOWN": "pretrained",
    "Bundle": "bundle",
    "ImageProcessor": "images",
    "Tokenizer": "tokenizer",
    "add_adapters": "adapters",
    "check_target": "bundle",
    "from_pretrained": "pretrained",
    "need_processor": "bundle",
    "save_adapters": "adapters",
    "train_bpe": "tokenizer",
}

__all__ = [
    "KNOWN",
    "Bundle",
    "ImageProcessor",
    "Tokenizer",
    "add_adapters",
    "check_target",
    "from_pretrained",
    "need_processor",
    "save_adapters",
    "train_bpe",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"jaxmodel.hub.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'jaxmodel.hub' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
