"""Texts to learn answers from: token ids, and which of them the model is to learn to say."""

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
    """A text with the parts of it that are to be learnt.

    Attributes:
      ids: of its tokens.
      learnt: for each whether it counts in the loss as a target.
    """

    ids: list[int]
    learnt: list[bool]


def of_completion(tokenizer: Tokenizer, prompt: str, completion: str) -> Answer:
    """A completion behind its prompt, of which the completion and the end of the text are learnt.

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
    """A conversation as the chat template writes it, of which what the assistant says is learnt.

    That is what stands in the template's `{% generation %}`, as of transformers'
    `return_assistant_tokens_mask`. Of a template without, it is what a message of the assistant
    adds to the messages in front and the opening of its answer; so the end of the turn is learnt
    too.

    Args:
      tokenizer: with a chat template.
      messages: as of `Tokenizer.apply_chat`.
      first: number of the first message that may be learnt.
      tools: see `Tokenizer.apply_chat`; so are the rest.
      documents: what answers rest on.
      template: name of one of several.
      **more: what else the template reads.

    Returns:
      The one conversation; or one for each answer, with what stands in front of it, where the
      template writes an answer otherwise when more messages follow (as those do that leave old
      reasoning out).

    Raises:
      InputError: no message of the assistant, or see `Tokenizer.apply_chat`.
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
            "messages: none is the assistant's, so there is nothing to learn; allowed: at least one"
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
                f"chat_template: message {i} changes how those in front are written, so it cannot "
                f"be told apart"
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
    """Return the ids of a text, and whether each has a character of the spans."""
    ids, offsets = backends.encode_offsets(tokenizer.backend, text)
    return ids, [
        any(start < last and end > first for first, last in spans) for start, end in offsets
    ]
