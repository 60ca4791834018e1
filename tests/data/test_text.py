"""Texts by name and by path, where they come from, and what a person reads when there is none."""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import given, strategies as st

from jaxmodel.data import load_text, split_documents, text as text_module
from jaxmodel.data.text import NAMES
from jaxmodel.errors import InputError

ARTICLE = " \n = Robert <unk> = \n \n He is an actor . \n \n = = Career = = \n \n In 2006 . \n"


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAXMODEL_DATA", raising=False)


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("JAXMODEL_DATA", str(folder))
    return folder


def error(source: str | Path) -> str:
    with pytest.raises(InputError) as caught:
        load_text(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_file_is_read_exactly(tmp_path: Path, no_data: None) -> None:
    raw = "Zoë\r\nlast line without end".encode()
    path = tmp_path / "notes.txt"
    path.write_bytes(raw)
    text = load_text(path)
    assert text.text.encode() == raw
    assert (text.name, text.origin) == (str(path), str(path))
    assert text.sha256 == hashlib.sha256(raw).hexdigest()


def test_data_folder_comes_first(data: Path) -> None:
    (data / "wikitext2-test.txt").write_text(ARTICLE)
    text = load_text("wikitext2-test")
    assert (text.text, text.name, text.origin) == (
        ARTICLE,
        "wikitext2-test",
        "$JAXMODEL_DATA/wikitext2-test.txt",
    )
    assert load_text(data / "wikitext2-test.txt").origin == "$JAXMODEL_DATA/wikitext2-test.txt"
    (data / "tinyshakespeare.txt").write_text("Speak, speak.")
    assert load_text("tinyshakespeare").text == "Speak, speak."


def test_english_is_the_same_text_whatever_the_data_folder_holds(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("english", "english_train", "pydoc")
    for name in (*names, "wikitext2-test", "wikitext2-valid"):
        (data / f"{name}.txt").write_text(f"another {name}")
    here = [load_text(name) for name in names]
    monkeypatch.delenv("JAXMODEL_DATA")
    assert (
        here == [load_text(name) for name in names]
        and here[0].origin == "package pydoc_data.topics"
    )


def test_pydoc_is_every_topic_in_order(no_data: None) -> None:
    from pydoc_data.topics import topics

    text = load_text("pydoc")
    assert text.origin == "package pydoc_data.topics"
    assert text.text == load_text("pydoc").text
    places = [text.text.index(topics[name].strip()) for name in sorted(topics)]
    assert all(topics[name].strip() in text.text for name in topics)
    assert sum(len(topics[name].strip()) + 3 for name in topics) - 2 == len(text.text)
    assert min(places) == 0


def test_english_and_english_train_share_nothing(no_data: None) -> None:
    held_out = load_text("english")
    train = load_text("english_train")
    assert held_out.origin == train.origin == "package pydoc_data.topics"
    assert len(held_out.text) > 60_000 and len(train.text) > 150_000
    assert 0.25 < len(held_out.text) / (len(held_out.text) + len(train.text)) < 0.5

    def runs(text: str, words: int = 20) -> set[tuple[str, ...]]:
        split = text.split()
        return {tuple(split[i : i + words]) for i in range(len(split) - words)}

    assert not runs(held_out.text) & runs(train.text)
    assert {d.split("\n")[0] for d in split_documents(held_out.text)}.isdisjoint(
        d.split("\n")[0] for d in split_documents(train.text)
    )
    assert len(split_documents(held_out.text)) > 5 and len(split_documents(train.text)) > 20


def test_small_topics_inside_large_ones_are_left_out() -> None:
    topics = {
        "a": "Alpha one.\n\nAlpha two, which goes on for a good deal longer than the first one.",
        "b": "Alpha  one.",
        "c": "Gamma.\n\nAlpha one.\n\nGamma more and more.",
    }
    train, held_out = text_module._split_topics(topics)
    assert held_out == [topics["c"]]
    assert train == ["Alpha two, which goes on for a good deal longer than the first one."]


def hub(
    monkeypatch: pytest.MonkeyPatch, rows: list[str], digest_of: str, fails: Exception | None = None
) -> list[tuple]:
    calls = []

    def download(*args: str, **keywords: str) -> str:
        calls.append((args, keywords))
        if fails:
            raise fails
        return "local.parquet"

    table = {"text": SimpleNamespace(to_pylist=lambda: rows)}
    attributes = {"hf_hub_download": download, "read_table": lambda path, columns: table}
    for name in ("huggingface_hub", "pyarrow.parquet"):
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    file, _ = text_module._HUB["wikitext2-test"]
    monkeypatch.setitem(
        text_module._HUB, "wikitext2-test", (file, hashlib.sha256(digest_of.encode()).hexdigest())
    )
    return calls


def test_hub_is_the_last_place(no_data: None, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ["" if line == " \n" else line for line in ARTICLE.splitlines(keepends=True)]
    calls = hub(monkeypatch, rows, ARTICLE)
    text = load_text("wikitext2-test")
    assert text.text == ARTICLE
    assert text.origin == "hub Salesforce/wikitext:wikitext-2-v1/test-00000-of-00001.parquet"
    repository = ("Salesforce/wikitext", "wikitext-2-v1/test-00000-of-00001.parquet")
    assert calls == [(repository, {"repo_type": "dataset"})]
    assert load_text("english").origin == "package pydoc_data.topics" and len(calls) == 1


def test_hub_failures_are_one_line(no_data: None, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, [], ARTICLE, fails=OSError("no connection\nmore"))
    assert "'wikitext2-test' is not in $JAXMODEL_DATA (not set)" in (
        message := error("wikitext2-test")
    )
    assert "could not be fetched (no connection)" in message
    hub(monkeypatch, ["something else\n"], ARTICLE)
    assert "is not the text that was published" in error("wikitext2-test")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "pip install 'jaxmodel[data]'" in error("wikitext2-test")


def test_missing_file_names_its_neighbours(tmp_path: Path, no_data: None) -> None:
    (tmp_path / "speech.txt").write_text("a")
    message = error(tmp_path / "speeh.txt")
    assert message.startswith(
        f"data source: {str(tmp_path / 'speeh.txt')!r} is neither a file nor a known text"
    )
    assert message.endswith("(nearest: speech.txt)")
    assert "there is no folder" in error(tmp_path / "none" / "speech.txt")
    assert "is a folder" in error(tmp_path)


def test_unknown_name_names_the_nearest(
    tmp_path: Path, no_data: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert error("wikitext2-tst").endswith("(nearest: wikitext2-test, wikitext2-valid)")
    assert all(name in error("something") for name in NAMES)
    message = error("tinyshakespeare")
    assert (
        "is not in $JAXMODEL_DATA (not set)" in message
        and "set the environment variable JAXMODEL_DATA" in message
    )


def test_empty_and_binary_files(tmp_path: Path, data: Path) -> None:
    (tmp_path / "empty").write_text(" \n")
    assert "holds no text" in error(tmp_path / "empty")
    (data / "wikitext2-test.txt").write_bytes(b"")
    assert "'wikitext2-test' holds no text" in error("wikitext2-test")
    (tmp_path / "binary").write_bytes("Zoë ".encode() + b"\xff\xfe")
    assert "is not UTF-8: byte 0xff at offset 5" in error(tmp_path / "binary")


def test_a_python_without_pydoc_data(no_data: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert "pydoc_data.topics" in error("english")


def test_articles_paragraphs_and_topics() -> None:
    assert split_documents(ARTICLE) == [ARTICLE]
    assert split_documents(ARTICLE.removeprefix(" \n")) == [ARTICLE.removeprefix(" \n")]
    # The blank line before a title still belongs to the article before.
    assert split_documents(ARTICLE * 2) == [ARTICLE + " \n", ARTICLE.removeprefix(" \n")]
    assert split_documents("one\ntwo\n\nthree\n \n\nfour") == [
        "one\ntwo\n\n",
        "three\n \n\n",
        "four",
    ]
    topics = "Unary\n*****\n\ntext\n\n\nBinary\n******\n\nmore\n\nagain\n"
    assert [d.split("\n")[0] for d in split_documents(topics)] == ["Unary", "Binary"]
    assert split_documents("a\r\n\r\nb") == ["a\r\n\r\n", "b"]
    assert split_documents(" \n\n") == []


@given(
    st.lists(st.sampled_from(["word", "\n", "\n\n", " ", " = T = \n", "Title\n***\n", "\r\n"])).map(
        "".join
    )
)
def test_splitting_loses_nothing(text: str) -> None:
    documents = split_documents(text)
    assert "".join(documents) == (text if text.strip() else "")
    assert all(re.search(r"\S", document) for document in documents)
