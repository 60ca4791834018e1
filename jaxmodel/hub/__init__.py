"""Weights that other people trained, and our own on disk: HF folders, GGUF files, tokenizers, names per family."""

from jaxmodel.hub.adapters import add_adapters, save_adapters
from jaxmodel.hub.bundle import Bundle, check_target, need_processor
from jaxmodel.hub.images import ImageProcessor
from jaxmodel.hub.pretrained import KNOWN, from_pretrained
from jaxmodel.hub.tokenizer import Tokenizer, train_bpe

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
