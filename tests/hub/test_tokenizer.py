"""Tokenizers:

SmolLM2's facts, the splits that GGUF names, folders in HF layout, training, chats and streaming.
"""

from __future__ import annotations

import json
import os
import pydoc_data.topics
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings, strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from jaxmodel.errors import InputError
from jaxmodel.hub.gguf import find_smollm2, read_gguf
from jaxmodel.hub.gguf_tokenizer import from_gguf
from jaxmodel.hub.tokenizer import Tokenizer, from_folder, stream_decoder, train_bpe

ENGLISH = "\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
MIXED = (
    "It's 12345 naïve cafés,\t\n\n  “quoted” — 東京 ½ \U0001f600\U0001f468‍\U0001f469 don't <b> "
    "x=1;\r\n"
)
# Chat markup of SmolLM2, written down from transformers 5.23 on the saved tokenizer.
CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
    "Face<|im_end|>\n"
    '<|im_start|>user\nhi <b> "é"<|im_end|>\n'
)


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return from_gguf(read_gguf(find_smollm2()).metadata)


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_bpe([ENGLISH[:200_000]], vocab_size=600)


TINY = train_bpe([MIXED] * 3, vocab_size=300)


def gguf_metadata(
    tokenizer: Tokenizer, extra: dict[str, int] | None = None, **entries: Any
) -> dict[str, Any]:
    """What a GGUF file would hold for this tokenizer; `extra` are further tokens with their
    token_type.
    """
    model = json.loads(tokenizer.backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    metadata = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens + list(extra or {}),
        "token_type": [3] + [1] * (len(tokens) - 1) + list((extra or {}).values()),
        "merges": [" ".join(pair) for pair in model["merges"]],
        "eos_token_id": 0,
    } | entries
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items() if value is not None}


# ------------------------------------------------------------------------------------------ SmolLM2


def test_smollm2_facts(smollm2: Tokenizer) -> None:
    assert smollm2.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert smollm2.decode([7042]) == " Paris"
    assert (smollm2.vocab_size, smollm2.eos_ids, smollm2.bos_id, smollm2.pad_id) == (
        49152,
        (2, 0),
        1,
        2,
    )  # 0 by its name
    assert smollm2.encode("", special=True) == []
    assert smollm2.encode("a", special=True) == smollm2.encode(
        "a"
    )  # this file asks for no begin-of-text


def test_smollm2_equals_the_pipeline_of_its_authors(smollm2: Tokenizer) -> None:
    """Digits, then the library's own byte-level split; and the token count of facts where the data
    is at hand.
    """
    path = Path(os.environ.get("JAXMODEL_DATA", "")) / "wikitext2-test.txt"
    text = path.read_text(encoding="utf-8") if path.is_file() else ENGLISH
    reference = tokenizers.Tokenizer.from_str(smollm2.backend.to_str())
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    ids = smollm2.encode(text)
    assert ids == reference.encode(text).ids
    assert smollm2.encode(MIXED) == reference.encode(MIXED).ids
    assert smollm2.decode(ids) == text
    assert len(ids) == 312_144 or not path.is_file()


