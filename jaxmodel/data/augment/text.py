"""Augmentations of texts: tokens dropped, spans masked or removed, order shuffled.

Nothing moves from one segment to another. A text is `tokens` `[B, T]`. `segments` `[B, T]` separate
the texts of a row and are 0 on padding (see `Stream`). Without them, `mask` `[B, T]` is true where
there is text; without both, each row is one text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmodel.data.augment.base import (
    AnyKey,
    Augmentation,
    field_of,
    row_keys,
    row_weights,
    uniforms,
)
from jaxmodel.errors import InputError
from jaxmodel.schema import Count, Index, Range, Share


@dataclass(frozen=True)
class TokenDropout(Augmentation):
    """Replacement of each token by `token` with probability `rate`; targets do not change.

    Attributes:
      token: the id of the unknown token.
      rate: probability, 0 to 1.
    """

    token: Index
    rate: Share = 0.1

    def __call__(self, key: AnyKey, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Replace tokens of the batch."""
        tokens, segments = texts(batch)
        drop = (uniforms(row_keys(key, len(tokens)), tokens.shape[1]) < self.rate) & (segments > 0)
        return {**batch, "tokens": jnp.where(drop, jnp.asarray(self.token, tokens.dtype), tokens)}


@dataclass(frozen=True)
class SpanMasking(Augmentation):
    """Masked language modelling: a share `rate` of the tokens, in spans, is to be predicted.

    Of these tokens 80 % become `token`, 10 % a token drawn uniformly from the vocabulary, and 10 %
    stay (Devlin et al., 2019; spans: Joshi et al., 2020). The lengths of spans are geometric: a
    span continues with probability `1 - 1 / span` and begins with `rate / (span (1 - rate))`, so
    that `rate` holds at every position. Where a token is to be predicted, `targets` becomes the
    token and `weights` the weight of the row (see `row_weights`); elsewhere both are 0.

    Attributes:
      token: the id of the mask.
      vocab: drawn ids are below this one.
      rate: share of the tokens, below 1.
      span: mean length of a span; 0 for the smallest possible, `1 / (1 - rate)`, with which tokens
        are drawn independently.
      lowest: the lowest id to draw, above special ones.
    """

    token: Index
    vocab: Count
    rate: Annotated[float, Range(0, 0.99)] = 0.15
    span: Annotated[float, Range(0, 1e4)] = 0.0
    lowest: Index = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lowest >= self.vocab:
            self.refuse("lowest", f"0 to {self.vocab - 1}, below vocab")
        if self.span and self.span < 1 / (1 - self.rate):
            self.refuse("span", f"0, or at least 1 / (1 - rate) = {1 / (1 - self.rate):.4g}")

    def __call__(self, key: AnyKey, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Mask tokens of the batch, and set its targets and weights."""
        tokens, segments = texts(batch)
        drawn = uniforms(row_keys(key, len(tokens)), 3, tokens.shape[1])
        masked = self.spans(drawn[:, 0], segments)
        other = self.lowest + jnp.floor(drawn[:, 2] * (self.vocab - self.lowest)).astype(
            tokens.dtype
        )
        other = jnp.minimum(other, jnp.asarray(self.vocab - 1, tokens.dtype))
        shown = jnp.where(
            drawn[:, 1] < 0.8,
            jnp.asarray(self.token, tokens.dtype),
            jnp.where(drawn[:, 1] < 0.9, other, tokens),
        )
        return {
            **batch,
            "tokens": jnp.where(masked, shown, tokens),
            "targets": jnp.where(masked, tokens, jnp.zeros((), tokens.dtype)),
            "weights": masked.astype(jnp.float32) * row_weights(batch, len(tokens))[:, None],
        }

    def spans(self, drawn: Float[Array, "B T"], segments: Int[Array, "B T"]) -> Bool[Array, "B T"]:
        """Return which tokens are masked, by a Markov chain along each segment.

        One number u moves both states: below `begin` the next token is masked, from `go_on` on it
        is not, and between them the state stays. So the last position that decided counts, which is
        a running maximum and needs no loop.
        """
        length = self.span or 1 / (1 - self.rate)
        go_on = 1 - 1 / length
        begin = self.rate / (length * (1 - self.rate))
        first = _first(segments)
        value = drawn < jnp.where(first, self.rate, begin)
        decides = first | value | (drawn >= go_on)
        place = jnp.arange(segments.shape[1], dtype=jnp.int32)[None]
        last = jax.lax.cummax(jnp.where(decides, 2 * place + value.astype(jnp.int32), -1), axis=1)
        return (last % 2 == 1) & (segments > 0)


@dataclass(frozen=True)
class SpanCorruption(Augmentation):
    """Span corruption: a decoder writes the spans that were removed from a text.

    Source: Raffel et al., 2020.

    Of n tokens `round(rate n)` are removed, in `round(rate n / span)` spans (at least one of each,
    if there are two tokens). All lengths of spans are equally likely, and so are all positions that
    leave a token between two spans. `source` has one id in place of each span: `first`,
    `first - 1`, ... `targets` has each of these ids followed by its span. Both end with `end`. A
    row is one text here: segments only mark padding.

    It adds `source` and `source_mask` `[B, S]` to the batch, and replaces `tokens` (`start`, then
    the targets), `targets` and `weights` `[B, U]`. S and U are the lengths that a row without
    padding needs. `segments`, `positions` and `mask` are dropped.

    Attributes:
      first: the id for the first span; the next ones are lower.
      rate: share of the tokens, above 0 and below 1.
      span: mean length of a span.
      end: the id at the end of source and targets.
      start: the id with which the decoder begins, also used for padding.
    """

    first: Count
    rate: Annotated[float, Range(0.001, 0.9)] = 0.15
    span: Annotated[float, Range(1, 1e4)] = 3.0
    end: Index = 1
    start: Index = 0

    def __call__(self, key: AnyKey, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Make source and targets from the tokens of the batch."""
        tokens, segments = texts(batch)
        count, taken, spans = self._lengths(tokens.shape[1])
        pieces = int(np.max(spans))
        least = max(self.end, self.start) + pieces
        if self.first < least:
            self.refuse(
                "first", f"at least {least}, for {pieces} spans in {tokens.shape[1]} tokens"
            )
        source_length, target_length = (
            int(np.max(n)) + 1 for n in (count - taken + spans, taken + spans)
        )
        real = segments > 0
        n = jnp.sum(real, axis=1, dtype=jnp.int32)
        drawn = uniforms(row_keys(key, len(tokens)), 2, tokens.shape[1] + 2)
        taken, spans = (jnp.asarray(a, jnp.int32)[n] for a in (taken, spans))
        # Each span takes one of the gaps before, between and behind the remaining tokens, so the
        # gaps are drawn as pieces too.
        kept_before = jnp.cumsum(_pieces(drawn[:, 0], n - taken + 2, spans + 1, pieces), axis=1) - 1
        span_sizes = _pieces(drawn[:, 1], taken, spans, pieces)
        starts = kept_before + jnp.cumsum(span_sizes, axis=1) - span_sizes
        place = (jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1)[:, :, None]
        begins = real & jnp.any((place == starts[:, None]) & (span_sizes > 0)[:, None], axis=2)
        goes = real & jnp.any(
            (place >= starts[:, None]) & (place < (starts + span_sizes)[:, None]), axis=2
        )
        number = jnp.cumsum(begins, axis=1, dtype=jnp.int32) - 1
        stands = (self.first - number).astype(tokens.dtype)

        stays = begins | (real & ~goes)
        at = jnp.cumsum(stays, axis=1, dtype=jnp.int32) - 1
        source = self._written(
            source_length, (stays, at, jnp.where(begins, stands, tokens)), n, n - taken + spans
        )
        at = jnp.cumsum(goes, axis=1, dtype=jnp.int32) + number
        targets = self._written(
            target_length, (goes, at, tokens), n, taken + spans, (begins, at - 1, stands)
        )
        ends = lambda length, stop: (
            (jnp.arange(length, dtype=jnp.int32)[None] <= stop[:, None]) & (n > 0)[:, None]
        )
        weights = ends(target_length, taken + spans)
        moved = jnp.pad(targets, ((0, 0), (1, 0)), constant_values=self.start)[:, :-1]
        return {
            **{
                name: a
                for name, a in batch.items()
                if name not in ("segments", "positions", "mask")
            },
            "source": source,
            "source_mask": ends(source_length, n - taken + spans),
            "tokens": jnp.where(weights, moved, jnp.asarray(self.start, tokens.dtype)),
            "targets": targets,
            "weights": weights.astype(jnp.float32) * row_weights(batch, len(tokens))[:, None],
        }

    def _lengths(self, longest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return texts of 0 to `longest` tokens with the numbers of removed tokens and of spans."""
        count = np.arange(longest + 1)
        taken = np.where(
            count > 1, np.clip(np.round(count * self.rate), 1, np.maximum(count - 1, 1)), 0
        ).astype(np.int32)
        spans = np.clip(
            np.round(taken / self.span), np.minimum(taken, 1), np.minimum(taken, count - taken)
        )
        return count, taken, spans.astype(np.int32)

    def _written(
        self,
        length: int,
        entries: tuple[Array, Array, Array],
        n: Int[Array, "B"],
        stop: Int[Array, "B"],
        *more: tuple,
    ) -> Int[Array, "B length"]:
        """Write rows of `length`: the values of each (which, places, values) at their places.

        `end` is written at `stop`.
        """
        rows = jnp.full((len(n), length), self.start, entries[2].dtype)
        write = jax.vmap(lambda row, at, value: row.at[at].set(value, mode="drop"))
        for which, at, value in (entries, *more):
            rows = write(rows, jnp.where(which, at, length), value)
        return write(
            rows,
            jnp.where(n > 0, stop, length)[:, None],
            jnp.full((len(n), 1), self.end, rows.dtype),
        )


@dataclass(frozen=True)
class LocalShuffle(Augmentation):
    """A shuffle that moves no token by more than `window` positions (Lample et al., 2018).

    Position i is sorted by `i + u` with u from 0 to `window + 1`, within its segment. Targets,
    weights and positions do not move, as a denoiser needs.

    Attributes:
      window: the largest distance; 0 changes nothing.
    """

    window: Index = 3

    def __call__(self, key: AnyKey, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Shuffle the tokens of the batch."""
        tokens, segments = texts(batch)
        place = jnp.arange(tokens.shape[1], dtype=jnp.float32)[None]
        way = jnp.where(
            segments > 0,
            uniforms(row_keys(key, len(tokens)), tokens.shape[1]) * (self.window + 1),
            0.0,
        )
        return {**batch, "tokens": _sorted(tokens, _runs(segments), place + way)}


@dataclass(frozen=True)
class SentenceShuffle(Augmentation):
    """A shuffle of the sentences of each segment (Lewis et al., 2020).

    Targets, weights and positions do not move.

    Attributes:
      stop: the id that ends a sentence; the rest behind the last one is a sentence too.
    """

    stop: Index

    def __call__(self, key: AnyKey, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Shuffle the sentences of the batch."""
        tokens, segments = texts(batch)
        behind = jnp.pad(tokens == self.stop, ((0, 0), (1, 0)))[:, :-1]
        sentence = (
            jnp.cumsum(_first(segments) | (behind & (segments > 0)), axis=1, dtype=jnp.int32) - 1
        )
        drawn = uniforms(row_keys(key, len(tokens)), tokens.shape[1])
        order = jnp.take_along_axis(drawn, sentence, axis=1)
        return {**batch, "tokens": _sorted(tokens, _runs(segments), order, sentence)}


def texts(batch: Mapping[str, Any]) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Return the tokens and segments of a batch; segments are 0 on padding.

    Raises:
      InputError: there are no tokens, they are not integers `[B, T]`, or segments or mask have
        another shape.
    """
    tokens = field_of(batch, "tokens", "[B, T]")
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise InputError(
            f"batch: tokens are {tokens.dtype} {tokens.shape}; allowed: integers [B, T]"
        )
    name = next((name for name in ("segments", "mask") if name in batch), None)
    if name is None:
        return tokens, jnp.ones(tokens.shape, jnp.int32)
    segments = jnp.asarray(batch[name])
    if segments.shape != tokens.shape:
        raise InputError(
            f"batch: {name} are {segments.shape}; allowed: {tokens.shape}, the shape of the tokens"
        )
    return tokens, segments.astype(jnp.int32)


def _first(segments: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Mark the positions at which a segment begins."""
    return jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)


def _runs(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Return the index of each segment in its row; padding counts as one."""
    return jnp.cumsum(_first(segments), axis=1, dtype=jnp.int32)


def _sorted(tokens: Int[Array, "B T"], *order: Array) -> Int[Array, "B T"]:
    """Sort the tokens of each row by the keys in `order`, the first one first."""
    return jax.lax.sort((*order, tokens), dimension=1, is_stable=True, num_keys=len(order))[-1]


def _pieces(
    drawn: Float[Array, "B T"], items: Int[Array, "B"], pieces: Int[Array, "B"], most: int
) -> Int[Array, "B most"]:
    """Divide `items` into `pieces` non-empty pieces, all ways equally likely.

    Return the sizes of the first `most`, then 0.
    """
    place = jnp.arange(drawn.shape[1], dtype=jnp.int32)[None]
    free = (place > 0) & (place < items[:, None])
    rank = jnp.argsort(jnp.argsort(jnp.where(free, drawn, 2.0), axis=1), axis=1).astype(jnp.int32)
    piece = jnp.cumsum(free & (rank < pieces[:, None] - 1), axis=1, dtype=jnp.int32)
    exists = (place < items[:, None]) & (pieces > 0)[:, None]
    number = jnp.arange(most, dtype=jnp.int32)[None, None]
    return jnp.sum((piece[:, :, None] == number) & exists[:, :, None], axis=1, dtype=jnp.int32)
