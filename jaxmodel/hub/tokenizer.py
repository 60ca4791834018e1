"""Text to token ids and back: from a HF folder, from the metadata of a GGUF file, or trained on the
spot.
"""

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
    """A `tokenizers.Tokenizer`, with where a text begins and ends and how a chat is written.

    Attributes:
      backend: the library's tokenizer; `encode` and `decode` are its, unchanged.
      eos_ids: the ids that end a text, the principal one first; empty where there is none.
      bos_id: the id that begins a text, or None.
      pad_id: the id that fills rows, or None.
      chat_template: a Jinja template in the manner of HF, or several by name, or None.
      special: the special tokens by their role in HF (those of `ROLES` that there are), as
        templates see them; None for those of the ids above.
      images: what reads the images of a model of both, or None.
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
        """Number of tokens, special ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def named_tokens(self) -> dict[str, str]:
        """Return the special tokens by their role in HF:

        `bos_token`, `eos_token`, `pad_token` and what else has a role.
        """
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
        """The ids that the tokenizer puts in front of a text (begin-of-text); () for none."""
        bare = self.encode("a")
        whole = self.encode("a", special=True)
        where = [i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare]
        return tuple(whole[: where[0]]) if bare and where else ()

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Return the ids that `decode` leaves out."""
        return frozenset(
            i for i, token in self.backend.get_added_tokens_decoder().items() if token.special
        )

    def beyond(self, rows: int) -> tuple[str, int] | None:
        """The first token, and its id, behind the last row of a table; None where all that a text
        needs are within.

        A special token that has no role here does not count, nor does that of padding, for rows are
        padded by masks: only a text in which it is written out would have it.
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
        """Return the ids of `text`. A special token written out in it becomes its one id.

        Args:
          text: any length; it is not truncated.
          special: add what the tokenizer puts around a text (for instance a begin-of-text id).

        Raises:
          InputError: not a string of valid Unicode, or work beyond what `limits` say.
        """
        return self.encode_batch([text], special)[0]

    def encode_batch(self, texts: Iterable[str], special: bool = False) -> list[list[int]]:
        """`encode` for several texts at once, on all cores; rows keep their own lengths."""
        return backends.encode(self.backend, list(_several(texts)), special)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are no whole character become U+FFFD, ids beyond the
        vocabulary nothing.

        Raises:
          InputError: a negative id, or a text beyond what `limits` say.
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
        """Return a conversation as the text that the model was trained on.

        Args:
          messages: what was said, in order, as `{"role": "user", "content": "..."}`.
          add_generation_prompt: end with the opening of the assistant's answer.
          tools: what the model may call: JSON schemas of functions, as HF templates take them.
          documents: what the answer may rest on, as `{"title": "...", "text": "..."}`.
          template: the name of one of several templates; None for "tool_use" with tools, else
            "default".
          **more: what else the template reads (`enable_thinking=False`).

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
        """Write tokenizer.json and tokenizer_config.json, which transformers and `from_folder`
        read.

        More than one end-of-text id goes to generation_config.json, where HF keeps them.
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
        # Not backend.save: that turns a full disk into a bare Exception, and callers wait for
        # OSError.
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
    """Return whether a folder has a file that a tokenizer is read from."""
    return any((folder / name).is_file() for name in vocabularies.FILES)


def from_folder(folder: str | Path) -> Tokenizer:
    """The tokenizer of a folder in HF layout: tokenizer.json, else a vocabulary alone; with its
    companions where present.

    A text ends with the `eos_token` and with the ids of generation_config.json and config.json.

    Raises:
      InputError: there is none, or a file cannot be read as what it should be.
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
        with border(f"folder: {str(folder)!r} has no whole vocabulary"):
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
    # SigLIP's files repeat CLIP's end, which they have no row for
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
    """The tokens that only `added_tokens_decoder` of tokenizer_config.json, or added_tokens.json,
    knows.

    Raises:
      InputError: one that is no token, or whose id is not the next.
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
        with border(f"{folder}: the added token {token.content!r:.80} is not taken"):
            backend.add_tokens([token])
        if not known and backend.token_to_id(token.content) != i:
            given = backend.token_to_id(token.content)
            raise InputError(
                f"{folder}: the added token {token.content!r} has id {i}, but the next of "
                f"tokenizer.json is {given}"
            )


def _ends(path: Path, kind: Any) -> list[int]:
    """The `eos_token_id` of a file, a number or a list; also that of the text's part, in models of
    several kinds of input.

    Raises:
      InputError: it is something else.
    """
    hf = schema.read(path, kind, missing=True)
    several = [part.get("eos_token_id") for part in (hf, hf.get("text_config") or {})]
    return [
        i for one in several for i in (one if isinstance(one, list) else [one]) if i is not None
    ]


def _rows(path: Path) -> int:
    """Return the rows of a model's table, 0 where config.json does not say."""
    hf = schema.read(path, Ends, missing=True)
    return max(int(part.get("vocab_size") or 0) for part in (hf, hf.get("text_config") or {}))


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer; every text round-trips.

    `<|endoftext|>` is id 0: begin, end and padding.

    Args:
      texts: the corpus; an iterator is consumed once.
      vocab_size: tokens wanted, at least 257 (256 bytes and the special one); a small corpus may
        give fewer.

    Returns:
      The same tokenizer for the same texts and size, always.

    Raises:
      InputError: `vocab_size` below 257, or `texts` a single string.

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
    """A function from the next id to the text that it completes, for showing a text while it is
    generated.

    The pieces together are what `decode(after + ids)` has more than `decode(after)`; none ends
    within a UTF-8 character. At the end of the ids, calling it with None gives what was held back
    (U+FFFD, where the ids stop within a character).

    Args:
      tokenizer: whose ids.
      skip_special: whether special tokens are left out, as by `decode`.
      after: the ids in front (a prompt): a decoder that drops the space of the first word must not
        do so within a text.

    >>> tokenizer = train_bpe([], vocab_size=257)
    >>> push = stream_decoder(tokenizer)
    >>> [push(i) for i in tokenizer.encode("né")]
    ['n', '', 'é']
    """
    skipped = tokenizer.special_ids if skip_special else frozenset()
    in_bytes: dict[int, bool] = {}

    def is_byte(token: int) -> bool:
        """Whether it is a byte of a longer character, `<0xE6>`: what a run of them says is known at
        its end only.
        """
        if token not in in_bytes:
            said = tokenizer.backend.id_to_token(token) or ""
            in_bytes[token] = len(said) == 6 and said.startswith("<0x") and said.endswith(">")
        return in_bytes[token]

    def tail(ids: list[int]) -> list[int]:
        """As few of the last ids as the text of what follows depends on."""
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
            if int(token) not in skipped:  # which leaves a run as it is
                in_run = is_byte(int(token))
        text = tokenizer.decode(ids, skip_special)
        # A trailing U+FFFD may be half a character, or a real one: hold it until the next id
        # decides.
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
    """Make the byte-level pre-tokenizer that cuts by these patterns, one after the other."""
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
    """Leave out repeated ids and None; the order stays."""
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def _content(token: str | Mapping[str, Any] | None) -> str | None:
    return token.get("content") if isinstance(token, Mapping) else token


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
