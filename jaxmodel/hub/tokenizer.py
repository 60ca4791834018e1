"""Text to token ids and back: tokenizers from an HF folder or a GGUF file, or newly trained."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from jaxmodel import schema
from jaxmodel.errors import InputError, border
from jaxmodel.hub import backends, chat, images as image_files, vocabularies
from jaxmodel.hub.schemas import Ends, Generation, Tokens
from jaxmodel.report.shown import card

END_OF_TEXT = "<|endoftext|>"
ROLES = tuple(f"{kind}_token" for kind in ("bos", "eos", "pad", "unk", "cls", "sep", "mask"))


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A `tokenizers.Tokenizer` that also knows the ends of a text and how to write a chat.

    Attributes:
      backend: the library's tokenizer, which `encode` and `decode` use unchanged.
      eos_ids: the ids that end a text, the main one first; empty if there is none.
      bos_id: the id that begins a text, or None.
      pad_id: the id that pads rows, or None.
      chat_template: an HF template in Jinja, or several by name, or None.
      special: the special tokens by their role in HF (those of `ROLES` that exist), as templates
        see them; None for the tokens of the ids above.
      images: the image processor of a model of text and images, or None.
    """

    backend: tokenizers.Tokenizer = field(repr=False)
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    pad_id: int | None = None
    chat_template: chat.Template | None = field(default=None, repr=False)
    special: Mapping[str, str] | None = field(default=None, repr=False)
    images: image_files.ImageProcessor | None = None

    def __repr__(self) -> str:
        return f"Tokenizer({', '.join(f'{name} {value}' for name, value in self._facts().items())})"

    def _repr_html_(self) -> str:
        return card("Tokenizer", self._facts())

    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "kind": type(self.backend.model).__name__,
            "tokens": f"{self.vocab_size:,}",
        }
        facts |= {
            role.removesuffix("_token"): repr(token) for role, token in self.named_tokens.items()
        }
        return facts | {"chat template": "yes" if self.chat_template else "no"}

    @property
    def vocab_size(self) -> int:
        """The number of tokens, including special ones."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def named_tokens(self) -> dict[str, str]:
        """The special tokens by role in HF: `bos_token`, `eos_token`, `pad_token` and others."""
        said = dict(self.special or {})
        ids = {
            "bos_token": self.bos_id,
            "eos_token": next(iter(self.eos_ids), None),
            "pad_token": self.pad_id,
        }
        for role, i in ids.items():
            known = role in said and self.backend.token_to_id(said[role]) is not None
            if i is not None and (self.special is None or known):
                said[role] = self.backend.id_to_token(i) or ""
            elif known:
                del said[role]
        return said

    @functools.cached_property
    def begins(self) -> tuple[int, ...]:
        """The ids that the tokenizer puts before a text (begin-of-text); () if none."""
        bare = self.encode("a")
        whole = self.encode("a", special=True)
        where = [i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare]
        return tuple(whole[: where[0]]) if bare and where else ()

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids that `decode` leaves out."""
        return frozenset(
            i for i, token in self.backend.get_added_tokens_decoder().items() if token.special
        )

    def beyond(self, rows: int) -> tuple[str, int] | None:
        """Return the first token, and its id, that a table of `rows` rows lacks; None if none.

        A special token that has no role does not count, nor does the padding token, since rows are
        padded by masks: only a text that spells it out would contain it.
        """
        roles = {token for role, token in self.named_tokens.items() if role != "pad_token"}
        added = self.backend.get_added_tokens_decoder()
        spare = {
            i for i, token in added.items() if token.special and token.content not in roles
        } | {self.pad_id}
        over = {
            i: token
            for token, i in self.backend.get_vocab().items()
            if i >= rows and i not in spare
        }
        return (over[min(over)], min(over)) if over else None

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Return the ids of `text`; a special token spelled out in it becomes its single id.

        Args:
          text: of any length; it is not truncated.
          special: whether to add the tokens that the tokenizer puts around a text (such as
            begin-of-text).

        Raises:
          InputError: not a string of valid Unicode, or more work than `limits` allows.
        """
        return self.encode_batch([text], special)[0]

    def encode_batch(self, texts: Iterable[str], special: bool = False) -> list[list[int]]:
        """Return the ids of several texts, encoded on all cores; rows keep their own lengths.

        See `encode`.
        """
        return backends.encode(self.backend, list(_several(texts)), special)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Return the text of `ids`.

        Bytes that are not a whole character become U+FFFD; unknown ids are skipped.

        Raises:
          InputError: a negative id, or a text longer than `limits` allows.
        """
        ids = [int(i) for i in ids]
        if min(ids, default=0) < 0:
            raise InputError(
                f"ids: {min(ids)} is not a token id; allowed: 0 to {self.vocab_size - 1}"
            )
        return backends.decode(self.backend, ids, skip_special)

    def apply_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        **more: Any,
    ) -> str:
        """Return a conversation as text in the form that the model was trained on.

        Args:
          messages: the conversation, in order, as `{"role": "user", "content": "..."}`.
          add_generation_prompt: whether to end with the opening of the assistant's answer.
          tools: functions that the model may call: JSON schemas, as HF templates take them.
          documents: that the answer may rest on, as `{"title": "...", "text": "..."}`.
          template: the name of one of several templates; None for "tool_use" with tools, else
            "default".
          **more: other variables of the template (`enable_thinking=False`).

        Raises:
          InputError: there is no chat template, a message has no role, or the template refuses the
            messages.
        """
        chosen = chat.choose(self.chat_template, template, tools is not None)
        given = {
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
            **more,
        }
        return chat.render(chosen, self.named_tokens, messages, **given)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json for transformers and `from_folder`.

        If more than one id ends a text, they go to generation_config.json, where HF keeps them.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "chat_template": chat.to_config(self.chat_template),
            **self.named_tokens,
        }
        _write_json(
            folder / "tokenizer_config.json", {k: v for k, v in config.items() if v is not None}
        )
        # backend.save would turn a full disk into a bare Exception, and callers expect OSError.
        (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        if self.images is not None:
            self.images.save(folder)
        if len(self.eos_ids) > 1:
            path = folder / "generation_config.json"
            _write_json(
                path,
                {**schema.read(path, Generation, missing=True), "eos_token_id": list(self.eos_ids)},
            )


def is_there(folder: Path) -> bool:
    """Return whether a folder has a file from which a tokenizer can be read."""
    return any((folder / name).is_file() for name in vocabularies.FILES)


def from_folder(folder: str | Path) -> Tokenizer:
    """Return the tokenizer of a folder in HF layout: tokenizer.json, else a vocabulary alone.

    Accompanying files are used if present. A text ends with the `eos_token` and with the ids of
    generation_config.json and config.json.

    Raises:
      InputError: there is no tokenizer, or a file is invalid.
    """
    folder = Path(folder)
    names = ("special_tokens_map.json", "tokenizer_config.json")
    config = {
        k: v
        for name in names
        for k, v in schema.read(folder / name, Tokens, missing=True).items()
        if v is not None
    }
    path = folder / "tokenizer.json"
    own = {}
    if path.is_file():
        backend = backends.load(path)
    else:
        with border(f"folder: {str(folder)!r} has no complete vocabulary"):
            backend, own = vocabularies.from_vocabulary(folder, config)
        backends.check(backend, str(folder))
    contents = own | {
        role: token for role in ROLES if (token := _content(config.get(role))) is not None
    }
    _add_tokens(backend, folder, config, set(contents.values()))
    ids = {role: backend.token_to_id(token) for role, token in contents.items()}
    ends = [
        *_ends(folder / "generation_config.json", Generation),
        *_ends(folder / "config.json", Ends),
    ]
    rows = max(backend.get_vocab_size(), _rows(folder / "config.json"))
    # SigLIP's files repeat CLIP's end token, for which they have no row
    eos = [
        ids.get("eos_token"),
        *(i for i in ends if i < rows),
    ]
    template = chat.read(folder, config.get("chat_template"))
    pictures = image_files.from_folder(folder)
    return Tokenizer(
        backend,
        distinct(eos),
        ids.get("bos_token"),
        ids.get("pad_token"),
        template,
        contents,
        pictures,
    )


def _add_tokens(
    backend: tokenizers.Tokenizer, folder: Path, config: Mapping[str, Any], named: set[str]
) -> None:
    """Add the tokens that only `added_tokens_decoder` or added_tokens.json lists.

    Raises:
      InputError: an invalid token, or one whose id is not the next.
    """
    found: dict[int, AddedToken] = {}
    listed = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    special = named | {
        _content(token) for token in (listed.values() if isinstance(listed, Mapping) else listed)
    }
    for content, i in schema.read(
        folder / "added_tokens.json", dict[str, schema.Index], missing=True
    ).items():
        found[i] = AddedToken(
            content, special=content in special, normalized=content not in special
        )
    for key, entry in config.get("added_tokens_decoder", {}).items():
        if not key.isdecimal():
            raise InputError(
                f"{folder}/tokenizer_config.json: added_tokens_decoder has the id {key!r:.40}; "
                f"allowed: whole numbers"
            )
        options = {
            k: entry[k] for k in ("lstrip", "rstrip", "single_word", "special") if k in entry
        }
        found[int(key)] = AddedToken(
            entry["content"],
            normalized=entry.get("normalized", not entry.get("special")),
            **options,
        )
    there = {token.content for token in backend.get_added_tokens_decoder().values()}
    for i, token in sorted(found.items()):
        if token.content in there:
            continue
        known = backend.token_to_id(token.content) is not None
        with border(
            f"{folder}: the added token {token.content!r:.80} is rejected by the tokenizer"
        ):
            backend.add_tokens([token])
        if not known and backend.token_to_id(token.content) != i:
            given = backend.token_to_id(token.content)
            raise InputError(
                f"{folder}: the added token {token.content!r} has id {i}, but the next id of "
                f"tokenizer.json is {given}"
            )


def _ends(path: Path, kind: Any) -> list[int]:
    """Return the `eos_token_id` of a file, a number or a list, and that of its text part, if any.

    Raises:
      InputError: a value of another type.
    """
    hf = schema.read(path, kind, missing=True)
    several = [part.get("eos_token_id") for part in (hf, hf.get("text_config") or {})]
    return [
        i for one in several for i in (one if isinstance(one, list) else [one]) if i is not None
    ]


def _rows(path: Path) -> int:
    """Return the number of rows of a model's table, or 0 if config.json does not state it."""
    hf = schema.read(path, Ends, missing=True)
    return max(int(part.get("vocab_size") or 0) for part in (hf, hf.get("text_config") or {}))


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer; every text round-trips.

    `<|endoftext|>` is id 0: begin, end and padding.

    Args:
      texts: the corpus; an iterator is consumed once.
      vocab_size: number of tokens, at least 257 (256 bytes and the special one); a small corpus may
        give fewer.

    Returns:
      A tokenizer that is always the same for the same texts and size.

    Raises:
      InputError: `vocab_size` is below 257, or `texts` is a single string.

    Source: Sennrich et al., Neural Machine Translation of Rare Words with Subword Units, 2016;
      bytes as in GPT-2, 2019.

    >>> tokenizer = train_bpe(["low lower lowest", "new newer newest"], vocab_size=264)
    >>> tokenizer.decode(tokenizer.encode("a newer café"))
    'a newer café'
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + 1:
        raise InputError(
            f"vocab_size: {vocab_size} is too small; allowed: {len(alphabet) + 1} or more"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer((WORDS,))
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    try:
        backend.train_from_iterator(_several(texts), trainer)
    except (TypeError, UnicodeError):
        raise InputError(
            "texts: one is not a string of valid Unicode; allowed: any str without lone surrogates"
        ) from None
    return Tokenizer(backend, eos_ids=(0,), bos_id=0, pad_id=0)


def stream_decoder(
    tokenizer: Tokenizer, skip_special: bool = True, after: Sequence[int] = ()
) -> Callable[[int | None], str]:
    """Return a function from the next id to the text that it completes, for streaming.

    Together the pieces are the text that `decode(after + ids)` adds to `decode(after)`; none ends
    within a UTF-8 character. After the last id, a call with None returns the text that was held
    back (U+FFFD, if the ids stop within a character).

    Args:
      tokenizer: of the ids.
      skip_special: whether special tokens are left out, as by `decode`.
      after: the preceding ids (a prompt): a decoder that drops the space of the first word must not
        do so within a text.

    >>> tokenizer = train_bpe([], vocab_size=257)
    >>> push = stream_decoder(tokenizer)
    >>> [push(i) for i in tokenizer.encode("né")]
    ['n', '', 'é']
    """
    skipped = tokenizer.special_ids if skip_special else frozenset()
    in_bytes: dict[int, bool] = {}

    def is_byte(token: int) -> bool:
        """Return whether a token is one byte of a longer character, such as `<0xE6>`.

        The meaning of a run of them is known only at its end.
        """
        if token not in in_bytes:
            said = tokenizer.backend.id_to_token(token) or ""
            in_bytes[token] = len(said) == 6 and said.startswith("<0x") and said.endswith(">")
        return in_bytes[token]

    def tail(ids: list[int]) -> list[int]:
        """Return the shortest end of `ids` that determines the text of what follows."""
        shown = 0
        for start in range(len(ids) - 1, -1, -1):
            shown += ids[start] not in skipped
            if shown >= 4 and not is_byte(ids[start]):
                return ids[start:]
        return ids

    ids = tail([int(i) for i in after])
    sent = len(tokenizer.decode(ids, skip_special)) if ids else 0

    in_run = False

    def push(token: int | None) -> str:
        nonlocal sent, ids, in_run
        if token is not None:
            ids.append(int(token))
            if int(token) not in skipped:  # a skipped token does not end a run
                in_run = is_byte(int(token))
        text = tokenizer.decode(ids, skip_special)
        # A trailing U+FFFD may be half a character or a real one: hold it until the next id.
        held = token is not None and in_run
        ready = (
            sent if held else max(sent, len(text) if token is None else len(text.rstrip("\ufffd")))
        )
        piece = text[sent:ready]
        sent = ready
        if sent == len(text) and len(ids) > 16:
            ids = tail(ids)
            sent = len(tokenizer.decode(ids, skip_special))
        return piece

    return push


WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def pre_tokenizer(patterns: Sequence[str]) -> pre_tokenizers.PreTokenizer:
    """Return the byte-level pre-tokenizer that splits by these patterns, one after another."""
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    return pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def _several(texts: Iterable[str]) -> Iterable[str]:
    if isinstance(texts, str):
        raise InputError(
            f"texts: a single string was given ({texts!r:.40}); give a list of strings"
        )
    return texts


def distinct(ids: Iterable[int | None]) -> tuple[int, ...]:
    """Return the ids in their order, without None and repetitions."""
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def _content(token: str | Mapping[str, Any] | None) -> str | None:
    return token.get("content") if isinstance(token, Mapping) else token


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
