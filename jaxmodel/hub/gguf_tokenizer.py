"""Tokenizers inside GGUF files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from jaxmodel.errors import InputError, border, one_of, unknown
from jaxmodel.hub import chat, vocabularies
from jaxmodel.hub.tokenizer import WORDS, Tokenizer, distinct, pre_tokenizer

# tokens that end a turn of a chat, known by name as in llama.cpp; a GGUF file may say no more about
# them
_TURN_ENDS = (
    *(
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
    ),
    *(
        "<|endoftext|>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
    ),
    "<｜end▁of▁sentence｜>",
)


def from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer of a GGUF file.

    Two kinds are read: byte-level BPE (`tokenizer.ggml.model` = "gpt2") and SentencePiece's
    ("llama"). A text ends with the tokens that the file marks as ending a text, a turn or a
    message, and with those that are known by name to do so (`<|im_end|>`, `<|eot_id|>`,
    `<end_of_turn>`, ...), as in llama.cpp. Bytes that the file's vocabulary lacks are dropped from
    a text, as in the original tokenizer (SmolLM2 lacks six control characters and two leading bytes
    of unassigned planes).

    Args:
      metadata: `GGUFFile.metadata`.

    Raises:
      InputError: another kind of tokenizer, an unknown pre-tokenizer, or missing or inconsistent
        entries.
    """
    with border("metadata: the GGUF file's tokenizer cannot be read"):
        return _from_gguf(metadata)


def _from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    def get(key: str) -> Any:
        if f"tokenizer.ggml.{key}" not in metadata:
            raise InputError(f"metadata: the GGUF file has no tokenizer.ggml.{key}")
        return metadata[f"tokenizer.ggml.{key}"]

    if get("model") not in ("gpt2", "llama"):
        raise unknown("tokenizer.ggml.model", get("model"), ["gpt2", "llama"])
    tokens = get("tokens")
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    ids = {
        key: metadata.get(f"tokenizer.ggml.{key}_token_id")
        for key in ("bos", "eos", "eot", "eom", "padding")
    }
    if get("model") == "llama":
        # the defaults of this kind
        ids = {"bos": 1, "eos": 2} | {key: i for key, i in ids.items() if i is not None}
        unk = metadata.get("tokenizer.ggml.unknown_token_id", 0)
        prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
        settings = {"unk": unk, "prefix": bool(prefix)}
        kinds = list(kinds) or [vocabularies.NORMAL] * len(tokens)
        backend = vocabularies.of_pieces(
            vocabularies.piece_list(tokens, get("scores"), kinds, **settings)
        )
        begins = True
    else:
        backend, begins = _byte_level(
            tokens, get("merges"), kinds, metadata.get("tokenizer.ggml.pre", "default")
        )
    for key, i in ids.items():
        if i is not None and not 0 <= i < len(tokens):
            raise InputError(
                f"tokenizer.ggml.{key}_token_id: {i} is not a token; allowed: 0 to "
                f"{len(tokens) - 1}"
            )
    head = (
        tokens[ids["bos"]]
        if ids.get("bos") is not None and metadata.get(_ADD_BOS, begins)
        else None
    )
    tail = (
        tokens[ids["eos"]] if ids.get("eos") is not None and metadata.get(_ADD_EOS, False) else None
    )
    vocabularies.around(backend, head, tail)
    vocabulary = backend.get_vocab()
    there = [token for token in _TURN_ENDS if token in vocabulary]
    # in this kind of chat <|end|> ends a part of an answer only
    if {"<|return|>", "<|call|>", "<|end|>"} <= set(there):
        there.remove("<|end|>")
    backend.add_special_tokens(
        [token for token in there if vocabulary[token] not in backend.get_added_tokens_decoder()]
    )
    named = [vocabulary[token] for token in there]
    ends = distinct([*(ids.get(key) for key in ("eos", "eot", "eom")), *named])
    return Tokenizer(backend, ends, ids.get("bos"), ids.get("padding"), _gguf_templates(metadata))


def _byte_level(
    tokens: Sequence[str], merges: Sequence[str], kinds: Sequence[int], name: str
) -> tuple[tokenizers.Tokenizer, bool]:
    """Return the byte-level tokenizer of a GGUF file, and whether its texts begin with a token.

    The file may override the latter.

    Raises:
      InputError: an unknown pre-tokenizer, or inconsistent lists.
    """
    one_of("tokenizer.ggml.pre", name, _SPLITS)
    like_llama3 = name == "llama-bpe"
    with border("metadata: tokenizer.ggml.tokens and merges are inconsistent"):
        vocabulary = {token: i for i, token in enumerate(tokens)}
        pairs = [_pair(merge) for merge in merges]
        # A merge whose result is not a token is undone in llama.cpp, so it is left out here.
        pairs = [
            (a, b)
            for a, b in pairs
            if a + b in vocabulary or not (a in vocabulary and b in vocabulary)
        ]
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=like_llama3))
    if len(vocabulary) != len(tokens):
        raise InputError(
            f"metadata: tokenizer.ggml.tokens has {len(tokens) - len(vocabulary)} repeated entries"
        )
    if name == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizer(_SPLITS[name])
    backend.decoder = decoders.ByteLevel()
    for added, kind in ((True, _CONTROL), (False, _USER_DEFINED)):
        chosen = [token for token, k in zip(tokens, kinds, strict=False) if k == kind]
        backend.add_tokens([AddedToken(token, special=added, normalized=False) for token in chosen])
    return backend, like_llama3


def _gguf_templates(metadata: Mapping[str, Any]) -> chat.Template | None:
    """Return the chat template, or all if the file has more (`tokenizer.chat_template.NAME`)."""
    key = "tokenizer.chat_template"
    one = metadata.get(key)
    more = {
        name.removeprefix(f"{key}."): text
        for name, text in metadata.items()
        if name.startswith(f"{key}.")
    }
    return {**({"default": one} if one is not None else {}), **more} if more else one


_ADD_BOS = "tokenizer.ggml.add_bos_token"
_ADD_EOS = "tokenizer.ggml.add_eos_token"
# values of tokenizer.ggml.token_type
_CONTROL, _USER_DEFINED = (
    vocabularies.CONTROL,
    vocabularies.USER_DEFINED,
)


_LETTERS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Patterns that split a text before merging, by GGUF's name (tokenizer.ggml.pre). Each one splits
# the pieces left by the one before. Names and patterns are part of the file format, which llama.cpp
# defines.
_SPLITS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", WORDS, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (WORDS,),
    "llama-bpe": (_LETTERS + r"\p{N}{1,3}" + _REST,),
    "qwen2": (_LETTERS + r"\p{N}" + _REST,),
    "smollm": (r"\p{N}", WORDS),
}


def _pair(merge: str) -> tuple[str, str]:
    left, right = merge.split(" ")
    return left, right
