"""Tokenizers from a vocabulary alone, against the SentencePiece library
(goldens/make_sentencepiece.py) and BERT's rules.
"""

from __future__ import annotations

import json
import shutil
import string
from pathlib import Path
from typing import Any

import pytest

from jaxmodel.errors import InputError
from jaxmodel.hub.gguf_tokenizer import from_gguf
from jaxmodel.hub.tokenizer import from_folder, stream_decoder, train_bpe
from jaxmodel.hub.vocabularies import Pieces, of_pieces, read_pieces

GOLDENS = Path(__file__).parent / "goldens" / "sentencepiece"
SAID = json.loads((GOLDENS / "pieces.json").read_text(encoding="utf-8"))
NAMES = ("llama", "gemma", "t5")


def write(folder: Path, file: str, **config: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    shutil.copy(GOLDENS / file, folder / "tokenizer.model")


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_cut_as_by_sentencepiece(name: str) -> None:
    backend = of_pieces(read_pieces(GOLDENS / f"{name}.model"))
    assert backend.get_vocab_size() == SAID[name]["size"]
    for text, ids, decoded in zip(
        SAID["texts"], SAID[name]["ids"], SAID[name]["decoded"], strict=True
    ):
        assert backend.encode(text).ids == ids
        assert backend.decode(ids) == decoded.replace(
            " ⁇ ", ""
        )  # an unknown token is a special one, left out


def gguf(pieces: Pieces, **more: Any) -> dict[str, Any]:
    lists = {"tokens": pieces.tokens, "scores": pieces.scores, "token_type": pieces.kinds}
    return {
        f"tokenizer.ggml.{key}": value for key, value in ({"model": "llama"} | lists | more).items()
    }


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_a_gguf_file_has_the_same(name: str) -> None:
    pieces = read_pieces(GOLDENS / f"{name}.model")
    tokenizer = from_gguf(
        gguf(
            pieces,
            add_space_prefix=pieces.prefix,
            bos_token_id=1,
            eos_token_id=2,
            unknown_token_id=0,
        )
    )
    for text, ids in zip(SAID["texts"], SAID[name]["ids"], strict=True):
        assert tokenizer.encode(text) == ids and tokenizer.encode(text, special=True) == [1, *ids]
    assert (tokenizer.eos_ids, tokenizer.begins) == ((2,), (1,))


def test_ends_of_a_turn_by_their_names() -> None:
    """What llama.cpp takes for an end of generation, whatever the file says of it; it is a special
    token then.
    """
    pieces = read_pieces(GOLDENS / "llama.model")
    for name in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>"):
        more = pieces._replace(
            tokens=[*pieces.tokens, name, "plain"],
            scores=[*pieces.scores, 0.0, 0.0],
            kinds=[*pieces.kinds, 1, 1],
        )
        tokenizer = from_gguf(gguf(more, eos_token_id=2))
        new = len(pieces.tokens)
        assert tokenizer.eos_ids == (2, new) and new in tokenizer.special_ids
        assert tokenizer.encode(f"{name}")[-1] == new and tokenizer.decode([new]) == ""
    harmony = [*pieces.tokens, "<|end|>", "<|return|>", "<|call|>"]
    more = pieces._replace(
        tokens=harmony, scores=[*pieces.scores, 0.0, 0.0, 0.0], kinds=[*pieces.kinds, 3, 3, 3]
    )
    assert from_gguf(gguf(more)).eos_ids == (
        2,
        len(harmony) - 2,
        len(harmony) - 1,
    )  # <|end|> ends a part only


@pytest.mark.parametrize("lists", [{"scores": [0.0]}, {"token_type": [1, 1]}])
def test_lists_of_unequal_length(lists: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="tokens, .* scores, .* types; allowed: the same number"):
        from_gguf(gguf(read_pieces(GOLDENS / "llama.model"), **lists))


# ------------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize(
    ("file", "config", "before", "after"),
    [
        ("llama.model", {}, [1], []),
        ("llama.model", {"add_bos_token": False}, [], []),
        ("llama.model", {"add_eos_token": True, "tokenizer_class": "LlamaTokenizerFast"}, [1], [2]),
        ("gemma.model", {"tokenizer_class": "GemmaTokenizer"}, [1], []),
        ("t5.model", {"tokenizer_class": "T5Tokenizer"}, [], [1]),
    ],
)
def test_a_model_of_pieces_alone(
    file: str, config: dict[str, Any], before: list[int], after: list[int], tmp_path: Path
) -> None:
    write(tmp_path, file, **config)
    tokenizer = from_folder(tmp_path)
    said = SAID[file.removesuffix(".model")]
    assert tokenizer.encode(SAID["texts"][0], special=True) == [*before, *said["ids"][0], *after]
    assert tokenizer.eos_ids == ((1,) if file == "t5.model" else (2,))
    tokenizer.save(tmp_path / "saved")
    again = from_folder(tmp_path / "saved")
    for text in SAID["texts"]:
        assert again.encode(text, special=True) == tokenizer.encode(text, special=True)


