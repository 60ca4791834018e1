"""Rows of chats, completions and labels: what counts in the loss, rows by hand, errors that name
the line.
"""

from __future__ import annotations

import csv
import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxmodel import data, losses, train
from jaxmodel.data.examples import kind_of_source
from jaxmodel.errors import InputError
from jaxmodel.hub import train_bpe
from jaxmodel.models import gpt2

BYTES = train_bpe([], 257)  # each byte a token of its own, and the end of a text, which is 0
TURNS = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{% if "
    "add_generation_prompt %}a:{% endif %}"
)


def chatting(template: str = TURNS):
    return dataclasses.replace(BYTES, chat_template=template)


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def spelt(ids, tokenizer=BYTES) -> str:
    return tokenizer.decode([int(i) for i in ids], skip_special=False)


def learnt(batch, row: int) -> str:
    return spelt(batch["targets"][row][batch["weights"][row] > 0])


CHATS = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
    {
        "conversations": [
            {"from": who, "value": text}
            for who, text in zip(["human", "gpt"] * 2, "abcd", strict=True)
        ]
    },
    {"prompt": "2+2=", "completion": "4"},
    {
        "prompt": [{"role": "user", "content": "x"}],
        "completion": [{"role": "assistant", "content": "y"}],
    },
]


@pytest.mark.parametrize("pack", [False, True])
def test_rows_by_hand(tmp_path, pack):
    rows = data.answers(write(tmp_path / "a.jsonl", CHATS), chatting(), 20, pack=pack)
    texts = ["u:hi;a:yo;", "u:a;a:b;u:c;a:d;", "2+2=4<|endoftext|>", "u:x;a:y;"]
    wanted = ["yo;", "b;d;", "4<|endoftext|>", "y;"]
    batch = rows.take(np.arange(len(rows)))
    assert len(rows) == (3 if pack else 4) and rows.tokens == 10 + 16 + 6 + 8
    found = {}
    for row in range(len(rows)):
        for number in range(1, batch["segments"][row].max() + 1):
            here = batch["segments"][row] == number
            ids = [*batch["tokens"][row][here], batch["targets"][row][here][-1]]
            assert batch["positions"][row][here].tolist() == list(range(here.sum()))
            np.testing.assert_array_equal(
                batch["targets"][row][here][:-1], batch["tokens"][row][here][1:]
            )
            counted = batch["targets"][row][here][batch["weights"][row][here] > 0]
            found[spelt(ids)] = spelt(counted)
    assert found == dict(zip(texts, wanted, strict=True))
    assert not batch["weights"][batch["segments"] == 0].any()
    again = data.answers(str(tmp_path / "a.jsonl"), chatting(), 20, pack=pack)
    assert (
        again.fingerprint
        == rows.fingerprint
        != data.answers(str(tmp_path / "a.jsonl"), chatting(), 21).fingerprint
    )


def test_packed_texts_have_the_loss_that_they_have_alone(tmp_path):
    path = write(tmp_path / "a.jsonl", CHATS)
    model = gpt2.model(gpt2.Config(257, 16, 2, 2, 32))
    params = jax.jit(model.init)(jax.random.key(0))
    loss = jax.jit(lambda batch: losses.next_token(model, params, batch))
    found = []
    for pack in (False, True):
        rows = data.answers(path, chatting(), 20, pack=pack)
        value, metrics = loss(jax.device_put(rows.take(np.arange(len(rows)))))
        found.append((float(value), float(metrics["weight"])))
    assert found[0] == pytest.approx(found[1], rel=1e-5) and found[0][1] == 3 + 4 + 2 + 2


def test_only_answers_are_learnt(tmp_path):
    """A model that is taught one answer to one question does not learn to ask it."""
    path = write(tmp_path / "a.jsonl", [{"prompt": "abcdefgh", "completion": "zzz"}])
    rows = data.answers(path, BYTES, 16)
    model = gpt2.model(gpt2.Config(257, 32, 2, 2, 16))
    state, history = train.fit(
        model, data.Stream(rows, 2), train.TrainConfig(steps=40, learning_rate=1e-2, log_every=39)
    )
    assert history[-1]["loss"] < 0.1
    everything = {
        **rows.take(np.array([0])),
        "weights": (rows.take(np.array([0]))["segments"] > 0).astype(np.float32),
    }
    assert float(losses.next_token(model, state.params, jax.device_put(everything))[0]) > 2


def test_rows_of_some_numbers(tmp_path):
    rows = data.answers(write(tmp_path / "a.jsonl", CHATS), chatting(), 20, pack=True)
    part = rows.only(np.array([2, 0]))
    whole = rows.take(np.arange(len(rows)))
    some = part.take(np.arange(2))
    for name in whole:
        np.testing.assert_array_equal(some[name], whole[name][[2, 0]])


def test_what_is_cut_is_said(tmp_path, capsys):
    path = write(
        tmp_path / "a.jsonl",
        [{"prompt": "abc", "completion": "0123456789"}, {"prompt": "a" * 30, "completion": "b"}],
    )
    rows = data.answers(path, BYTES, 8)
    assert len(rows) == 1 and learnt(rows.take(np.array([0])), 0) == "012345"
    said = capsys.readouterr().err
    assert (
        "2 of 2 texts are longer than a row of 8 tokens and were cut" in said
        and "1 of 2 texts have nothing left to learn" in said
    )
    with pytest.raises(InputError, match="no text has anything to learn within 2 tokens"):
        data.answers(path, BYTES, 2)


WRONG = [
    ({"messages": "hi"}, "'messages' is str of 'hi'; allowed: a list of messages"),
    ({"messages": []}, "'messages' is list of .*at least one"),
    ({"messages": ["hi"]}, "message 0 is str"),
    (
        {"messages": [{"role": "user"}]},
        "message 0 has 'role'; allowed: 'role', a text, and 'content'",
    ),
    ({"messages": [{"content": "a"}]}, "message 0 has 'content'"),
    ({"messages": [{"role": "user", "content": "a"}]}, "none is from the assistant"),
    ({"prompt": "a", "completion": None}, "'completion' is NoneType; allowed: a text"),
    ({"prompt": "a", "completion": "\ud83d"}, "half of a surrogate pair"),
    ({"messages": [{"role": "assistant", "content": "\ud83d"}]}, "not a string of valid Unicode"),
    ({"txt": "a"}, "has 'txt'; allowed: 'messages', or 'prompt' and 'completion'"),
]


@pytest.mark.parametrize(("row", "says"), WRONG)
def test_a_wrong_record_is_named_by_its_line(tmp_path, row, says):
    path = write(tmp_path / "a.jsonl", [CHATS[0], row])
    with pytest.raises(InputError, match=f"a.jsonl' line 2.*{says}") as error:
        data.answers(path, chatting(), 16)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("read", [data.answers, data.labelled])
def test_what_is_no_tokenizer_and_no_length(tmp_path, read):
    path = write(tmp_path / "a.jsonl", CHATS)
    with pytest.raises(
        InputError, match="tokenizer: 'smollm2-135m' given; allowed: a hub.Tokenizer"
    ):
        read(path, "smollm2-135m", 8)
    with pytest.raises(InputError, match="length: 0 given"):
        read(path, BYTES, 0)


def test_sources_that_hold_no_records(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(InputError, match="is plain text; allowed: records, in files that end with"):
        data.answers(str(tmp_path / "a.txt"), BYTES, 8)
    assert kind_of_source(str(tmp_path / "a.txt")) is None and kind_of_source("pydoc") is None
    assert kind_of_source(write(tmp_path / "b.jsonl", [{"text": "a", "label": 1}])) == "label"
    assert kind_of_source(write(tmp_path / "c.jsonl", CHATS[2:])) == "completion"
    assert kind_of_source(write(tmp_path / "d.jsonl", [{"text": "a"}])) is None
    assert kind_of_source(write(tmp_path / "e.jsonl", [])) is None


def table(path, rows, separator=",") -> str:
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=separator).writerows([("text", "label"), *rows])
    return str(path)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_texts_with_labels(tmp_path, kind):
    rows = [('good, "film"', "pos"), ("bad", "neg"), ("well", "pos")]
    if kind == "jsonl":
        path = write(tmp_path / "a.jsonl", [{"text": text, "label": label} for text, label in rows])
    else:
        path = table(tmp_path / f"a.{kind}", rows, "\t" if kind == "tsv" else ",")
    batch, names = data.labelled(path, BYTES, 12)
    assert names == ("neg", "pos") and batch["labels"].tolist() == [1, 0, 1]
    for row, (text, _) in enumerate(rows):
        assert spelt(batch["tokens"][row][batch["mask"][row]]) == text
    held, again = data.labelled(table(tmp_path / "b.csv", [("x", "pos")]), BYTES, 12, names=names)
    assert again == names and held["labels"].tolist() == [1]
    with pytest.raises(
        InputError, match="c.csv' line 3: the label 'odd' is not a class; allowed: neg, pos"
    ):
        data.labelled(
            table(tmp_path / "c.csv", [("x", "pos"), ("y", "odd")]), BYTES, 12, names=names
        )


def test_labels_that_are_numbers_are_classes_in_their_order(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "a", "label": n} for n in (10, 2, 9, 2)])
    batch, names = data.labelled(path, BYTES, 4)
    assert names == ("2", "9", "10") and batch["labels"].tolist() == [2, 0, 1, 0]


def test_texts_are_cut_within_what_the_tokenizer_puts_around_them(tmp_path, capsys):
    from tokenizers import processors

    framed = train_bpe([], 257)
    framed.backend.add_special_tokens(["[B]", "[E]"])
    framed.backend.post_processor = processors.TemplateProcessing(
        single="[B] $A [E]", special_tokens=[("[B]", 257), ("[E]", 258)]
    )
    path = table(tmp_path / "a.csv", [("abcdefgh", "x"), ("abc", "y")])
    batch, _ = data.labelled(path, framed, 6)
    assert [
        spelt(row[keep], framed) for row, keep in zip(batch["tokens"], batch["mask"], strict=True)
    ] == [
        "[B]abcd[E]",
        "[B]abc[E]",
    ]
    assert "1 of 2 texts are longer than a row of 6 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a"},
        {"text": 3, "label": 1},
        {"text": "a", "label": 1.5},
        {"text": "a", "label": None},
    ],
)
def test_a_row_without_text_or_label(tmp_path, row):
    path = write(tmp_path / "a.jsonl", [{"text": "a", "label": 1}, row])
    with pytest.raises(InputError, match="a.jsonl' line 2: .* given; allowed: 'text', and 'label'"):
        data.labelled(path, BYTES, 4)
    one = write(tmp_path / "b.jsonl", [{"text": "a", "label": 1}])
    with pytest.raises(InputError, match="all labels are '1'; allowed: at least two classes"):
        data.labelled(one, BYTES, 4)
