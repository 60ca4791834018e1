"""Texts for training on answers: token ids, and a mask of those that the model learns."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmodel.errors import InputError
from jaxmodel.hub import backends, chat
from jaxmodel.hub.tokenizer import Tokenizer

type Messages = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Answer:
    """A text and the parts of it that are learned.

    Attributes:
      ids: of its tokens.
      learnt: for each token, whether it is a target of the loss.
    """

    ids: list[int]
    learnt: list[bool]


def of_completion(tokenizer: Tokenizer, prompt: str, completion: str) -> Answer:
    """Return a prompt with its completion; the completion and the end of the text are learned.

    >>> from jaxmodel.hub import train_bpe
    >>> tokenizer = train_bpe([], 257)
    >>> answer = of_completion(tokenizer, "2+2=", "4")
    >>> tokenizer.decode(answer.ids, skip_special=False), answer.learnt
    ('2+2=4<|endoftext|>', [False, False, False, False, True, True])
    """
    ids, learnt = _learnt(
        tokenizer, prompt + completion, [(len(prompt), len(prompt) + len(completion))]
    )
    begins = list(tokenizer.begins)
    ends = list(tokenizer.eos_ids[:1])
    return Answer([*begins, *ids, *ends], [False] * len(begins) + learnt + [True] * len(ends))


def of_chat(
    tokenizer: Tokenizer,
    messages: Messages,
    *,
    first: int = 0,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    template: str | None = None,
    **more: Any,
) -> list[Answer]:
    """Return a conversation as the chat template writes it; only the assistant's words are learned.

    These are the parts inside the template's `{% generation %}`, as in transformers'
    `return_assistant_tokens_mask`. With a template that has none, they are what a message of the
    assistant adds to the preceding messages and the opening of its answer; so the end of the turn
    is learned too.

    Args:
      tokenizer: with a chat template.
      messages: see `Tokenizer.apply_chat`.
      first: index of the first message that may be learned.
      tools: see `Tokenizer.apply_chat`.
      documents: that the answers rest on.
      template: name of one of several templates.
      **more: other variables of the template.

    Returns:
      One `Answer` for the conversation; or one for each of the assistant's answers, with what
      precedes it, where the template writes an answer differently when more messages follow
      (templates that drop old reasoning do).

    Raises:
      InputError: no message of the assistant; see also `Tokenizer.apply_chat`.
    """
    chosen = chat.choose(tokenizer.chat_template, template, tools is not None)
    special = tokenizer.named_tokens
    given = {"tools": tools, "documents": documents, **more}

    def write(count: int, opening: bool = False) -> str:
        return chat.render(
            chosen, special, messages[:count], add_generation_prompt=opening, **given
        )

    whole, spans = chat.render_spans(
        chosen, special, messages, add_generation_prompt=False, **given
    )
    spoken = [
        i for i, message in enumerate(messages) if message.get("role") == "assistant" and i >= first
    ]
    if not spoken:
        raise InputError(
            "messages: none is from the assistant, so there is nothing to learn; allowed: at "
            "least one"
        )
    if spans:
        begin = _in_common(write(first), whole) if first else 0
        return [Answer(*_learnt(tokenizer, whole, [span for span in spans if span[0] >= begin]))]
    turns: list[tuple[str, tuple[int, int]]] = []
    for i in spoken:
        before = write(i)
        text = whole if i == len(messages) - 1 else write(i + 1)
        start = _in_common(write(i, opening=True), text)
        if start < len(before) or start >= len(text):
            raise InputError(
                f"chat_template: message {i} changes how the messages before it are written, so it "
                "cannot be separated from them"
            )
        turns.append((text, (start, len(text))))
    if all(whole.startswith(text) for text, _ in turns):
        return [Answer(*_learnt(tokenizer, whole, [span for _, span in turns]))]
    return [Answer(*_learnt(tokenizer, text, [span])) for text, span in turns]


def _in_common(one: str, other: str) -> int:
    """Return the length of the common prefix of two texts."""
    return sum(
        1
        for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    )


def _learnt(
    tokenizer: Tokenizer, text: str, spans: Sequence[tuple[int, int]]
) -> tuple[list[int], list[bool]]:
    """Return the ids of a text, and whether each has a character within the spans."""
    ids, offsets = backends.encode_offsets(tokenizer.backend, text)
    return ids, [
        any(start < last and end > first for first, last in spans) for start, end in offsets
    ]
