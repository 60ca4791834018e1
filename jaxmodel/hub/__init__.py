"""Weights that other people trained, and our own on disk: HF folders, GGUF files, tokenizers, names per family."""

from jaxmodel.hub.bundle import Bundle, check_target, need_processor
from jaxmodel.hub.pretrained import KNOWN, from_pretrained
from jaxmodel.hub.tokenizer import Tokenizer, train_bpe

__all__ = ["KNOWN", "Bundle", "Tokenizer", "check_target", "from_pretrained", "need_processor", "train_bpe"]