def test_t5_has_its_further_tokens_behind_the_pieces(tmp_path: Path) -> None:
    write(tmp_path, "t5.model", tokenizer_class="T5Tokenizer")
    tokenizer = from_folder(tmp_path)
    size = SAID["t5"]["size"]
    assert tokenizer.encode("<extra_id_99>") == [size] and tokenizer.encode("<extra_id_0>") == [
        size + 99
    ]
    assert (tokenizer.pad_id, tokenizer.bos_id) == (0, None)


def plain(text: str, lower: bool) -> str:
    """What SigLIP's texts are before they are cut, by Python's own functions."""
    text = (
        (text.lower() if lower else text)
        .replace("▁", " ")
        .translate(str.maketrans("", "", string.punctuation))
    )
    return " ".join(text.split())


# as SiglipTokenizer of transformers 5.24 cuts them with the same pieces
SIGLIP = {
    "A photo of a cat.": [23, 3, 17, 22, 13, 6, 13, 38, 23, 3, 12, 59, 1],
    "it's 'quoted' (so)": [81, 4, 3, 299, 18, 13, 6, 25, 3, 4, 13, 1],
    "tab\tnew\nline\x1fsep": [3, 6, 10, 32, 3, 29, 5, 33, 181, 3, 4, 5, 17, 1],
    "“curly” — dash": [3, 294, 12, 18, 15, 78, 217, 3, 2, 3, 14, 10, 4, 22, 1],
    "...": [1],
}


