"""Tokenizers from a vocabulary alone.

The files are tokenizer.model of SentencePiece, vocab.txt of BERT, vocab.json and merges.txt of
GPT-2.
"""

from __future__ import annotations

import string
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from jaxmodel import schema
from jaxmodel.errors import InputError, border, one_of, unknown
from jaxmodel.files import read_bytes
from jaxmodel.limits import limits

SENTENCEPIECE = ("tokenizer.model", "spiece.model")
FILES = ("tokenizer.json", *SENTENCEPIECE, "vocab.txt", "merges.txt")
"""The files from which a tokenizer is read; the first that exists is used."""

# kinds of a piece, in SentencePiece and in GGUF
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.model_type
_SPACE = "▁"

# `tokenizer_class` without Tokenizer and Fast, or `model_type` -> first and last token of a text
_AROUND = {
    **dict.fromkeys(
        ("llama", "codellama", "gemma", "mistral", "mixtral", "phi3"), ("bos_token", None)
    ),
    **dict.fromkeys(("t5", "siglip"), (None, "eos_token")),
}


class Pieces(NamedTuple):
    """The contents of a SentencePiece model.

    Attributes:
      tokens: by id.
      scores: of each token.
      kinds: of each token, NORMAL to BYTE.
      bpe: whether merges go by scores; else the likeliest segmentation is taken (unigram).
      unk: id of the unknown token.
      bos: id, or -1.
      eos: id, or -1.
      prefix: whether a space is put before a text.
      shrinks: whether spaces at the ends and repeated spaces are dropped.
      charsmap: the compiled normalisation; empty if there is none.
    """

    tokens: list[str]
    scores: list[float]
    kinds: list[int]
    bpe: bool = True
    unk: int = 0
    bos: int = 1
    eos: int = 2
    prefix: bool = True
    shrinks: bool = False
    charsmap: bytes = b""


def read_pieces(path: Path) -> Pieces:
    """Return the pieces and settings of a SentencePiece model (`sentencepiece_model.proto`).

    Raises:
      InputError: not such a model, or one of an unsupported kind.
    """
    tokens = []
    scores = []
    kinds = []
    spec: dict[int, Any] = {}
    shape: dict[int, Any] = {}
    try:
        for field, value in _fields(read_bytes(path, limits().json_bytes)):
            if field == 1:
                piece = dict(_fields(value))
                tokens.append(piece[1].decode())
                scores.append(struct.unpack("<f", piece.get(2, b"\0\0\0\0"))[0])
                kinds.append(piece.get(3, NORMAL))
            elif field == 2:
                spec = dict(_fields(value))
            elif field == 3:
                shape = dict(_fields(value))
    except (IndexError, ValueError, KeyError, AttributeError, TypeError, struct.error) as error:
        raise InputError(
            f"{path}: not a SentencePiece model: {' '.join(str(error).split())}"
        ) from None
    model = spec.get(3, _UNIGRAM)
    if not tokens or model not in (_UNIGRAM, _BPE):
        raise InputError(
            f"{path}: not a SentencePiece model of kind BPE or unigram; give the folder a "
            f"tokenizer.json"
        )
    if shape.get(5, 1) != 1 or spec.get(24, 0):
        raise InputError(
            f"{path}: its treatment of spaces is not supported; give the folder a tokenizer.json"
        )
    unk, bos, eos = (
        _signed(spec.get(field, usual)) for field, usual in ((40, 0), (41, 1), (42, 2))
    )
    prefix = bool(shape.get(3, 1))
    shrinks = bool(shape.get(4, 1))
    charsmap = shape.get(2, b"")
    return Pieces(tokens, scores, kinds, model == _BPE, unk, bos, eos, prefix, shrinks, charsmap)


