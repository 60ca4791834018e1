"""Tokenizers that somebody prepared: what multiplies a text, never ends, or crashes the library is
refused in one line.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, decoders, pre_tokenizers

from jaxmodel import limits
from jaxmodel.errors import InputError
from jaxmodel.hub import tokenizer

BPE = {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2}, "merges": [], "unk_token": None}
PARTS = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")


def read(folder: Path, **parts: Any) -> tokenizer.Tokenizer:
    said = {"version": "1.0", "added_tokens": [], **dict.fromkeys(PARTS), "model": BPE, **parts}
    (folder / "tokenizer.json").write_text(json.dumps(said))
    return tokenizer.from_folder(folder)


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


TENFOLD = [replace({"String": "a"}, "a" * 10)] * 3
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 500,
    "pair": [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"],
    "special_tokens": {},
}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


@pytest.mark.parametrize(
    ("parts", "factor"),
    [
        ({"normalizer": {"type": "Sequence", "normalizers": TENFOLD}}, "1e.03"),
        ({"normalizer": replace({"String": ""}, "x" * 200)}, "201"),
        ({"normalizer": replace({"Regex": "b|$"}, "x" * 200)}, "201"),
        ({"normalizer": {"type": "Prepend", "prepend": "x" * 200}}, "201"),
        (
            {
                "normalizer": TENFOLD[0],
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES] * 4},
            },
            "160",
        ),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES] * 7}}, "128"),
        ({"decoder": {"type": "Sequence", "decoders": TENFOLD}}, "1e.03"),
        ({"post_processor": TEMPLATE}, "500"),
    ],
)
def test_what_multiplies_a_text(
    parts: dict[str, Any], factor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        InputError,
        match=f"can make a text {factor} times as long; allowed: 100 times .*tokenizer_growth",
    ):
        read(tmp_path, **parts)
    monkeypatch.setattr(limits, "_now", limits.Limits(tokenizer_growth=1e4))
    assert read(tmp_path, **parts).encode("ba")


@pytest.mark.parametrize(
    "parts",
    [
        {"pre_tokenizer": split("(a+)+$")},  # a panic in the first text that it meets
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {
            "model": {
                **BPE,
                "continuing_subword_prefix": "é#",
                "vocab": {"a": 0, "b": 1, "ab": 2},
                "merges": ["a b"],
            }
        },
        {
            "model": {
                **BPE,
                "continuing_subword_prefix": "x",
                "vocab": {"a": 0, "é": 1, "aé": 2},
                "merges": ["a é"],
            }
        },  # an abort
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {"pre_tokenizer": split("[")},
        {"normalizer": eval('{"type":"Sequence","normalizers":[' * 70 + "]}" * 70)},
    ],
)
def test_what_crashes_the_library(
    parts: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="tokenizer.json' is not a tokenizer: ") as error:
        read(tmp_path, **parts)
    assert (
        "\n" not in str(error.value) and not capfd.readouterr().err
    )  # nor does a panic say so at length
    assert read(tmp_path).encode("abc") == [0, 1, 2]  # and the next is read as before


def test_texts_that_take_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = read(tmp_path, pre_tokenizer=split("(a|b|aa){1,14}[de]c"))
    text = "a" * 3000 + "c"
    assert made.encode(text) == [0] * 3000 + [2]  # seconds
    monkeypatch.setattr(limits, "_now", limits.Limits(tokenizer_seconds=0.01))
    with pytest.raises(
        InputError, match=r"text: the tokenizer cannot read it: it takes more than 0.01 seconds"
    ):
        made.encode(text)


def test_panics_while_it_is_used(tmp_path: Path) -> None:
    made = read(tmp_path)
    pattern = Regex("(a|b|aa){1,30}[de]c")
    made.backend.pre_tokenizer = pre_tokenizers.Split(
        pattern, "isolated"
    )  # afterwards: none like it is loaded
    made.backend.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace(pattern, "")])
    with pytest.raises(InputError, match="text: the tokenizer cannot read it: Onig"):
        made.encode("a" * 300 + "c")
    with pytest.raises(InputError, match="ids: the tokenizer cannot write them: Onig"):
        made.decode([0] * 300 + [2])


def test_texts_of_long_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = read(tmp_path, model={**BPE, "vocab": {"a" * 1000: 0, "b": 1}})
    assert len(made.decode([0] * 10)) == 10_009  # with spaces between
    monkeypatch.setattr(limits, "_now", limits.Limits(tokenizer_characters=9999))
    with pytest.raises(InputError, match="ids: their text has more than 9,999 characters"):
        made.decode([0] * 10)


def test_a_trial_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that tries a file has a limit of time and of memory, and another takes
    its place.
    """
    monkeypatch.setattr(limits, "_now", limits.Limits(file_seconds=0.5))
    with pytest.raises(
        InputError, match="reading it crashes, or takes more than 0.5 seconds and 2 GiB"
    ):
        read(
            tmp_path,
            normalizer={
                "type": "Sequence",
                "normalizers": [replace({"String": ""}, "aaaaaaaaaa")] * 5,
            },
        )
    monkeypatch.undo()
    assert read(tmp_path).encode("abc") == [0, 1, 2]


def test_the_process_that_tries_follows_into_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "tokenizer").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / name)
        assert read(Path("tokenizer")).encode("abc") == [0, 1, 2]


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "vocab.txt", "merges.txt", "tokenizer.model", "added_tokens.json"]
)
def test_what_is_no_regular_file(name: str, tmp_path: Path) -> None:
    """A pipe in the place of a tokenizer's file is not waited for."""
    if name == "added_tokens.json":
        read(tmp_path)
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match="has no tokenizer|not a regular file"):
        tokenizer.from_folder(tmp_path)


def test_a_pipe_beside_a_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    os.mkfifo(tmp_path / "vocab.json")
    with pytest.raises(InputError, match="vocab.json.*not a regular file"):
        tokenizer.from_folder(tmp_path)
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    assert tokenizer.from_folder(tmp_path).encode("ab") == [2]
    (tmp_path / "merges.txt").write_text("a b c\n")
    with pytest.raises(InputError, match="merges.txt: the line 'a b c' is not a pair of tokens"):
        tokenizer.from_folder(tmp_path)
