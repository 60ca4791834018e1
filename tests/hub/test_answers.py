"""Which tokens of a text are the answer: as transformers says of `{% generation %}`, stored; else
by hand.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers

from jaxmodel.errors import InputError
from jaxmodel.hub import answers
from jaxmodel.hub.tokenizer import Tokenizer

GOLDEN = json.loads(
    Path(__file__).with_name("goldens").joinpath("answers.json").read_text(encoding="utf-8")
)
BACKEND = tokenizers.Tokenizer.from_str(json.dumps(GOLDEN["tokenizer"]))
END = BACKEND.token_to_id("</s>")
PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}{% if "
    "add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT = GOLDEN["cases"][1]["messages"]


def tokenizer(template: str | None, **more) -> Tokenizer:
    return Tokenizer(BACKEND, (END,), chat_template=template, **more)


def said(one: answers.Answer) -> list[str]:
    """The runs of text that are learnt, and what stands between."""
    runs = []
    ids = []
    before = None
    for i, learnt in zip(one.ids, one.learnt, strict=True):
        if learnt != before and ids:
            runs.append(BACKEND.decode(ids, skip_special_tokens=False))
            ids = []
        ids.append(i)
        before = learnt
    return [*runs, BACKEND.decode(ids, skip_special_tokens=False)]


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_generation_spans_are_those_of_transformers(case):
    (one,) = answers.of_chat(tokenizer(case["template"]), case["messages"])
    assert one.ids == case["ids"] and one.learnt == [bool(x) for x in case["learnt"]]


def test_without_spans_an_answer_is_what_its_message_adds():
    (one,) = answers.of_chat(tokenizer(PLAIN), CHAT)
    assert said(one) == [
        "<|system|>be</s><|user|>café?</s><|assistant|>",
        " yes 😀</s>",
        "<|user|>hi\n\n</s><|assistant|>",
        "café</s>",
    ]
    assert not one.learnt[0]


def test_a_template_that_rewrites_earlier_turns_gives_an_example_for_each_answer():
    """As those do that leave out old reasoning: a turn is written otherwise once more follow."""
    rewriting = (
        "{% for m in messages %}<|{{ m.role }}|>{% if loop.last and m.role == 'assistant' "
        "%}(so){% endif %}{{ m.content }}</s>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    one, two = answers.of_chat(tokenizer(rewriting), CHAT)
    assert said(one) == ["<|system|>be</s><|user|>café?</s><|assistant|>", "(so) yes 😀</s>"]
    assert said(two)[-1] == "(so)café</s>" and " yes 😀" in said(two)[0]


def test_only_the_answers_from_a_message_on():
    for template in (PLAIN, GOLDEN["cases"][0]["template"]):
        (one,) = answers.of_chat(tokenizer(template), CHAT, first=3)
        assert "yes" in said(one)[0] and said(one)[1].startswith("café")


def test_tools_reach_the_template():
    template = "{% if tools %}{{ tools[0].name }}{% endif %}" + PLAIN
    (one,) = answers.of_chat(tokenizer(template), CHAT, tools=[{"name": "now"}])
    assert said(one)[0].startswith("now<|system|>")


def test_a_completion_and_the_end_of_the_text():
    made = tokenizer(None)
    one = answers.of_completion(made, "say hi", " ok.")
    assert said(one) == ["say hi", " ok.</s>"]
    one = answers.of_completion(
        made, "ok", "ok."
    )  # tokens go over the edge: the one of both is learnt
    assert said(one)[-1] == "ok.</s>" and sum(one.learnt) < len(one.ids)


def test_what_cannot_be_learnt_is_refused():
    with pytest.raises(
        InputError, match="messages: none is from the assistant, so there is nothing to learn"
    ):
        answers.of_chat(tokenizer(PLAIN), CHAT[:2])
    with pytest.raises(InputError, match="chat_template: this tokenizer has none"):
        answers.of_chat(tokenizer(None), CHAT)
    backwards = "{% for m in messages | reverse %}{{ m.content }}{% endfor %}"
    with pytest.raises(
        InputError, match="chat_template: message 2 changes how the messages before it are written"
    ):
        answers.of_chat(tokenizer(backwards), CHAT)
