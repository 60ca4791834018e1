from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmodel.generation.text import Writer
from jaxmodel.hub.tokenizer import train_bpe

TOKENIZER = dataclasses.replace(train_bpe(["aab abb aab ba ba, naïve 東京 🙂🙃"], 290), eos_ids=(0, 7))
LETTERS = st.text(st.sampled_from("ab é🙂"), min_size=1, max_size=30)


def written(ids, limit=1000, stop=()):
    writer, pieces = Writer(TOKENIZER, limit, stop), []
    for token in ids:
        writer.write([token])
        pieces.append(writer.read())
    return writer, pieces


def cut(ids, stop):
    """What should be left, the slow way: decode all from the start after each token, and look for each stop string."""
    for n in range(1, len(ids) + 1):
        text = TOKENIZER.decode(ids[:n])
        if found := [text.find(s) for s in stop if s in text]:
            return text[: min(found)], n
    return TOKENIZER.decode(ids), len(ids)


@settings(deadline=None, max_examples=300)
@given(text=LETTERS, stop=st.lists(st.text(st.sampled_from("ab é🙂"), min_size=1, max_size=4), max_size=3))
def test_stop_strings_are_cut_wherever_the_tokens_part_them(text, stop):
    ids = TOKENIZER.encode(text)
    expected, n = cut(ids, stop)
    writer, pieces = written(ids, limit=len(ids), stop=stop)
    assert writer.text == "".join(pieces) == expected
    assert writer.ids == ids[:n]
    assert writer.finish_reason == ("stop" if any(s in TOKENIZER.decode(ids[:n]) for s in stop) else "length")
    at_once = Writer(TOKENIZER, len(ids), stop)
    at_once.write([*ids, 5, 5, 5])
    assert (at_once.text, at_once.ids, at_once.finish_reason) == (writer.text, writer.ids, writer.finish_reason)


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
