"""Text from prompts: `generate`, `stream`, and `generate_ids` with all details of each text."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxmodel.brief import briefly
from jaxmodel.errors import InputError, at_least
from jaxmodel.generation import decode
from jaxmodel.generation.sampling import GREEDY, SamplingParams
from jaxmodel.generation.text import Writer
from jaxmodel.hub.bundle import Bundle, need_processor
from jaxmodel.hub.pretrained import from_pretrained
from jaxmodel.progress import Job, bar

type Source = Bundle | str | Path


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
    """The settings of a generation, besides the prompts.

    Attributes:
      sampling: the sampling settings; greedy by default.
      max_new_tokens: the largest number of tokens to add.
      stop: a text ends before the first of these strings; also a single string.
      seed: 0 to 2^32 - 1; same seed, same text.
      special: add the tokenizer's special tokens (a begin-of-text id) to a prompt. False for
        prompts from a chat template, which have them already.

    Raises:
      InputError: a value out of its range.
    """

    sampling: SamplingParams = GREEDY
    max_new_tokens: int = 64
    stop: str | Sequence[str] = ()
    seed: int = 0
    special: bool = True

    def __post_init__(self) -> None:
        at_least("max_new_tokens", self.max_new_tokens)
        if (
            isinstance(self.seed, bool)
            or not isinstance(self.seed, int)
            or not 0 <= self.seed < 2**32
        ):
            raise InputError(f"seed: {self.seed!r}; allowed: a whole number from 0 to {2**32 - 1}")
        object.__setattr__(
            self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        )
        for item in self.stop:
            if not isinstance(item, str) or not item:
                raise InputError(f"stop: {item!r}; allowed: strings of one character or more")


@briefly
@dataclasses.dataclass(frozen=True)
class GenerationResult:
    """One generated text.

    Attributes:
      text: the text behind the prompt, with the space between them, up to the stop string.
      ids: its tokens, without the end token and with those of the stop string.
      finish_reason: "eos" (the model ended it), "stop" (a stop string came) or "length"
        (max_new_tokens).
      tokens_per_second: speed of this row after its first token; 0 if there is only one.
      prefill_seconds: time from the prompts of its batch to their first tokens; for a new shape it
        includes compilation.
    """

    text: str
    ids: list[int]
    finish_reason: str
    tokens_per_second: float
    prefill_seconds: float


def generate[T: (str, list[str])](
    source: Source,
    prompts: T,
    *,
    max_new_tokens: int = 64,
    temperature: float | int = 0.0,
    top_k: int = 0,
    top_p: float | int = 1.0,
    min_p: float | int = 0.0,
    repetition_penalty: float | int = 1.0,
    stop: str | Sequence[str] = (),
    seed: int = 0,
    special: bool = True,
    chunk: int = 16,
) -> T:
    """Continue a prompt, or each of several.

    Args:
      source: a bundle, or a source for `from_pretrained`, which is then loaded in each call.
      prompts: one text or several, of any lengths.
      max_new_tokens: the largest number of tokens to add.
      temperature: 0, the default, is greedy; see `SamplingParams` for this and the next four.
      top_k: sample from the k best tokens.
      top_p: sample from the best tokens that together have this probability.
      min_p: sample from tokens of at least this share of the best one's probability.
      repetition_penalty: values above 1 make earlier tokens less likely, also if greedy.
      stop: a text ends before the first of these strings.
      seed: same seed, same text. Row r of `prompts` draws the token at position p with
        `fold_in(fold_in(key(seed), r), p)`, whatever the other rows are.
      special: False for prompts from a chat template, which have their special tokens already.
      chunk: number of rows that run together; it limits the memory of the cache and does not change
        the draws.

    Returns:
      The new text, or a list of them.

    Raises:
      InputError: an empty prompt, one too long for the model's context, a bundle without a
        tokenizer, a value out of range.
    """
    sampling = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty)
    request = GenerationRequest(sampling, max_new_tokens, stop, seed, special)
    if isinstance(prompts, str):
        return generate_ids(source, [prompts], request, chunk=chunk)[0].text
    return [completion.text for completion in generate_ids(source, prompts, request, chunk=chunk)]


def generate_ids(
    source: Source,
    prompts: Sequence[str],
    request: GenerationRequest = GenerationRequest(),
    *,
    chunk: int = 16,
    show: Callable[[str], None] | None = None,
) -> list[GenerationResult]:
    """Generate as `generate` does, and return ids, the reason for each end, and speed.

    For `source`, `chunk`, draws and errors see `generate`. `show`, for a single prompt, is called
    with each piece of text as its tokens come, in place of a progress bar.
    """
    if show is not None and len(prompts) != 1:
        raise InputError(f"show: given with {len(prompts)} prompts; allowed: one")
    if isinstance(prompts, str):
        raise InputError(
            f"prompts: a single string was given ({prompts!r:.40}); give a list of strings"
        )
    at_least("chunk", chunk)
    rows, run, new_writer = _begin(source, prompts, request)
    completions = []
    total = len(rows) * request.max_new_tokens if show is None else 0
    shown = bar(total, "generating", unit="token", first="compiling")
    with shown if total else contextlib.nullcontext() as job:
        for first in range(0, len(rows), chunk):
            part = rows[first : first + chunk]
            writers = [new_writer(row) for row in part]
            if show is not None:
                run = functools.partial(run, steps=1)
            completions += _completed(
                functools.partial(run, part, first_row=first), writers, job, show
            )
    return completions


def _completed(
    run: Callable[[np.ndarray], Iterator[np.ndarray]],
    writers: list[Writer],
    job: Job | None,
    show: Callable[[str], None] | None,
) -> list[GenerationResult]:
    """Generate the rows of a chunk, and measure their speed.

    Args:
      run: (which rows are done) -> the next tokens of all rows, piece by piece.
      writers: the writer of each row.
      job: the progress to report to, or None.
      show: see `generate_ids`.
    """
    seconds = np.zeros(len(writers))
    done = np.zeros(len(writers), bool)
    start = time.perf_counter()
    prefill = None
    for tokens in run(done):
        if prefill is None:
            prefill = time.perf_counter() - start
            start = time.perf_counter()
        for writer, line in zip(writers, tokens.tolist(), strict=True):
            writer.write(line)
        if job is not None:
            job.advance(int(np.sum(~done)) * tokens.shape[1])
        if show is not None and (piece := writers[0].read()):
            show(piece)
        seconds[~done] = time.perf_counter() - start
        done[:] = [writer.finish_reason is not None for writer in writers]
    results = []
    for writer, spent in zip(writers, seconds.tolist(), strict=True):
        # the first came with the prefill
        drawn = len(writer.ids) + (writer.finish_reason == "eos") - 1
        speed = drawn / spent if drawn > 0 else 0.0
        reason = writer.finish_reason or "length"
        results.append(GenerationResult(writer.text, writer.ids, reason, speed, prefill or 0.0))
    return results


def stream(
    source: Source, prompt: str, request: GenerationRequest = GenerationRequest()
) -> Iterator[str]:
    """Yield the text for one prompt piece by piece, as its tokens come.

    A piece is never half a character or part of a stop string. Together they are the text of
    `generate_ids` for the same request. Its errors are raised here at once. You may stop iterating
    at any time.
    """
    rows, run, new_writer = _begin(source, [prompt], request)
    writer = new_writer(rows[0])
    done = np.zeros(1, bool)

    def pieces() -> Iterator[str]:
        for tokens in run(rows, done, steps=1):
            writer.write(tokens[0].tolist())
            done[:] = writer.finish_reason is not None
            if piece := writer.read():
                yield piece

    return pieces()


def for_inference(bundle: Bundle) -> Bundle:
    """Return the bundle with only the form of its params that runs, all that a server holds."""
    return dataclasses.replace(bundle, params=bundle.for_inference())


def _begin(
    source: Source, prompts: Sequence[str], request: GenerationRequest
) -> tuple[list[list[int]], Callable[..., Iterator[np.ndarray]], Callable[[list[int]], Writer]]:
    """Return the ids of the prompts, `decode.run` without its rows, and a maker of row writers.

    Raises:
      InputError: see `generate`.
    """
    _check_texts(prompts)
    bundle = source if isinstance(source, Bundle) else for_inference(from_pretrained(source))
    tokenizer = need_processor(bundle)
    rows = encode(bundle, prompts, request)
    run = functools.partial(
        decode.run,
        bundle.model,
        bundle.for_inference(),
        sampling=request.sampling,
        max_new_tokens=request.max_new_tokens,
        eos_ids=tokenizer.eos_ids,
        seed=request.seed,
    )
    apart = decode.reads_source(bundle.model)  # then the text does not continue the prompt
    new_writer = lambda row: Writer(
        tokenizer, request.max_new_tokens, request.stop, () if apart else row
    )
    return rows, run, new_writer


def encode(bundle: Bundle, prompts: Sequence[str], request: GenerationRequest) -> list[list[int]]:
    """Return the ids of the prompts, after checking that they fit the model with the new tokens.

    Raises:
      InputError: see `generate`.
    """
    _check_texts(prompts)
    tokenizer = need_processor(bundle)
    config = bundle.model.config
    apart = decode.reads_source(bundle.model)  # then new tokens are in a row of their own
    bare = tokenizer.encode_batch(prompts)
    rows = tokenizer.encode_batch(prompts, special=True) if request.special else bare
    for i, row in enumerate(rows):
        name = _name(prompts, i)
        if not bare[i]:
            raise InputError(
                f"{name}: {prompts[i]!r:.40} has no tokens; allowed: a text of one token or more"
            )
        if len(row) >= config.context and not (apart and getattr(config, "any_length", False)):
            raise InputError(
                f"{name}: {len(row)} tokens; allowed: fewer than the model's context of "
                f"{config.context}"
            )
        if len(row) + request.max_new_tokens > config.context and not apart:
            raise InputError(
                f"max_new_tokens: {request.max_new_tokens}; allowed: at most "
                f"{config.context - len(row)}, because the model's "
                f"context is {config.context} and {name} has {len(row)} tokens"
            )
        if images := set(bundle.card.get("image_tokens", ())).intersection(row):
            raise InputError(
                f"{name}: contains the image token (id {min(images)}), but this model has the text "
                "part alone"
            )
        if max(row) >= config.vocab:
            raise InputError(
                f"{name}: the tokenizer gives id {max(row)}; the model knows 0 to "
                f"{config.vocab - 1}"
            )
    return rows


def _check_texts(prompts: Sequence[str]) -> None:
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt:
            raise InputError(
                f"{_name(prompts, i)}: {prompt!r}; allowed: a text of one token or more"
            )


def _name(prompts: Sequence[str], i: int) -> str:
    return "prompt" if len(prompts) == 1 else f"prompts[{i}]"