def of_pieces(pieces: Pieces) -> tokenizers.Tokenizer:
    """Return the `tokenizers` equivalent of a SentencePiece model.

    Raises:
      InputError: inconsistent pieces.
    """
    tokens = pieces.tokens
    kinds = pieces.kinds
    if len(set(tokens)) != len(tokens):
        raise InputError(f"tokenizer: {len(tokens) - len(set(tokens))} of its tokens are repeated")
    unk = (
        tokens[pieces.unk]
        if 0 <= pieces.unk < len(tokens) and kinds[pieces.unk] == UNKNOWN
        else None
    )
    fallback = BYTE in kinds
    with border("tokenizer: its tokens and scores do not fit together"):
        if pieces.bpe:
            vocabulary = {token: i for i, token in enumerate(tokens)}
            merges = _merges(pieces)
            model: Any = models.BPE(
                vocabulary, merges, unk_token=unk, fuse_unk=True, byte_fallback=fallback
            )
        else:
            scored = list(zip(tokens, pieces.scores, strict=True))
            model = models.Unigram(
                scored, unk_id=pieces.unk if unk else None, byte_fallback=fallback
            )
        backend = tokenizers.Tokenizer(model)
    with border("tokenizer: its normalisation (precompiled_charsmap) is damaged"):
        steps: list[Any] = [normalizers.Precompiled(pieces.charsmap)] if pieces.charsmap else []
    if pieces.shrinks:
        steps += [
            normalizers.Replace(Regex("^ +| +$"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    steps += [normalizers.Prepend(_SPACE)] if pieces.prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    if not pieces.bpe:  # the same segmentation as SentencePiece's, and faster
        backend.pre_tokenizer = pre_tokenizers.Split(_SPACE, "merged_with_next")
    strip = [decoders.Strip(" ", 1, 0)] if pieces.prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    for special, wanted in ((True, (UNKNOWN, CONTROL)), (False, (USER_DEFINED,))):
        chosen = [
            AddedToken(t, special=special, normalized=False)
            for t, k in zip(tokens, kinds, strict=True)
            if k in wanted
        ]
        backend.add_tokens(chosen)
    return backend


def from_vocabulary(
    folder: Path, config: Mapping[str, Any]
) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """Return the tokenizer of a folder without tokenizer.json, and its default special tokens.

    Args:
      folder: in HF layout.
      config: tokenizer_config.json.

    Raises:
      InputError: no supported file, or a kind of tokenizer that needs a tokenizer.json.
    """
    file = next((name for name in FILES[1:] if (folder / name).is_file()), None)
    named = (
        config.get("tokenizer_class")
        or schema.read(folder / "config.json", missing=True).get("model_type")
        or ""
    )
    kind = str(named).removesuffix("Fast").removesuffix("Tokenizer").lower()
    if file is None:
        raise InputError(
            f"folder: {str(folder)!r} has no tokenizer; allowed: a folder with one of "
            f"{', '.join(FILES)}"
        )
    if file == "vocab.txt":
        return _bert(folder / file, config), {
            f"{k}_token": f"[{k.upper()}]" for k in ("unk", "sep", "pad", "cls", "mask")
        }
    if file == "merges.txt":
        return _byte_level(folder, kind, config)
    one_of(
        f"folder: {str(folder / file)!r} alone is not enough for the tokenizer of", kind, _AROUND
    )
    pieces = read_pieces(folder / file)
    if kind == "t5":  # T5 has no begin-of-text token, and more tokens after the pieces
        pieces = pieces._replace(bos=-1)
    backend = of_pieces(pieces)
    ids = {"unk_token": pieces.unk, "bos_token": pieces.bos, "eos_token": pieces.eos}
    roles = {role: pieces.tokens[i] for role, i in ids.items() if 0 <= i < len(pieces.tokens)}
    if kind == "t5":
        backend.add_special_tokens(
            [f"<extra_id_{i}>" for i in reversed(range(int(config.get("extra_ids", 100))))]
        )
        roles["pad_token"] = "<pad>"
    if kind == "siglip":
        plain = _plain_words(lower=config.get("do_lower_case", True) is not False)
        backend.normalizer = normalizers.Sequence([*plain, backend.normalizer])
        roles["pad_token"] = roles.get("eos_token", "</s>")
    head, tail = _AROUND[kind]
    head = head if config.get("add_bos_token", head is not None) else None
    tail = "eos_token" if config.get("add_eos_token", tail is not None) else None
    given = {
        role: _content(config[role]) for role in ("bos_token", "eos_token") if config.get(role)
    }
    around(backend, *((roles | given).get(role or "") for role in (head, tail)))
    return backend, roles


def _plain_words(lower: bool) -> list[Any]:
    """Return SigLIP's preparation of texts: no capitals, no ASCII punctuation, single spaces."""
    marks = "".join(f"\\{mark}" for mark in string.punctuation)
    return [
        normalizers.Replace(_SPACE, " "),
        *([normalizers.Lowercase()] if lower else []),
        normalizers.Replace(Regex(f"[{marks}]"), ""),
        normalizers.Replace(Regex(r"[\s\x1c-\x1f]+"), " "),  # whitespace as Python defines it
        normalizers.Strip(),
    ]


def around(backend: tokenizers.Tokenizer, head: str | None, tail: str | None) -> None:
    """Make a tokenizer put a token before and one after each text.

    Raises:
      InputError: one of them is not in its vocabulary.
    """
    tokens = [
        (token, backend.token_to_id(token))
        for token in dict.fromkeys([head, tail])
        if token is not None
    ]
    if lost := [token for token, i in tokens if i is None]:
        raise InputError(
            f"tokenizer: {lost[0]!r} stands before or after each text, but is not in its vocabulary"
        )
    if tokens:
        single = [*([head] if head else []), "$A", *([tail] if tail else [])]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, Mapping) else token


def _bert(path: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    try:
        words = read_bytes(path, limits().json_bytes).decode().split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: {error}") from None
    vocabulary = {word.rstrip("\r"): i for i, word in enumerate(words if words[-1] else words[:-1])}
    special = [
        _content(config.get(f"{k}_token") or f"[{k.upper()}]")
        for k in ("pad", "unk", "cls", "sep", "mask")
    ]
    if missing := [token for token in special[1:4] if token not in vocabulary]:
        raise InputError(
            f"{path}: the token {missing[0]!r} is missing; BERT's vocabularies have it"
        )
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=special[1]))
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=config.get("do_lower_case", True),
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens([token for token in special if token in vocabulary])
    around(backend, special[2], special[3])
    return backend


def _byte_level(
    folder: Path, kind: str, config: Mapping[str, Any]
) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    if kind not in ("gpt2", "roberta"):
        raise unknown(
            f"folder: {str(folder)!r}: merges.txt without tokenizer.json is not enough for",
            kind,
            ["gpt2", "roberta"],
        )
    with border(f"folder: {str(folder)!r}: vocab.json and merges.txt are not a tokenizer"):
        vocabulary = schema.read(folder / "vocab.json", dict[str, schema.Index])
        lines = read_bytes(folder / "merges.txt", limits().json_bytes).decode().split("\n")
        merges = [
            line.rstrip("\r").split(" ")
            for line in lines
            if line.strip() and not line.startswith("#version")
        ]
        if odd := next((pair for pair in merges if len(pair) != 2), None):
            raise InputError(
                f"{folder / 'merges.txt'}: the line {' '.join(odd)!r:.80} is not a pair of tokens"
            )
        model = models.BPE(vocabulary, [(left, right) for left, right in merges])
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=bool(config.get("add_prefix_space", False))
    )
    backend.decoder = decoders.ByteLevel()
    if kind == "gpt2":
        backend.add_special_tokens(["<|endoftext|>"])
        return backend, dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    names = {
        "bos": "<s>",
        "eos": "</s>",
        "unk": "<unk>",
        "pad": "<pad>",
        "cls": "<s>",
        "sep": "</s>",
    }
    mask = AddedToken("<mask>", lstrip=True, special=True, normalized=False)
    backend.add_special_tokens([*dict.fromkeys(names.values()), mask])
    around(backend, "<s>", "</s>")
    return backend, {**{f"{k}_token": v for k, v in names.items()}, "mask_token": "<mask>"}


