"""Chats as text: HF's Jinja templates, with everything that transformers gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmodel import schema
from jaxmodel.child import Child
from jaxmodel.errors import InputError, one_of
from jaxmodel.files import read_bytes
from jaxmodel.hub.schemas import Templates
from jaxmodel.limits import limits, way

type Template = str | Mapping[str, str]
"""One template, or several by name."""

# keys of a message's reasoning; templates read the first two
_THOUGHTS = (
    "reasoning_content",
    "thinking",
    "reasoning",
)


def choose(template: Template | None, name: str | None = None, tools: bool = False) -> str:
    """Return the template that is used to write a chat.

    Args:
      template: of the tokenizer.
      name: which of several; None for "tool_use" if there are tools and a template of that name,
        else "default".
      tools: whether the chat has tools.

    Raises:
      InputError: there is no template, or none of that name.
    """
    if template is None:
        raise InputError("chat_template: this tokenizer has none; give the prompt as plain text")
    if isinstance(template, str):
        if name is not None:
            raise InputError(
                f"template: {name!r} given, but this tokenizer has one chat template without a name"
            )
        return template
    if name is None:
        name = "tool_use" if tools and "tool_use" in template else "default"
        if name not in template:
            names = ", ".join(sorted(template))
            raise InputError(
                f"chat_template: there are multiple templates and no default; choose one of them: "
                f"{names}"
            )
    one_of("template", name, template)
    return template[name]


def render(
    template: str, special: Mapping[str, str], messages: Sequence[Mapping[str, Any]], **given: Any
) -> str:
    """Return a conversation as the template writes it.

    Args:
      template: in Jinja.
      special: special tokens by their role (`bos_token`); the others are undefined.
      messages: the conversation; keys whose value is None are left out.
      **given: other variables of the template.

    Raises:
      InputError: a message has no role, or the template refuses the messages.
    """
    return _render(template, special, messages, given, False)["text"]


def render_spans(
    template: str, special: Mapping[str, str], messages: Sequence[Mapping[str, Any]], **given: Any
) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of `render` and the spans in which the assistant speaks.

    A span is the start and end of a `{% generation %}`; a template without any gives no spans.
    """
    said = _render(template, special, messages, given, True)
    return said["text"], [(first, last) for first, last in said["spans"]]


def _render(
    template: str, special: Mapping[str, str], messages: Any, given: Mapping[str, Any], spans: bool
) -> dict[str, Any]:
    if isinstance(messages, str | Mapping) or not all(
        isinstance(m, Mapping) and "role" in m for m in messages
    ):
        raise InputError(
            f"messages: {messages!r:.80} is not a list of {{'role': ..., 'content': ...}}"
        )
    said = _ask(template, {**special, "messages": list(map(_message, messages)), **given}, spans)
    if "error" in said:
        raise InputError(
            f"chat_template: it failed on these messages: {' '.join(said['error'].split())}"
        )
    return said


def read(folder: Path, entry: Any) -> Template | None:
    """Return the templates of a folder.

    They come from its .jinja files, else chat_template.json, else tokenizer_config.json.

    Args:
      folder: in HF layout.
      entry: `chat_template` of tokenizer_config.json: a template, a list of `{"name", "template"}`,
        or name -> template.

    Raises:
      InputError: a file without a valid template.
    """
    path = folder / "chat_template.jinja"
    more = folder / "additional_chat_templates"
    named = {file.stem: _text(file) for file in sorted(more.glob("*.jinja"))}
    if path.is_file():
        one = _text(path)
        return {"default": one, **named} if named else one
    if named:
        return named
    entry = schema.read(folder / "chat_template.json", Templates, missing=True).get(
        "chat_template", entry
    )
    return {item["name"]: item["template"] for item in entry} if isinstance(entry, list) else entry


def _text(path: Path) -> str:
    try:
        return read_bytes(path, 2**20).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error}") from None


def to_config(template: Template | None) -> Any:
    """Return the value of `chat_template` in tokenizer_config.json."""
    if template is None or isinstance(template, str):
        return template
    return [{"name": name, "template": text} for name, text in template.items()]


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in message.items() if value is not None}
    thought = next((kept[key] for key in _THOUGHTS if key in kept), None)
    return kept if thought is None else {"thinking": thought, **kept, "reasoning_content": thought}


# ------------------------------------------------------------------------------ where templates run


_CHILD = Child(Path(__file__).with_name("chat_worker.py"))


def _ask(template: str, variables: Mapping[str, Any], spans: bool) -> dict[str, Any]:
    """Return the result of rendering a template in the process where templates run."""
    limit = limits()
    try:
        asked = [template, dict(variables), int(limit.template_characters), spans]
        said = _CHILD.ask(asked, limit.template_seconds, int(limit.template_memory))
    except InputError as error:
        raise InputError(f"messages: {error}") from None
    if not said:
        most = f"{limit.template_seconds:g} seconds, or more memory than allowed"
        return {"error": f"it took more than {most} ({way('template_seconds', 'template_memory')})"}
    return {**said, "error": f"{said['error']} ({way(said['limit'])})"} if "limit" in said else said