@pytest.mark.parametrize("lower", [True, False, None])
def test_siglip_drops_capitals_and_punctuation(lower: bool | None, tmp_path: Path) -> None:
    shutil.copy(GOLDENS / "t5.model", tmp_path / "spiece.model")
    said = {"tokenizer_class": "SiglipTokenizer"} | (
        {} if lower is None else {"do_lower_case": lower}
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    tokenizer = from_folder(tmp_path)
    pieces = of_pieces(read_pieces(GOLDENS / "t5.model"))
    for text in (
        *SAID["texts"],
        *SIGLIP,
        string.punctuation,
        "under_score-dash",
        "! spaced , marks !",
        "\xa0Ünïcode\u2003ÄÖ ",
    ):
        assert tokenizer.encode(text, special=True) == [
            *pieces.encode(plain(text, lower is not False)).ids,
            1,
        ], text
    assert (tokenizer.pad_id, tokenizer.eos_ids, tokenizer.bos_id) == (1, (1,), None)
    if lower is not False:
        assert {text: tokenizer.encode(text, special=True) for text in SIGLIP} == SIGLIP
    tokenizer.save(tmp_path / "saved")
    assert from_folder(tmp_path / "saved").encode("A Cat!", special=True) == tokenizer.encode(
        "A Cat!", special=True
    )
    assert from_folder(tmp_path / "saved").pad_id == 1


def test_a_begin_that_the_pieces_do_not_have(tmp_path: Path) -> None:
    write(tmp_path, "llama.model", tokenizer_class="LlamaTokenizer", bos_token="<begin>")
    with pytest.raises(InputError, match="'<begin>' stands before or after each text, but is not"):
        from_folder(tmp_path)


def test_a_kind_that_needs_more_than_its_pieces(tmp_path: Path) -> None:
    write(tmp_path, "llama.model", tokenizer_class="XLMRobertaTokenizer")
    with pytest.raises(
        InputError, match=r"tokenizer.model' alone is not enough for the tokenizer of: 'xlmroberta'"
    ):
        from_folder(tmp_path)


CUT = (GOLDENS / "llama.model").read_bytes()[:400]


@pytest.mark.parametrize("data", [b"", b"x", b"\x0a\xff\xff\xff\xff\x0f", b"\x0b\x00", CUT])
def test_no_such_model(data: bytes, tmp_path: Path) -> None:
    write(tmp_path, "llama.model")
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(InputError, match=r"tokenizer.model: not a SentencePiece model"):
        from_folder(tmp_path)


def test_the_words_of_bert_alone(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cafe", "##s", "café"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    tokenizer = from_folder(tmp_path)
    assert tokenizer.encode("The Cafés, [MASK]", special=True) == [2, 5, 6, 7, 1, 4, 3]
    assert tokenizer.named_tokens["mask_token"] == "[MASK]" and tokenizer.pad_id == 0
    (tmp_path / "tokenizer_config.json").write_text(
        '{"do_lower_case": false, "strip_accents": false}'
    )
    assert from_folder(tmp_path).encode("The café") == [1, 8]


def test_the_bytes_of_gpt2_alone(tmp_path: Path) -> None:
    trained = train_bpe(["low lower lowest"], vocab_size=264)
    trained.backend.model.save(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    tokenizer = from_folder(tmp_path)
    text = "lowest low<|endoftext|>"
    assert tokenizer.encode(text) == trained.encode(text) and tokenizer.eos_ids == (0,)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(
        InputError, match="merges.txt without tokenizer.json is not enough for: 'qwen2'"
    ):
        from_folder(tmp_path)


# ------------------------------------------------------------------------------------- added tokens


def test_tokens_that_only_the_companions_know(tmp_path: Path) -> None:
    """`added_tokens_decoder` and added_tokens.json, as transformers adds them: one id each, special
    by flag or by role.
    """
    trained = train_bpe([], vocab_size=257)
    entries = {
        "258": {"content": "<|b|>", "special": False},
        "257": {"content": "<|a|>", "special": True},
    }
    for file, value in {"decoder": entries, "json": {"<|a|>": 257, "<|b|>": 258}}.items():
        folder = tmp_path / file
        folder.mkdir()
        trained.backend.save(str(folder / "tokenizer.json"))
        config = {"eos_token": "<|a|>"} | (
            {"added_tokens_decoder": value} if file == "decoder" else {}
        )
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        if file == "json":
            (folder / "added_tokens.json").write_text(json.dumps(value))
        tokenizer = from_folder(folder)
        assert tokenizer.encode("<|b|><|a|>") == [258, 257] and tokenizer.eos_ids == (257,)
        assert tokenizer.decode([258, 257]) == "<|b|>" and 257 in tokenizer.special_ids
        tokenizer.save(tmp_path / "saved")
        assert from_folder(tmp_path / "saved").encode("<|b|><|a|>") == [258, 257]


def test_an_added_token_that_leaves_a_gap(tmp_path: Path) -> None:
    train_bpe([], vocab_size=257).save(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<|a|>": 300}')
    with pytest.raises(
        InputError,
        match=r"added token '<\|a\|>' has id 300, but the next id of tokenizer.json is 257",
    ):
        from_folder(tmp_path)


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ({"eos_token_id": 7}, None, (7,)),
        ({"eos_token_id": [7, 0]}, None, (7, 0)),
        ({"eos_token_id": 7}, {"eos_token_id": [9, 7]}, (9, 7)),
        ({"text_config": {"eos_token_id": [5]}}, {}, (5,)),
        ({"eos_token_id": None}, {"eos_token_id": None}, ()),
    ],
)
def test_ends_that_the_tokenizer_does_not_name(
    config: Any, generation: Any, ends: tuple[int, ...], tmp_path: Path
) -> None:
    train_bpe([], vocab_size=257).backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert from_folder(tmp_path).eos_ids == ends


@pytest.mark.parametrize("value", ["2", 2.0, True, -1, [None, "x"], {"a": 1}])
def test_ends_that_are_no_ids(value: Any, tmp_path: Path) -> None:
    train_bpe([], vocab_size=257).backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(
        InputError, match=r"config.json: eos_token_id is .*allowed: .*a whole number.* or a list"
    ):
        from_folder(tmp_path)


def test_the_pieces_of_a_stream_are_those_of_the_whole(tmp_path: Path) -> None:
    write(tmp_path, "llama.model")
    tokenizer = from_folder(tmp_path)
    for text in SAID["texts"]:
        ids = tokenizer.encode(text)
        push = stream_decoder(tokenizer)
        assert "".join([*map(push, ids), push(None)]) == tokenizer.decode(ids)
