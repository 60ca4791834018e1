"""Chats as text: the Jinja templates of HF, with all that transformers gives them."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmodel import schema
from jaxmodel.errors import InputError, unknown
from jaxmodel.hub.schemas import Templates

type Template = str | Mapping[str, str]
"""One template, or several by name."""

_THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # names of a message's reasoning; templates read the first two


def choose(template: Template | None, name: str | None = None, tools: bool = False) -> str:
    """The template that a chat is written with.

    Args:
      template: of the tokenizer.
      name: which of several; None for "tool_use" where there are tools and one of that name, else "default".
      tools: whether the chat has tools.

    Raises:
      InputError: there is none, or none of that name.
    """
    if template is None:
        raise InputError("chat_template: this tokenizer has none; give the prompt as plain text")
    if isinstance(template, str):
        if name is not None:
            raise InputError(f"template: {name!r} given, but this tokenizer has one chat template without a name")
        return template
    if name is None:
        name = "tool_use" if tools and "tool_use" in template else "default"
        if name not in template:
            names = ", ".join(sorted(template))
            raise InputError(f"chat_template: there are multiple templates and no default; choose one of them: {names}")
    if name not in template:
        raise unknown("template", name, template)
    return template[name]


def render(template: str, special: Mapping[str, str], messages: Sequence[Mapping[str, Any]], **given: Any) -> str:
    """A conversation as the template writes it.

    Args:
      template: in Jinja.
      special: special tokens by their role (`bos_token`); the others are undefined.
      messages: what was said; keys whose value is None are left out.
      **given: what else the template sees.

    Raises:
      InputError: a message has no role, or the template refuses the messages.
    """
    wrong = isinstance(messages, str | Mapping) or not all(isinstance(m, Mapping) and "role" in m for m in messages)
    if wrong:
        raise InputError(f"messages: {messages!r:.80} is not a list of {{'role': ..., 'content': ...}}")
    try:
        return _environment().from_string(template).render({**special, "messages": [_message(m) for m in messages], **given})
    except Exception as error:  # a template can raise whatever Python can
        raise InputError(f"chat_template: it failed on these messages: {error}") from None


def read(folder: Path, entry: Any) -> Template | None:
    """The templates of a folder: of its .jinja files, else of chat_template.json, else of tokenizer_config.json.

    Args:
      folder: in HF layout.
      entry: `chat_template` of tokenizer_config.json: a template, a list of `{"name", "template"}`, or name -> template.

    Raises:
      InputError: a file that is no such thing.
    """
    path, more = folder / "chat_template.jinja", folder / "additional_chat_templates"
    named = {file.stem: file.read_text(encoding="utf-8") for file in sorted(more.glob("*.jinja"))}
    if path.is_file():
        one = path.read_text(encoding="utf-8")
        return {"default": one, **named} if named else one
    if named:
        return named
    entry = schema.read(folder / "chat_template.json", Templates, missing=True).get("chat_template", entry)
    return {item["name"]: item["template"] for item in entry} if isinstance(entry, list) else entry


def to_config(template: Template | None) -> Any:
    """`chat_template` of tokenizer_config.json."""
    if template is None or isinstance(template, str):
        return template
    return [{"name": name, "template": text} for name, text in template.items()]


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in message.items() if value is not None}
    thought = next((kept[key] for key in _THOUGHTS if key in kept), None)
    return kept if thought is None else {"thinking": thought, **kept, "reasoning_content": thought}


@functools.cache
def _environment() -> Any:
    """The language that HF templates are written in; a sandbox, because a template is somebody else's program."""
    import jinja2  # only chats need it
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`: marks what the assistant says for training; the text is that of its body."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's own form)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

        def _said(self, caller: Any) -> str:
            return caller()

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment
