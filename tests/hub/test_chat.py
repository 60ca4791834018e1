"""What chat templates see: that of transformers 5.24 (`apply_chat_template` on the same folder gave
the expected texts).
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from jaxmodel import limits
from jaxmodel.errors import InputError
from jaxmodel.hub import chat
from jaxmodel.hub.tokenizer import Tokenizer, from_folder, train_bpe

BACKEND = train_bpe([], vocab_size=257).backend
BACKEND.add_special_tokens(["<s>", "</s>", "<unk>"])
HELLO = [{"role": "user", "content": "grüß <b>"}]
TOOL = {
    "type": "function",
    "function": {"name": "now", "parameters": {"type": "object", "properties": {}}},
}


def read(tmp_path: Path, **config: Any) -> Tokenizer:
    BACKEND.save(str(tmp_path / "tokenizer.json"))
    given = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": {"content": "<unk>"}, **config}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(given))
    return from_folder(tmp_path)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% if tools is not none %}tools{% else %}plain{% endif %}", "plain"),
        ("{{ tools is defined }} {{ documents is none }}", "True True"),
        ("{% for d in documents or [] %}{{ d.text }}{% endfor %}.", "."),
        ("{{ bos_token }}{{ eos_token }}{{ unk_token }}", "<s></s><unk>"),
        (
            "{{ pad_token is defined }} {{ cls_token is defined }}[{{ mask_token }}]",
            "False False[]",
        ),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "grüß <b>!"),
        ("{% for x in 'abc' %}{% if x == 'b' %}{% break %}{% endif %}{{ x }}{% endfor %}", "a"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "grüß <b>"}'),
        (
            "{{ messages[0] | tojson(ensure_ascii=True) }}",
            r'{"role": "user", "content": "gr\u00fc\u00df <b>"}',
        ),
        (
            "{{ messages[0] | tojson(separators=(',', ':'), sort_keys=true) }}",
            '{"content":"grüß <b>","role":"user"}',
        ),
        ("{{ messages[0] | tojson(indent=1) }}", '{\n "role": "user",\n "content": "grüß <b>"\n}'),
        ("{{ add_generation_prompt }}{{ enable_thinking is defined }}", "TrueFalse"),
    ],
)
def test_what_a_template_sees(template: str, text: str, tmp_path: Path) -> None:
    assert read(tmp_path, chat_template=template).apply_chat(HELLO) == text


def test_today(tmp_path: Path) -> None:
    said = read(tmp_path, chat_template="{{ strftime_now('%d %b %Y') }}").apply_chat(HELLO)
    assert abs((datetime.datetime.strptime(said, "%d %b %Y") - datetime.datetime.now()).days) <= 1


def test_tools_documents_and_what_else_is_given(tmp_path: Path) -> None:
    template = (
        "{{ tools[0].function.name }} {{ documents[0].text }} {{ enable_thinking }} {{ "
        "add_generation_prompt }}"
    )
    tokenizer = read(tmp_path, chat_template=template)
    documents = [{"title": "a", "text": "b"}]
    said = tokenizer.apply_chat(
        HELLO, False, tools=[TOOL], documents=documents, enable_thinking=False
    )
    assert said == "now b False False"


def test_messages_without_what_is_none_and_with_their_thoughts(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m.content is defined }} {{ m.reasoning_content }} {{ "
        "m.thinking }};{% endfor %}"
    )
    messages = [
        {"role": "a", "content": None, "thinking": "x"},
        {"role": "b", "content": "c", "reasoning": "y"},
    ]
    assert read(tmp_path, chat_template=template).apply_chat(messages) == "False x x;True y y;"


@pytest.mark.parametrize("form", ["list", "dict"])
def test_several_templates(form: str, tmp_path: Path) -> None:
    named = {"default": "plain", "tool_use": "with tools", "rag": "from texts"}
    entry = (
        named
        if form == "dict"
        else [{"name": name, "template": text} for name, text in named.items()]
    )
    tokenizer = read(tmp_path, chat_template=entry)
    tokenizer.save(tmp_path)  # and they are kept
    for one in (tokenizer, from_folder(tmp_path)):
        assert one.apply_chat(HELLO) == "plain"
        assert one.apply_chat(HELLO, tools=[TOOL]) == "with tools"
        assert one.apply_chat(HELLO, template="rag") == "from texts"
        with pytest.raises(
            InputError,
            match="template: 'tool' is not known; allowed: default, rag, tool_use .*tool_use",
        ):
            one.apply_chat(HELLO, template="tool")


def test_several_templates_and_no_default(tmp_path: Path) -> None:
    tokenizer = read(
        tmp_path,
        chat_template=[{"name": "rag", "template": "x"}, {"name": "tool_use", "template": "y"}],
    )
    with pytest.raises(
        InputError, match="multiple templates and no default; choose one of them: rag, tool_use"
    ):
        tokenizer.apply_chat(HELLO)
    assert tokenizer.apply_chat(HELLO, tools=[TOOL]) == "y"


def test_templates_in_files(tmp_path: Path) -> None:
    read(tmp_path, chat_template="of the config")
    (tmp_path / "chat_template.json").write_text('{"chat_template": "of a processor"}')
    assert from_folder(tmp_path).chat_template == "of a processor"
    (tmp_path / "chat_template.jinja").write_text("newest")
    assert from_folder(tmp_path).chat_template == "newest"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("more")
    assert from_folder(tmp_path).chat_template == {"default": "newest", "rag": "more"}


@pytest.mark.parametrize("entry", [7, [1], {"default": 3}])
def test_templates_of_another_form(entry: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tokenizer_config.json: chat_template.* is .*; allowed: "):
        read(tmp_path, chat_template=entry)


def test_a_template_cannot_leave_the_sandbox(tmp_path: Path) -> None:
    tokenizer = read(tmp_path, chat_template="{{ strftime_now.__globals__.items() }}")
    with pytest.raises(InputError, match="chat_template: it failed"):
        tokenizer.apply_chat(HELLO)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "it took more than 0.5 seconds",
        ),
        ("{{ messages | tojson(indent=10**9) }}", "it takes more memory than allowed"),
        ("{{ 'a' * 10**11 }}", "it takes more memory than allowed"),
        ("{{ 'a'.ljust(10**10) }}", "it takes more memory than allowed"),
        (
            "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% "
            "endfor %}",
            "it takes more memory",
        ),
        (
            "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
            "it writes more than 16,777,216 characters",
        ),
        (
            "{{ self.__init__.__globals__ }}{{ "
            "cycler.__init__.__globals__.os.popen('true').read() }}",
            "unsafe",
        ),
    ],
)
def test_a_template_may_take_so_much(
    template: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time, memory and output; and the next chat is written as before."""
    monkeypatch.setattr(
        limits, "_now", limits.Limits(template_seconds=0.5 if "seconds" in says else 10.0)
    )
    with pytest.raises(InputError, match=says) as error:
        chat.render(template, {}, HELLO)
    assert "\n" not in str(error.value)
    assert chat.render("{{ messages[0].content }}", {}, HELLO) == HELLO[0]["content"]


def test_messages_are_plain_data() -> None:
    with pytest.raises(InputError, match="messages: not plain JSON data"):
        chat.render("{{ messages }}", {}, [{"role": "user", "content": object()}])
