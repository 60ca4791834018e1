from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from jaxmodel.generation.text import Writer
from jaxmodel.hub.tokenizer import Tokenizer, train_bpe
from jaxmodel.hub.vocabularies import of_pieces, read_pieces

TOKENIZER = dataclasses.replace(
    train_bpe(["aab abb aab ba ba, naïve 東京 🙂🙃"], 290), eos_ids=(0, 7)
)
LETTERS = st.text(st.sampled_from("ab é🙂"), min_size=1, max_size=30)


def written(ids, limit=1000, stop=()):
    writer = Writer(TOKENIZER, limit, stop)
    pieces = []
    for token in ids:
        writer.write([token])
        pieces.append(writer.read())
    return writer, pieces


def cut(ids, stop):
    """What should be left, the slow way: decode all from the start after each token, and look for
    each stop string.
    """
    for n in range(1, len(ids) + 1):
        text = TOKENIZER.decode(ids[:n])
        if found := [text.find(s) for s in stop if s in text]:
            return text[: min(found)], n
    return TOKENIZER.decode(ids), len(ids)


@settings(deadline=None, max_examples=300)
@given(
    text=LETTERS,
    stop=st.lists(st.text(st.sampled_from("ab é🙂"), min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_are_cut_wherever_the_tokens_part_them(text, stop):
    ids = TOKENIZER.encode(text)
    expected, n = cut(ids, stop)
    writer, pieces = written(ids, limit=len(ids), stop=stop)
    assert writer.text == "".join(pieces) == expected
    assert writer.ids == ids[:n]
    assert writer.finish_reason == (
        "stop" if any(s in TOKENIZER.decode(ids[:n]) for s in stop) else "length"
    )
    at_once = Writer(TOKENIZER, len(ids), stop)
    at_once.write([*ids, 5, 5, 5])
    assert (at_once.text, at_once.ids, at_once.finish_reason) == (
        writer.text,
        writer.ids,
        writer.finish_reason,
    )


def test_a_stop_string_of_several_tokens_is_never_shown_in_part():
    ids = TOKENIZER.encode("so: ba END, or not ENDED")
    _, pieces = written(ids, limit=len(ids), stop=["ENDED"])
    assert "".join(pieces) == "so: ba END, or not "
    assert not any("E" in piece and "END," not in piece for piece in pieces)


def test_pieces_are_whole_characters():
    ids = TOKENIZER.encode("żó🧪x")
    assert len(ids) > 6  # not in the corpus: hardly more than a byte a token
    writer, pieces = written(ids, limit=len(ids))
    assert [piece for piece in pieces if piece] == ["ż", "ó", "🧪", "x"]
    assert writer.text == "żó🧪x"


def test_half_a_character_at_the_end_is_shown_as_such():
    ids = TOKENIZER.encode("a🧪")[:-1]
    writer, pieces = written(ids, limit=len(ids))
    assert writer.text == "".join(pieces) == TOKENIZER.decode(ids) == "a\ufffd"


@pytest.mark.parametrize("eos", [0, 7])
def test_an_end_token_ends_and_is_not_kept(eos):
    ids = TOKENIZER.encode("ba ba")
    writer, _ = written([*ids, eos, *ids])
    assert (writer.text, writer.ids, writer.finish_reason) == ("ba ba", ids, "eos")


def test_the_limit_ends():
    ids = TOKENIZER.encode("ba, ba, ba")
    writer, _ = written(ids, limit=2)
    assert (writer.ids, writer.finish_reason) == (ids[:2], "length")
    open_end, _ = written(ids)
    assert open_end.finish_reason is None


# -------------------------------------------------------------------------- the text in its context

GOLDENS = Path(__file__).parents[1] / "hub" / "goldens" / "sentencepiece"
PIECES = Tokenizer(of_pieces(read_pieces(GOLDENS / "llama.model")), eos_ids=(2,), bos_id=1)
RAW = st.lists(st.integers(0, PIECES.vocab_size - 1).filter(lambda i: i != 2), max_size=24)


def behind(tokenizer, prompt, ids):
    """What a text goes on with: all of it decoded at once, without what the prompt alone says."""
    return tokenizer.decode([*prompt, *ids])[len(tokenizer.decode(prompt)) :]


@pytest.mark.parametrize(
    ("prompt", "new"),
    [("the", "module is"), ("the module", "\U0001f642 is"), ("the", "\n\nmodule")],
)
def test_the_first_new_word_keeps_its_space(prompt, new):
    before = PIECES.encode(prompt)
    ids = PIECES.encode(new)
    writer = Writer(PIECES, len(ids), prompt=[1, *before])
    pieces = []
    for token in ids:
        writer.write([token])
        pieces.append(writer.read())
    assert writer.text == "".join(pieces) == f" {new}" == behind(PIECES, before, ids)
    stops = Writer(PIECES, len(ids), (" ",), [1, *before])
    stops.write(ids)
    assert (stops.text, stops.finish_reason) == ("", "stop")
    alone = Writer(
        PIECES, len(ids), prompt=[1]
    )  # behind nothing but a special token it is the first word of the text
    alone.write(ids)
    assert alone.text == new


@settings(deadline=None, max_examples=300)
@given(prompt=st.text(st.sampled_from("the module ▁\n🙂é"), max_size=40), ids=RAW)
def test_a_text_is_what_decoding_all_at_once_gives(prompt, ids):
    """Also of bytes that make no character: how many U+FFFD they are is known at the end of their
    run only.
    """
    before = PIECES.encode(prompt)
    for token in before[-1:]:  # a run that begins in the prompt changes what the prompt says
        ids = (
            ids if not (PIECES.backend.id_to_token(token) or "").startswith("<0x") else [305, *ids]
        )
    writer = Writer(PIECES, max(len(ids), 1), prompt=before)
    pieces = []
    for token in ids:
        writer.write([token])
        pieces.append(writer.read())
    if not ids:
        return
    assert writer.text == "".join(pieces) == behind(PIECES, before, ids)


def special(*contents):
    tokenizer = train_bpe(["aab abb aab ba ba"], 290)
    tokenizer.backend.add_special_tokens(list(contents))
    return tokenizer, {content: tokenizer.backend.token_to_id(content) for content in contents}


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        (["<|end|>"], "ab", "stop"),
        (["<|end|>\n"], "ab", "stop"),
        (["b<|end|>"], "a", "stop"),
        (["b\na"], "a", "stop"),  # the text as it is shown counts too
        (["<|end|> "], "ab\nab", "length"),
        (["<|start|>"], "ab\nab", "length"),
        (["\n", "<|end|>"], "ab", "stop"),
    ],
)
def test_stop_strings_see_special_tokens(stop, text, reason):
    tokenizer, ids = special("<|end|>", "<|start|>")
    row = [*tokenizer.encode("ab"), ids["<|end|>"], *tokenizer.encode("\nab")]
    writer = Writer(tokenizer, len(row), stop)
    pieces = []
    for token in row:
        writer.write([token])
        pieces.append(writer.read())
    assert (writer.text, writer.finish_reason) == (text, reason) and "".join(pieces) == text


def test_nothing_is_shown_that_a_stop_string_with_a_special_token_may_claim():
    tokenizer, ids = special("<|end|>")
    writer = Writer(tokenizer, 99, ["b<|end|>\n"])
    for token in tokenizer.encode("ab"):
        writer.write([token])
    assert writer.read() == "a"
    writer.write([ids["<|end|>"]])
    assert writer.read() == ""
    writer.write(tokenizer.encode("x"))
    assert writer.read() == "bx"
