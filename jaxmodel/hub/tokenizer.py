"""Text to token ids and back: from a HF folder, from the metadata of a GGUF file, or trained on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from jaxmodel import schema
from jaxmodel.errors import InputError, unknown
from jaxmodel.hub import images as image_files
from jaxmodel.hub.schemas import Generation, Tokens

END_OF_TEXT = "<|endoftext|>"
ROLES = ("cls_token", "sep_token", "mask_token", "unk_token")


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A `tokenizers.Tokenizer`, with where a text begins and ends and how a chat is written.

    Attributes:
      backend: the library's tokenizer; `encode` and `decode` are its, unchanged.
      eos_ids: the ids that end a text, the principal one first; empty where there is none.
      bos_id: the id that begins a text, or None.
      pad_id: the id that fills rows, or None.
      chat_template: a Jinja template in the manner of HF, or None.
      special: further special tokens by their role in HF: those of `ROLES` that there are (BERT's `mask_token`).
      images: what reads the images of a model of both, or None.
    """

    backend: tokenizers.Tokenizer = field(repr=False)
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    pad_id: int | None = None
    chat_template: str | None = field(default=None, repr=False)
    special: Mapping[str, str] = field(default_factory=dict, repr=False)
    images: image_files.ImageProcessor | None = None

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def beyond(self, rows: int) -> tuple[str, int] | None:
        """The first token, and its id, behind the last row of a table; None where all that a text needs are within.

        A special token that has no role here does not count: only a text in which it is written out would have it.
        """
        roles = {*self._special_tokens().values(), *self.special.values()}
        added = self.backend.get_added_tokens_decoder()
        spare = {i for i, token in added.items() if token.special and token.content not in roles}
        over = {i: token for token, i in self.backend.get_vocab().items() if i >= rows and i not in spare}
        return (over[min(over)], min(over)) if over else None

    def encode(self, text: str, special: bool = False) -> list[int]:
        """The ids of `text`. A special token written out in it becomes its one id.

        Args:
          text: any length; it is not truncated.
          special: add what the tokenizer puts around a text (for instance a begin-of-text id).

        Raises:
          InputError: not a string of valid Unicode.
        """
        return self.encode_batch([text], special)[0]

    def encode_batch(self, texts: Iterable[str], special: bool = False) -> list[list[int]]:
        """`encode` for several texts at once, on all cores; rows keep their own lengths."""
        try:
            rows = self.backend.encode_batch_fast(list(_several(texts)), add_special_tokens=special)
        except TypeError:
            raise InputError("text: not a string of valid Unicode; allowed: any str without lone surrogates") from None
        return [row.ids for row in rows]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are no whole character become U+FFFD, ids beyond the vocabulary nothing.

        Raises:
          InputError: a negative id.
        """
        ids = [int(i) for i in ids]
        if min(ids, default=0) < 0:
            raise InputError(f"ids: {min(ids)} is not a token id; allowed: 0 to {self.vocab_size - 1}")
        return self.backend.decode(ids, skip_special_tokens=skip_special)

    def apply_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """A conversation as the text that the model was trained on.

        Args:
          messages: what was said, in order, as `{"role": "user", "content": "..."}`.
          add_generation_prompt: end with the opening of the assistant's answer.

        Raises:
          InputError: there is no chat template, a message has no role, or the template refuses the messages.
        """
        import jinja2  # only chats need it
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if self.chat_template is None:
            raise InputError("chat_template: this tokenizer has none; give the prompt as plain text")
        if isinstance(messages, str) or not all(isinstance(m, Mapping) and "role" in m for m in messages):
            raise InputError(f"messages: {messages!r:.80} is not a list of {{'role': ..., 'content': ...}}")

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        # The settings that HF templates are written for; the sandbox because a template is somebody else's program.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals["raise_exception"] = refuse
        special = {key: token or "" for key, token in self._special_tokens().items()}
        try:
            return environment.from_string(self.chat_template).render(
                messages=messages, add_generation_prompt=add_generation_prompt, **special
            )
        except Exception as error:  # a template can raise whatever Python can
            raise InputError(f"chat_template: it failed on these messages: {error}") from None

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers and `from_folder` read.

        More than one end-of-text id goes to generation_config.json, where HF keeps them.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "chat_template": self.chat_template,
            **self.special,
            **self._special_tokens(),
        }
        _write_json(folder / "tokenizer_config.json", {k: v for k, v in config.items() if v is not None})
        # Not backend.save: that turns a full disk into a bare Exception, and callers wait for OSError.
        (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        if self.images is not None:
            self.images.save(folder)
        if len(self.eos_ids) > 1:
            path = folder / "generation_config.json"
            _write_json(path, {**schema.read(path, Generation, missing=True), "eos_token_id": list(self.eos_ids)})

    def _special_tokens(self) -> dict[str, str | None]:
        ids = {"bos_token": self.bos_id, "eos_token": next(iter(self.eos_ids), None), "pad_token": self.pad_id}
        return {key: None if i is None else self.backend.id_to_token(i) for key, i in ids.items()}


def from_folder(folder: str | Path) -> Tokenizer:
    """The tokenizer of a folder in HF layout (tokenizer.json; tokenizer_config.json and its companions where present).

    Raises:
      InputError: there is no tokenizer.json, or a file cannot be read as what it should be.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"folder: {str(folder)!r} has no tokenizer.json, the one tokenizer format that is read")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise InputError(f"folder: {str(path)!r} is not a tokenizer: {error}") from None
    # Some folders carry the padding and truncation of their training run; neither belongs to the vocabulary.
    backend.no_padding()
    backend.no_truncation()

    names = ("special_tokens_map.json", "tokenizer_config.json")
    config = {k: v for name in names for k, v in schema.read(folder / name, Tokens, missing=True).items() if v is not None}
    token_ids = {key: _token_id(backend, config.get(f"{key}_token")) for key in ("bos", "eos", "pad")}
    more = schema.read(folder / "generation_config.json", Generation, missing=True).get("eos_token_id")
    eos = [token_ids["eos"], *(more if isinstance(more, list) else [more])]
    contents = {role: _content(config.get(role)) for role in ROLES}
    return Tokenizer(
        backend,
        _distinct(eos),
        token_ids["bos"],
        token_ids["pad"],
        _chat_template(folder, config.get("chat_template")),
        {role: token for role, token in contents.items() if token is not None and backend.token_to_id(token) is not None},
        image_files.from_folder(folder),
    )


