"""The border to the `tokenizers` library.

A tokenizer.json is someone else's program, so it gets limits and one-line errors. A file is first
loaded in another process (`child.tried`), which also splits long runs of every character, because
some files crash the library and some patterns never finish. The length of what its steps can make
of a text is computed from them (`growth`).
"""

from __future__ import annotations

import base64
import json
import math
import string
import struct
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from jaxmodel import child
from jaxmodel.errors import InputError, border
from jaxmodel.files import read_bytes
from jaxmodel.limits import limits, way

_PER = 100_000
_PROBES = [
    *(char * 300 + end for char in string.printable + "é中\u0301😀" for end in "!a"),
    "The quick brown fox's 12,345 jumps:\n\n\tover  the lazy dog... " * 8,
]


def load(path: Path) -> tokenizers.Tokenizer:
    """Return the tokenizer of a tokenizer.json.

    Raises:
      InputError: not a tokenizer, or one that can exceed `limits`.
    """
    what = f"folder: {str(path)!r} is not a tokenizer"
    with border(what):
        text = read_bytes(path, limits().json_bytes).decode("utf-8")
        child.tried("tokenizer", path, what, texts=_PROBES)
        made = tokenizers.Tokenizer.from_str(text)
        # Some folders keep the padding and truncation of their training run, which are not part
        # of the vocabulary.
        made.no_padding()
        made.no_truncation()
    check(made, str(path))
    return made


def check(backend: tokenizers.Tokenizer, where: str) -> None:
    """Refuse a tokenizer with a step that can make a text too long.

    Raises:
      InputError: such a step.
    """
    parts = {
        kind: getattr(backend, kind)
        for kind in ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    }
    with border(f"{where}: not a tokenizer of the library's own parts"):
        said = {
            kind: json.loads(part.__getstate__())
            for kind, part in parts.items()
            if part is not None
        }
        factors = {kind: growth(part) for kind, part in said.items()}
    text = factors.get("normalizer", 1.0) * factors.get("pre_tokenizer", 1.0)
    for kind, factor in (
        ("normalizer", text),
        *((k, factors.get(k, 1.0)) for k in ("post_processor", "decoder")),
    ):
        if factor > limits().tokenizer_growth:
            raise InputError(
                f"{where}: its {kind} can make a text {factor:.3g} times as long; allowed: "
                f"{limits().tokenizer_growth:g} times "
                f"({way('tokenizer_growth')})"
            )


def growth(step: Any) -> float:
    """Return an upper bound of the factor by which a step, given as JSON, lengthens a text.

    Steps of the library that do not multiply text count as 1.

    >>> growth({"type": "Replace", "pattern": {"String": "ab"}, "content": "abcdef"})
    3.0
    """
    inner = [
        growth(one)
        for key in ("normalizers", "pretokenizers", "processors", "decoders")
        for one in step.get(key, ())
    ]
    kind = step.get("type")
    own = 1.0
    if kind == "Replace":
        content = len(step["content"])
        pattern = step["pattern"].get("String")
        own = max(content / len(pattern), 1.0) if pattern else 1.0 + content
    elif kind == "Prepend":
        own = 1.0 + len(step["prepend"])
    elif kind == "Precompiled":
        own = float(_longest(base64.b64decode(step["precompiled_charsmap"])))
    elif kind == "BertNormalizer":
        own = 3.0  # spaces around Chinese characters
    elif kind == "ByteLevel":
        own = 2.0  # a byte beyond ASCII becomes a character of two bytes
    elif kind == "TemplateProcessing":
        tokens = {name: len(token["ids"]) for name, token in step["special_tokens"].items()}
        count = lambda piece: 1 if "Sequence" in piece else tokens[piece["SpecialToken"]["id"]]
        own = float(sum(map(count, step["single"])))
    return math.prod(inner, start=own)


def _longest(charsmap: bytes) -> int:
    """Return the length of the longest replacement of one character in a compiled normalisation."""
    (size,) = struct.unpack_from("<I", charsmap)
    return (
        max(
            (len(text.decode("utf-8", "replace")) for text in charsmap[4 + size :].split(b"\0")),
            default=1,
        )
        or 1
    )


def encode(backend: tokenizers.Tokenizer, texts: Sequence[str], special: bool) -> list[list[int]]:
    """Return the ids of texts.

    Raises:
      InputError: a text is not a string of valid Unicode, the tokenizer fails on it, or it exceeds
        the time that `limits` allows.
    """
    size = sum(map(len, texts))
    work = lambda: [row.ids for row in backend.encode_batch_fast(texts, add_special_tokens=special)]
    try:
        return _in_time(work, size, "the tokenizer cannot read it")
    except TypeError:
        raise InputError(
            "text: not a string of valid Unicode; allowed: any str without lone surrogates"
        ) from None


def encode_offsets(
    backend: tokenizers.Tokenizer, text: str
) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the ids of a text, and for each id the start and end of its characters.

    Special tokens around texts are not added.

    Raises:
      InputError: see `encode`.
    """
    work = lambda: backend.encode_batch([text], add_special_tokens=False)[0]
    try:
        found = _in_time(work, len(text), "the tokenizer cannot read it")
    except TypeError:
        raise InputError(
            "text: not a string of valid Unicode; allowed: any str without lone surrogates"
        ) from None
    return found.ids, found.offsets


def decode(backend: tokenizers.Tokenizer, ids: Sequence[int], skip_special: bool) -> str:
    """Return the text of ids.

    Raises:
      InputError: the text would be longer than `limits` allows, the tokenizer fails, or it takes
        too long.
    """
    lengths = {i: len(backend.id_to_token(i) or "") for i in set(ids)}
    if sum(lengths[i] for i in ids) > limits().tokenizer_characters:
        most = f"{limits().tokenizer_characters:,.0f} characters ({way('tokenizer_characters')})"
        raise InputError(f"ids: their text has more than {most}")
    # `decode` would block all other Python threads
    work = lambda: backend.decode_batch([list(ids)], skip_special_tokens=skip_special)[0]
    return _in_time(work, len(ids), "the tokenizer cannot write them")


def _in_time[T](work: Callable[[], T], size: int, failed: str) -> T:
    said: list[Any] = []

    def run() -> None:
        try:
            said.append((True, work()))
        except BaseException as error:  # a Rust panic is not an Exception
            said.append((False, error))

    what = "text" if failed.endswith("it") else "ids"
    seconds = limits().tokenizer_seconds * max(size / _PER, 1)
    thread = threading.Thread(target=run, name="tokenizer", daemon=True)
    thread.start()
    thread.join(seconds)
    if not said:
        raise InputError(
            f"{what}: {failed}: it takes more than {seconds:g} seconds ({way('tokenizer_seconds')})"
        )
    well, result = said[0]
    if well:
        return result
    if isinstance(result, TypeError | MemoryError):
        raise result
    with border(f"{what}: {failed}"):
        raise result
