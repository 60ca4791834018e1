"""Texts from a bundle by beam search."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxmodel.brief import briefly
from jaxmodel.errors import InputError, at_least
from jaxmodel.generation.beam import beam_search
from jaxmodel.generation.decode import padded, reads_source, round_up
from jaxmodel.generation.generate import GenerationRequest, encode, for_inference
from jaxmodel.hub.bundle import Bundle, need_processor
from jaxmodel.hub.pretrained import from_pretrained
from jaxmodel.hub.tokenizer import Tokenizer, stream_decoder
from jaxmodel.progress import progress


@briefly
@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """One text that a beam search found.

    Attributes:
      text: the text behind the prompt, with the space between them.
      ids: its tokens, without the end token.
      score: see `beam_search`.
      finish_reason: "eos" (the model ended it) or "length" (max_new_tokens).
    """

    text: str
    ids: list[int]
    score: float
    finish_reason: str


def beam_texts(
    source: Bundle | str | Path,
    prompts: Sequence[str],
    *,
    beams: int = 4,
    max_new_tokens: int = 64,
    length_penalty: float | int = 0.0,
    patient: bool = False,
    special: bool = True,
    chunk: int = 4,
) -> list[list[Hypothesis]]:
    """Search for the most probable texts after each prompt, or for each source of such a model.

    Args:
      source: a bundle, or a source for `from_pretrained`, which is then loaded in each call.
      prompts: texts, of any lengths.
      beams: see `beam_search`, also for the next three.
      max_new_tokens: the largest length of a text.
      length_penalty: exponent of the length in the scores.
      patient: continue until no beam can win.
      special: add the tokenizer's special tokens to a prompt.
      chunk: number of prompts that run together; it limits the memory of the cache and does not
        change the texts.

    Returns:
      At most `beams` texts for each prompt, the best first.

    Raises:
      InputError: as for `generate` and `beam_search`.
    """
    if isinstance(prompts, str):
        raise InputError(
            f"prompts: a single string was given ({prompts!r:.40}); give a list of strings"
        )
    at_least("chunk", chunk)
    bundle = source if isinstance(source, Bundle) else for_inference(from_pretrained(source))
    tokenizer = need_processor(bundle)
    apart = reads_source(bundle.model)
    rows = encode(
        bundle, prompts, GenerationRequest(max_new_tokens=max_new_tokens, special=special)
    )
    out = []
    names = ("source", "source_mask") if apart else ("tokens", "mask")
    for first in progress(range(0, len(rows), chunk), "beam search"):
        part = rows[first : first + chunk]
        given = map(jnp.asarray, padded(part, round_up(max(len(row) for row in part))))
        found = beam_search(
            bundle.model,
            bundle.for_inference(),
            dict(zip(names, given, strict=True)),
            beams=beams,
            max_new_tokens=max_new_tokens,
            eos_ids=tokenizer.eos_ids,
            length_penalty=length_penalty,
            patient=patient,
        )
        for prompt, *beam in zip(part, *(np.asarray(a).tolist() for a in found), strict=True):
            before = () if apart else prompt
            out.append(
                [
                    _hypothesis(tokenizer, before, ids[:length], score)
                    for ids, score, length in zip(*beam, strict=True)
                    if math.isfinite(score)
                ]
            )
    return out


def _hypothesis(
    tokenizer: Tokenizer, before: Sequence[int], ids: list[int], score: float
) -> Hypothesis:
    """Return a text of a beam, without the id that ends it."""
    ended = ids[-1] in tokenizer.eos_ids
    ids = ids[: len(ids) - ended]
    push = stream_decoder(tokenizer, after=before)
    text = "".join(map(push, [*ids, None]))
    return Hypothesis(text, ids, score, "eos" if ended else "length")