def _merges(pieces: Pieces) -> list[tuple[str, str]]:
    """Return the pairs that SentencePiece joins to a piece, by the score of the piece."""
    kinds = enumerate(pieces.kinds)
    parts = {pieces.tokens[i]: i for i, kind in kinds if kind in (NORMAL, USER_DEFINED, UNUSED)}
    found = []
    for whole, i in parts.items():
        if pieces.kinds[i] == UNUSED:
            continue
        cuts = [(whole[:n], whole[n:]) for n in range(1, len(whole))]
        pairs = [(parts[a], parts[b], a, b) for a, b in cuts if a in parts and b in parts]
        found += [(-pieces.scores[i], a, b) for _, _, a, b in sorted(pairs)]
    return [(a, b) for _, a, b in sorted(found, key=lambda pair: pair[0])]


# --------------------------------------------------------------------------------- protocol buffers


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the fields of a message: varints as numbers, the others as bytes."""
    at = 0
    while at < len(data):
        key, at = _number(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _number(data, at)
        elif kind in (1, 2, 5):
            size, at = _number(data, at) if kind == 2 else (8 if kind == 1 else 4, at)
            if at + size > len(data):
                raise ValueError("it ends within a field")
            value = data[at : at + size]
            at = at + size
        else:
            raise ValueError(f"a field of the kind {kind}")
        yield key >> 3, value


def _number(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        value = value | (byte & 127) << shift
        at = at + 1
        if byte < 128:
            return value, at
    raise ValueError("a number of more than ten bytes")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def piece_list(
    tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int], **settings: Any
) -> Pieces:
    """Return the `Pieces` of a file that stores them as lists (GGUF).

    Raises:
      InputError: lists of different lengths.
    """
    if not len(tokens) == len(scores) == len(kinds):
        raise InputError(
            f"tokenizer: {len(tokens)} tokens, {len(scores)} scores, {len(kinds)} types; allowed: "
            "the same number of each"
        )
    return Pieces(
        list(tokens), [float(score) for score in scores], [int(kind) for kind in kinds], **settings
    )
