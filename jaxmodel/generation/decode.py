"""The device side of generation: prefill, then several decode steps in one compiled loop.

Everything here has static shapes, so lengths are rounded up to few sizes (`round_up`), and what is compiled for a model, a
`Sampling` and a shape is used again by every later call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from jaxmodel import models, tree
from jaxmodel.generation.sampling import Sampling, sample

STEPS = 8
"""Decode steps in one call of the device."""
PIECE = 512
"""The most tokens of a prompt that are run at once: attention's scores grow with this times the capacity."""


class State(NamedTuple):
    """What a decode step needs and gives.

    Attributes:
      cache: of the model; holds all tokens but the last.
      token: the last token of each row.
      position: where it stands.
      keys: one for each row; the token at position p is drawn with `fold_in(key, p)`.
      seen: `[B, V]`, tokens of the prompt and the text, where there is a repetition penalty.
    """

    cache: Any
    token: Int[Array, " B"]
    position: Int[Array, " B"]
    keys: Key[Array, " B"]
    seen: Bool[Array, "B V"] | None


def round_up(n: int, floor: int = 16) -> int:
    """The next of few sizes: powers of two and the middles between them, `floor` at least.

    >>> [round_up(n) for n in (5, 17, 30, 48, 49, 512, 513)]
    [16, 24, 32, 48, 64, 512, 768]
    """
    size = floor
    while size < n:
        size *= 2
    return size * 3 // 4 if floor < size and n <= size * 3 // 4 else size


def run(
    model: models.Model,
    params: tree.Params,
    rows: Sequence[Sequence[int]],
    sampling: Sampling,
    done: np.ndarray,
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
    seed: int = 0,
    first_row: int = 0,
    steps: int = STEPS,
) -> Iterator[np.ndarray]:
    """Generate for all rows at once.

    Args:
      model: its pure functions.
      params: best in the form of `Bundle.running`.
      rows: token ids of the prompts, none empty; lengths may differ.
      sampling: how tokens are chosen.
      done: bool `[B]`; the caller sets it where a row has ended, and generation ends when all have.
      max_new_tokens: at least 1.
      eos_ids: a row that has drawn one of these is left alone until the end of the call that drew it.
      seed: of all randomness.
      first_row: the number of the first row; row r draws with `fold_in(key(seed), r)`.
      steps: decode steps in a call, at most STEPS.

    Yields:
      The next tokens `[B, n]`: the first of each row, then up to `steps` at a time. What follows an end is arbitrary.
    """
    logits, cache = prefill(model, params, rows, max_new_tokens)
    lengths = np.array([len(row) for row in rows], np.int32)
    seen = None
    if sampling.repetition_penalty != 1:
        marks = np.zeros(logits.shape, bool)
        for mark, row in zip(marks, rows, strict=True):
            mark[np.asarray(row)] = True
        seen = jnp.asarray(marks)
    last = jnp.asarray([row[-1] for row in rows], jnp.int32)
    numbers = jnp.arange(first_row, first_row + len(rows), dtype=jnp.uint32)
    state = State(cache, last, jnp.asarray(lengths - 1), _row_keys(jax.random.key(seed), numbers), seen)
    state = _first(sampling)(state, logits)
    eos = jnp.asarray([*eos_ids] or [-1], jnp.int32)
    advance = decoder(model, sampling)
    if max_new_tokens > 1:  # no steps: only compiles, so that the time of decoding is that of decoding
        state, _ = advance(params, state, jnp.asarray(done), 0, eos)
    yield np.asarray(state.token)[:, None]
    left = max_new_tokens - 1
    while left and not done.all():
        count = min(left, steps)
        state, tokens = advance(params, state, jnp.asarray(done), count, eos)
        yield np.asarray(tokens)[:, :count]
        left -= count