def from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer inside a GGUF file: byte-level BPE (`tokenizer.ggml.model` = "gpt2").

    Bytes that the file's vocabulary lacks are dropped from a text, as the original tokenizer does
    (SmolLM2 lacks six control characters and two leading bytes of unassigned planes).

    Args:
      metadata: `GGUFFile.metadata`.

    Raises:
      InputError: another kind of tokenizer, an unknown pre-tokenizer, or missing or inconsistent entries.
    """

    def get(key: str) -> Any:
        if f"tokenizer.ggml.{key}" not in metadata:
            raise InputError(f"metadata: the GGUF file has no tokenizer.ggml.{key}")
        return metadata[f"tokenizer.ggml.{key}"]

    if get("model") != "gpt2":
        raise unknown("tokenizer.ggml.model", get("model"), ["gpt2"])
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in _SPLITS:
        raise unknown("tokenizer.ggml.pre", name, _SPLITS)
    tokens, like_llama3 = get("tokens"), name == "llama-bpe"
    try:
        merges = [_pair(merge) for merge in get("merges")]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=like_llama3))
    except Exception as error:  # the library raises nothing more specific
        raise InputError(f"metadata: tokenizer.ggml.tokens and merges do not fit together: {error}") from None
    if len(vocabulary) != len(tokens):
        raise InputError(f"metadata: tokenizer.ggml.tokens has {len(tokens) - len(vocabulary)} repeated entries")
    if name == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer(_SPLITS[name])
    backend.decoder = decoders.ByteLevel()
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    for added, kind in ((True, _CONTROL), (False, _USER_DEFINED)):
        chosen = [token for token, k in zip(tokens, kinds, strict=False) if k == kind]
        backend.add_tokens([AddedToken(token, special=added, normalized=False) for token in chosen])

    ids = {key: metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "eot", "eom", "padding")}
    for key, i in ids.items():
        if i is not None and not 0 <= i < len(tokens):
            raise InputError(f"tokenizer.ggml.{key}_token_id: {i} is not a token; allowed: 0 to {len(tokens) - 1}")
    head = [tokens[ids["bos"]]] if ids["bos"] is not None and metadata.get(_ADD_BOS, like_llama3) else []
    tail = [tokens[ids["eos"]]] if ids["eos"] is not None and metadata.get(_ADD_EOS, False) else []
    if head or tail:
        special = [(token, vocabulary[token]) for token in dict.fromkeys(head + tail)]
        backend.post_processor = processors.TemplateProcessing(single=[*head, "$A", *tail], special_tokens=special)
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(backend, _distinct([ids["eos"], ids["eot"], ids["eom"]]), ids["bos"], ids["padding"], template)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer; every text round-trips. `<|endoftext|>` is id 0: begin, end and padding.

    Args:
      texts: the corpus; an iterator is consumed once.
      vocab_size: tokens wanted, at least 257 (256 bytes and the special one); a small corpus may give fewer.

    Returns:
      The same tokenizer for the same texts and size, always.

    Raises:
      InputError: `vocab_size` below 257, or `texts` a single string.

    Source: Sennrich et al., Neural Machine Translation of Rare Words with Subword Units, 2016; bytes as in GPT-2, 2019.

    >>> tokenizer = train_bpe(["low lower lowest", "new newer newest"], vocab_size=264)
    >>> tokenizer.decode(tokenizer.encode("a newer café"))
    'a newer café'
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + 1:
        raise InputError(f"vocab_size: {vocab_size} is too small; allowed: {len(alphabet) + 1} or more")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = _pre_tokenizer(_SPLITS["gpt-2"])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    try:
        backend.train_from_iterator(_several(texts), trainer)
    except (TypeError, UnicodeError):
        raise InputError("texts: one is not a string of valid Unicode; allowed: any str without lone surrogates") from None
    return Tokenizer(backend, eos_ids=(0,), bos_id=0, pad_id=0)


def stream_decoder(tokenizer: Tokenizer, skip_special: bool = True) -> Callable[[int | None], str]:
    """A function from the next id to the text that it completes, for showing a text while it is generated.

    The pieces together equal `tokenizer.decode(ids)`; none ends within a UTF-8 character. At the end of the ids,
    calling it with None gives what was held back (U+FFFD, where the ids stop within a character).

    >>> tokenizer = train_bpe([], vocab_size=257)
    >>> push = stream_decoder(tokenizer)
    >>> [push(i) for i in tokenizer.encode("né")]
    ['n', '', 'é']
    """
    # Byte-level text is the concatenation of its tokens' bytes, so whatever is complete can be forgotten. Other
    # decoders look back (WordPiece joins, Metaspace strips the first space), and keep all ids.
    forgetful = isinstance(tokenizer.backend.decoder, decoders.ByteLevel)
    ids: list[int] = []
    sent = 0

    def push(token: int | None) -> str:
        nonlocal sent
        if token is not None:
            ids.append(int(token))
        text = tokenizer.decode(ids, skip_special)
        # A trailing U+FFFD may be half a character, or a real one: hold it until the next id decides.
        ready = max(sent, len(text) if token is None else len(text.rstrip("\ufffd")))
        piece, sent = text[sent:ready], ready
        if forgetful and sent == len(text):
            ids.clear()
            sent = 0
        return piece

    return push


_ADD_BOS, _ADD_EOS = "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token"
_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LETTERS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Where a text may be cut before merging, by the name that GGUF gives it (tokenizer.ggml.pre): each pattern cuts the
# pieces left by the one before. The names and patterns are the file format's, as llama.cpp defines it.
_SPLITS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _WORDS, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (_WORDS,),
    "llama-bpe": (_LETTERS + r"\p{N}{1,3}" + _REST,),
    "qwen2": (_LETTERS + r"\p{N}" + _REST,),
    "smollm": (r"\p{N}", _WORDS),
}


def _pre_tokenizer(patterns: Sequence[str]) -> pre_tokenizers.PreTokenizer:
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _several(texts: Iterable[str]) -> Iterable[str]:
    if isinstance(texts, str):
        raise InputError(f"texts: a single string was given ({texts!r:.40}); give a list of strings")
    return texts


def _pair(merge: str) -> tuple[str, str]:
    left, right = merge.split(" ")
    return left, right


def _distinct(ids: Iterable[int | None]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def _content(token: str | Mapping[str, Any] | None) -> str | None:
    return token.get("content") if isinstance(token, Mapping) else token


def _token_id(backend: tokenizers.Tokenizer, token: str | Mapping[str, Any] | None) -> int | None:
    content = _content(token)
    return None if content is None else backend.token_to_id(content)


def _chat_template(folder: Path, entry: str | list[dict[str, str]] | None) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if isinstance(entry, list):  # named templates
        return {item["name"]: item["template"] for item in entry}.get("default")
    return entry


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