def test_control_tokens_in_a_text_are_one_id(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("<|im_start|>user\n2<|im_end|><|endoftext|>")
    assert [i for i in ids if i < 17] == [1, 2, 0] and ids[0] == 1 and ids[-2:] == [2, 0]
    assert smollm2.decode(ids) == "user\n2"
    assert smollm2.decode(ids, skip_special=False) == "<|im_start|>user\n2<|im_end|><|endoftext|>"


def test_encode_batch(smollm2: Tokenizer) -> None:
    texts = ["The capital", "", MIXED]
    assert smollm2.encode_batch(texts) == [smollm2.encode(text) for text in texts]
    with pytest.raises(InputError, match="single string"):
        smollm2.encode_batch("The capital")


# Bytes that SmolLM2's vocabulary lacks: six control characters, and what leads characters beyond
# U+3FFFF.
_known = st.characters(
    codec="utf-8", max_codepoint=0x3FFFF, exclude_characters="\x04\x06\x13\x14\x16\x1d"
)


@given(st.text(_known))
def test_smollm2_round_trip(smollm2: Tokenizer, text: str) -> None:
    assert smollm2.decode(smollm2.encode(text), skip_special=False) == text


@pytest.mark.parametrize("ids", [[-1], [5, -3]])
def test_negative_ids(smollm2: Tokenizer, ids: list[int]) -> None:
    with pytest.raises(InputError, match=f"ids: {min(ids)} .* 0 to 49151"):
        smollm2.decode(ids)


def test_surrogates_are_no_text(smollm2: Tokenizer) -> None:
    with pytest.raises(InputError, match="surrogates"):
        smollm2.encode("a\udcff")


# --------------------------------------------------------------------------------------------- GGUF


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        (
            "gpt-2",
            [
                "I",
                "'ll",
                " pay",
                " 12345",
                " dollars",
                "!!!",
                " ",
                " It",
                "'",
                "S",
                "\n",
                "\n",
                "x",
            ],
        ),
        (
            "smollm",
            [
                "I",
                "'ll",
                " pay",
                " ",
                *"12345",
                " dollars",
                "!!!",
                " ",
                " It",
                "'",
                "S",
                "\n",
                "\n",
                "x",
            ],
        ),
        (
            "llama-bpe",
            [
                "I",
                "'ll",
                " pay",
                " ",
                "123",
                "45",
                " dollars",
                "!!!",
                " ",
                " It",
                "'S",
                "\n\n",
                "x",
            ],
        ),
        (
            "qwen2",
            ["I", "'ll", " pay", " ", *"12345", " dollars", "!!!", " ", " It", "'S", "\n\n", "x"],
        ),
        (
            "default",
            [
                "I",
                "'",
                "ll",
                " pay",
                " ",
                "123",
                "45",
                " dollars",
                "!!!",
                " ",
                " It",
                "'",
                "S",
                "\n",
                "\n",
                "x",
            ],
        ),
    ],
)
def test_where_a_text_is_cut(pre: str, pieces: list[str]) -> None:
    backend = from_gguf(gguf_metadata(TINY, pre=pre)).backend
    cut = backend.pre_tokenizer.pre_tokenize_str("".join(pieces))
    assert [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in cut] == pieces


def test_from_gguf_equals_the_tokenizer_it_describes(trained: Tokenizer) -> None:
    read = from_gguf(gguf_metadata(trained))
    for text in (ENGLISH[200_000:250_000], MIXED, "a<|endoftext|>b"):
        assert read.encode(text) == trained.encode(text)
    assert (read.vocab_size, read.eos_ids, read.bos_id, read.pad_id) == (600, (0,), None, None)
    assert read.chat_template is None


def test_from_gguf_reads_special_and_user_defined_tokens() -> None:
    n = TINY.vocab_size
    metadata = gguf_metadata(
        TINY,
        {"<bos>": 3, "<eot>": 3, "   ": 4, "[PAD1]": 5},
        padding_token_id=n,
        eot_token_id=n + 1,
    )
    read = from_gguf(metadata)
    assert (read.eos_ids, read.pad_id) == ((0, n + 1), n)
    assert read.encode("<bos>   <eot>") == [n, n + 2, n + 1]
    assert read.decode([n, n + 2, n + 1]) == "   "
    assert n + 3 not in read.encode("[PAD1]")  # unused: not found in a text


@pytest.mark.parametrize(
    ("entries", "before", "after"),
    [
        ({"pre": "gpt-2"}, [], []),
        ({"pre": "gpt-2", "add_bos_token": True}, [0], []),
        ({"pre": "gpt-2", "add_eos_token": True}, [], [1]),
        ({"pre": "gpt-2", "add_bos_token": True, "add_eos_token": True}, [0], [1]),
        ({"pre": "llama-bpe"}, [0], []),  # its files leave the entry out and mean it
        ({"pre": "llama-bpe", "add_bos_token": False}, [], []),
    ],
)
def test_what_is_put_around_a_text(
    entries: dict[str, Any], before: list[int], after: list[int]
) -> None:
    read = from_gguf(gguf_metadata(TINY, bos_token_id=0, **entries | {"eos_token_id": 1}))
    plain = read.encode("cafés")
    assert read.encode("cafés", special=True) == [*before, *plain, *after]


def test_llama_bpe_takes_whole_words_before_merging() -> None:
    whole = {"Ġzyx": 1}  # in the vocabulary, but no merge leads to it
    n = TINY.vocab_size
    assert from_gguf(gguf_metadata(TINY, whole, pre="llama-bpe")).encode(" zyx") == [n]
    assert n not in from_gguf(gguf_metadata(TINY, whole, pre="qwen2")).encode(" zyx")


def test_qwen2_composes_characters() -> None:
    read = from_gguf(gguf_metadata(TINY, pre="qwen2"))
    assert read.decode(read.encode("cafe\u0301")) == "café"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model: 'bert' .*allowed: gpt2, llama"),
        ({"model": "llama"}, "no tokenizer.ggml.scores"),
        ({"model": None}, "no tokenizer.ggml.model"),
        (
            {"pre": "gpt-3"},
            r"tokenizer.ggml.pre: 'gpt-3' .*allowed: default, gpt-2, llama-bpe, qwen2, "
            r"smollm.*nearest: gpt-2",
        ),
        ({"tokens": None}, "no tokenizer.ggml.tokens"),
        ({"merges": None}, "no tokenizer.ggml.merges"),
        ({"merges": ["a b c"]}, "are inconsistent"),
        ({"merges": ["zzz yyy"]}, "are inconsistent: .*zzz"),
        ({"tokens": ["a", "b", "a"], "merges": []}, "1 repeated"),
        ({"eos_token_id": 300}, "eos_token_id: 300 is not a token; allowed: 0 to 299"),
    ],
)
def test_wrong_metadata(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        from_gguf(gguf_metadata(TINY, **entries))
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------ folders


def test_saved_folder_reads_back(smollm2: Tokenizer, tmp_path: Path) -> None:
    smollm2.save(tmp_path / "new" / "folder")
    read = from_folder(tmp_path / "new" / "folder")
    names = {
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    }  # the last for its two ends
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == names
    for text in (MIXED, "<|im_start|>user\n", ENGLISH[:20_000]):
        assert read.encode(text) == smollm2.encode(text)
        assert read.decode(read.encode(text)) == smollm2.decode(smollm2.encode(text))
    for name in ("vocab_size", "eos_ids", "bos_id", "pad_id", "chat_template"):
        assert getattr(read, name) == getattr(smollm2, name), name


def test_saved_config_says_what_transformers_looks_for(smollm2: Tokenizer, tmp_path: Path) -> None:
    smollm2.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "chat_template": smollm2.chat_template,
    }


def test_several_eos_ids_survive(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
    Tokenizer(TINY.backend, eos_ids=(0, 7, 5)).save(tmp_path)
    read = from_folder(tmp_path)
    assert (read.eos_ids, read.bos_id, read.pad_id, read.chat_template) == (
        (0, 7, 5),
        None,
        None,
        None,
    )
    assert json.loads((tmp_path / "generation_config.json").read_text())["temperature"] == 0.6


def test_foreign_folder(tmp_path: Path) -> None:
    """WordPiece with the padding and truncation of its training run, and companions in older
    manners.
    """
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "hello", "world"]
    backend = tokenizers.Tokenizer(
        models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    )
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    backend.add_special_tokens(words[:4])
    backend.enable_padding(length=128)
    backend.enable_truncation(max_length=3)
    backend.save(str(tmp_path / "tokenizer.json"))
    special = {
        "eos_token": {"content": "[SEP]", "lstrip": False},
        "pad_token": "[PAD]",
        "bos_token": "<absent>",
    }
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    templates = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    config = {"pad_token": None, "bos_token": "[CLS]", "chat_template": templates}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 3}')
    read = from_folder(tmp_path)
    assert (read.eos_ids, read.bos_id, read.pad_id, read.chat_template) == (
        (3,),
        2,
        0,
        {"tool_use": "no", "default": "yes"},
    )
    assert read.encode("Hello world hello World") == [4, 5, 4, 5]
    assert read.encode("Hello world", special=True) == [2, 4, 5, 3]
    (tmp_path / "config.json").write_text(
        '{"text_config": {"eos_token_id": [5, 49407], "vocab_size": 8}}'
    )
    assert from_folder(tmp_path).eos_ids == (3, 5), (
        "an id that neither the tokenizer nor the model has ends nothing"
    )
    (tmp_path / "chat_template.jinja").write_text("newest")
    assert from_folder(tmp_path).chat_template == "newest"
    push = stream_decoder(read)
    assert [push(i) for i in (4, 5, 3, 4)] == ["hello", " world", "", " hello"]


def test_wrong_folder(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=f"{tmp_path}.*no tokenizer; allowed: .*tokenizer.json, tokenizer.model"
    ):
        from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(InputError, match=r"tokenizer.json' is not a tokenizer"):
        from_folder(tmp_path)
    TINY.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": ')
    with pytest.raises(InputError, match=r"tokenizer_config.json: not JSON"):
        from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(
        InputError, match=r"tokenizer_config.json: its content is .*; allowed: an object"
    ):
        from_folder(tmp_path)


# ----------------------------------------------------------------------------------------- training


def test_training_is_deterministic(trained: Tokenizer) -> None:
    again = train_bpe(iter([ENGLISH[:200_000]]), vocab_size=600)
    assert again.backend.to_str() == trained.backend.to_str()
    assert trained.vocab_size == 600
    assert (trained.eos_ids, trained.bos_id, trained.pad_id) == ((0,), 0, 0)


def test_training_equals_the_library(trained: Tokenizer) -> None:
    reference = tokenizers.Tokenizer(models.BPE())
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet
    )
    reference.train_from_iterator([ENGLISH[:200_000]], trainer)
    assert reference.get_vocab() == trained.backend.get_vocab()
    assert reference.encode(MIXED).ids == trained.encode(MIXED)


def test_training_shortens_texts(trained: Tokenizer) -> None:
    held_out = ENGLISH[300_000:320_000]
    assert len(trained.encode(held_out)) < 0.6 * len(held_out.encode())
    assert trained.encode("<|endoftext|>") == [0]


def test_wrong_training() -> None:
    with pytest.raises(InputError, match="vocab_size: 256 is too small; allowed: 257 or more"):
        train_bpe(["abc"], vocab_size=256)
    with pytest.raises(InputError, match="single string"):
        train_bpe("abc", vocab_size=300)
    assert train_bpe([], vocab_size=500).vocab_size == 257


@given(st.text(st.characters(codec="utf-8")))
def test_trained_round_trip(text: str) -> None:
    assert TINY.decode(TINY.encode(text), skip_special=False) == text


# -------------------------------------------------------------------------------------------- chats


def test_chat_of_smollm2(smollm2: Tokenizer) -> None:
    messages = [{"role": "user", "content": 'hi <b> "é"'}]
    assert smollm2.apply_chat(messages, add_generation_prompt=False) == CHAT
    assert smollm2.apply_chat(messages) == CHAT + "<|im_start|>assistant\n"
    messages.insert(0, {"role": "system", "content": "Be brief."})
    assert smollm2.apply_chat(messages).startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi"
    )


def test_chat_template_language() -> None:
    template = """{{ bos_token }}{% for m in messages %}
        {% if m.role == 'tool' %}{% continue %}{% endif %}
        {{ m | tojson }}{% endfor %}{{ eos_token }}|{{ pad_token }}"""
    tokenizer = Tokenizer(TINY.backend, eos_ids=(0,), chat_template=template)
    messages = [{"role": "tool"}, {"role": "user", "content": "<é>"}]
    assert tokenizer.apply_chat(messages).split() == [
        '{"role":',
        '"user",',
        '"content":',
        '"<é>"}<|endoftext|>|',
    ]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "chat_template: this tokenizer has none"),
        ("{% for m in", "chat_template: it failed"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0]['content'] + 1 }}", "chat_template: it failed"),
        ("{{ messages[0].nothing.deeper }}", "chat_template: it failed"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_wrong_template(template: str | None, message: str) -> None:
    tokenizer = Tokenizer(TINY.backend, chat_template=template)
    with pytest.raises(InputError, match=message):
        tokenizer.apply_chat([{"role": "user", "content": "hi"}])


def test_wrong_messages(smollm2: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"messages: .*'content': 'hi'.* is not a list of"):
        smollm2.apply_chat([{"content": "hi"}])


# ---------------------------------------------------------------------------------------- streaming


def pieces(tokenizer: Tokenizer, ids: list[int], skip_special: bool = True) -> list[str]:
    push = stream_decoder(tokenizer, skip_special)
    return [push(i) for i in [*ids, None]]


@given(st.text(st.characters(codec="utf-8", exclude_characters="\ufffd")))
def test_stream_of_a_text_is_the_text(text: str) -> None:
    streamed = pieces(TINY, TINY.encode(text), skip_special=False)
    assert "".join(streamed[:-1]) == text and streamed[-1] == ""  # complete without the final None


@given(st.lists(st.integers(0, TINY.vocab_size + 3)), st.booleans())
def test_stream_of_any_ids_is_their_decoding(ids: list[int], skip_special: bool) -> None:
    assert "".join(pieces(TINY, ids, skip_special)) == TINY.decode(ids, skip_special)


@settings(max_examples=50)
@given(st.lists(st.integers(0, 49151)))
def test_stream_of_smollm2(smollm2: Tokenizer, ids: list[int]) -> None:
    assert "".join(pieces(smollm2, ids)) == smollm2.decode(ids)


def test_stream_never_shows_half_a_character() -> None:
    tokenizer = train_bpe([], vocab_size=257)  # each byte a token
    assert pieces(tokenizer, tokenizer.encode("é€\U0001f600!")) == [
        "",
        "é",
        "",
        "",
        "€",
        "",
        "",
        "",
        "\U0001f600",
        "!",
        "",
    ]
    half = tokenizer.encode("€")[:2]
    assert pieces(tokenizer, half) == ["", "", "\ufffd"]
    assert pieces(tokenizer, [*half, *tokenizer.encode("a")]) == ["", "", "\ufffda", ""]
    assert pieces(tokenizer, tokenizer.encode("\ufffd")) == ["", "", "", "\ufffd"]