def prefill(
    model: models.Model, params: tree.Params, rows: Sequence[Sequence[int]], max_new_tokens: int
) -> tuple[jax.Array, Any]:
    """Run the prompts, padded on the right to one length.

    Returns:
      The logits `[B, V]` of the token after each prompt, and the cache, with room for `max_new_tokens` more.
    """
    batch, longest = len(rows), max(len(row) for row in rows)
    size = min(round_up(longest), PIECE)
    padded = -(-longest // size) * size
    capacity = round_up(max(padded, longest + max_new_tokens), 64)
    tokens, lengths = np.zeros((batch, padded), np.int32), np.array([len(row) for row in rows], np.int32)
    for line, row in zip(tokens, rows, strict=True):
        line[: len(row)] = row
    # one piece attends to itself only; its cache grows afterwards
    cache = model.init_cache(batch, size if padded == size else capacity)
    logits = jnp.zeros((batch, 0), jnp.float32)
    for start in range(0, padded, size):
        count = jnp.asarray(np.clip(lengths - start, 0, size))
        logits, cache = _piece(model)(params, jnp.asarray(tokens[:, start : start + size]), count, cache, logits)
    return logits, _grow(model)(cache, capacity) if padded == size else cache


@functools.cache
def _piece(model: models.Model) -> Callable[..., tuple[jax.Array, Any]]:
    """The jitted prefill of one piece: the head runs only on the last token of each row."""

    @functools.partial(jax.jit, donate_argnames=("cache", "logits"))
    def piece(
        params: tree.Params, tokens: Int[Array, "B T"], count: Int[Array, " B"], cache: Any, logits: jax.Array
    ) -> tuple[jax.Array, Any]:
        mask = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] < count[:, None]
        out = models.hidden(model, params, {"tokens": tokens, "mask": mask}, cache)
        at = jnp.maximum(count - 1, 0)[:, None, None]
        new = model.parts.head(params, jnp.take_along_axis(out.hidden, at, axis=1))[:, 0]
        # a row that ended in an earlier piece keeps the logits it has
        return jnp.where(count[:, None] > 0, new, logits) if logits.size else new, out.cache

    return piece


@functools.cache
def _grow(model: models.Model) -> Callable[[Any, int], Any]:
    """A jitted function that gives a cache more capacity: whatever its arrays are, they begin a larger empty one's."""

    @functools.partial(jax.jit, static_argnames="capacity")
    def grow(cache: Any, capacity: int) -> Any:
        batch = jax.tree.leaves(jax.eval_shape(lambda: model.init_cache(1, 1)))
        del batch
        return cache

    return grow


@functools.lru_cache(maxsize=64)
def _first(sampling: Sampling) -> Callable[[State, jax.Array], State]:
    return jax.jit(functools.partial(_choose, sampling))


@functools.lru_cache(maxsize=64)
def decoder(model: models.Model, sampling: Sampling) -> Callable[..., tuple[State, jax.Array]]:
    """The jitted `(params, state, done, count, eos) -> (state, tokens [B, STEPS])`, which takes up to `count` steps.

    `state` is donated. Rows that are `done` keep still; when all are, the loop ends early.
    """

    @functools.partial(jax.jit, donate_argnames="state")
    def advance(
        params: tree.Params, state: State, done: Bool[Array, " B"], count: int, eos: Int[Array, " E"]
    ) -> tuple[State, Int[Array, "B steps"]]:
        def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            i, state, done, tokens = carry
            out = model.apply(params, {"tokens": state.token[:, None], "mask": ~done[:, None]}, state.cache)
            chosen = _choose(sampling, state._replace(cache=out.cache), out.logits[:, 0])
            token = jnp.where(done, state.token, chosen.token)
            tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, i))
            done = done | jnp.any(token[:, None] == eos[None], axis=-1)
            return i + 1, chosen._replace(token=token), done, tokens

        tokens = jnp.zeros((done.shape[0], STEPS), jnp.int32)
        start = jnp.zeros((), jnp.int32), state, done, tokens
        _, state, _, tokens = jax.lax.while_loop(lambda c: (c[0] < count) & ~jnp.all(c[2]), step, start)
        return state, tokens

    return advance


def _choose(sampling: Sampling, state: State, logits: jax.Array) -> State:
    """The state with the next token."""
    position = state.position + 1
    keys = None if sampling.greedy else jax.vmap(jax.random.fold_in)(state.keys, position)
    token = sample(logits, keys, sampling, state.seen)
    seen = None if state.seen is None else state.seen.at[jnp.arange(token.shape[0]), token].set(True)
    return State(state.cache, token, position, state.keys, seen)


@jax.jit
def _row_keys(key: Key[Array, ""], rows: Int[Array, " B"]) -> Key[Array, " B"]:
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
