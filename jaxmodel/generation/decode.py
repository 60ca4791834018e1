"""The device side of generation: prefill, then several decode steps in one compiled loop.

Everything here has static shapes: lengths are rounded up to few sizes (`round_up`), and later calls
with the same model, `SamplingParams` and shapes use the compiled program again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxmodel import models, tree
from jaxmodel.errors import InputError
from jaxmodel.generation.sampling import SamplingParams, is_sound, sample

STEPS = 16
"""Number of decode steps in one call of the device."""
UNSOUND = -1
"""The id in place of a token if the logits are NaN or infinite."""
PIECE = 512
"""Largest number of prompt tokens that are run at once.

The memory of attention scores is proportional to it, times the capacity.
"""


class State(NamedTuple):
    """The input and output of a decode step.

    Attributes:
      cache: the model's cache, with all tokens but the last.
      token: the last token of each row.
      position: the position of that token.
      keys: a key for each row; the token at position p is drawn with `fold_in(key, p)`.
      seen: `[B, V]`, the tokens in prompt and text, if there is a repetition penalty; else None.
    """

    cache: Any
    token: Int[Array, " B"]
    position: Int[Array, " B"]
    keys: Key[Array, " B"]
    seen: Bool[Array, "B V"] | None


def round_up(n: int, floor: int = 16) -> int:
    """Round up to one of few sizes: powers of two and the midpoints between them, from `floor` on.

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
    done: np.ndarray,
    *,
    sampling: SamplingParams,
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
    seed: int = 0,
    first_row: int = 0,
    steps: int = STEPS,
) -> Iterator[np.ndarray]:
    """Generate for all rows at once.

    Args:
      model: the model.
      params: its parameters, best in the form of `Bundle.running`.
      rows: token ids of the prompts, none empty; lengths may differ. For a model with a source they
        are the sources.
      done: bool `[B]`; the caller sets it for rows that have ended, and generation ends when all
        have.
      sampling: the sampling settings.
      max_new_tokens: largest number of new tokens, at least 1.
      eos_ids: a row that has drawn one of these does not change until the end of that call.
      seed: the seed of all draws.
      first_row: the index of the first row; row r draws with `fold_in(key(seed), r)`.
      steps: decode steps in a call, at most STEPS.

    Raises:
      InputError: logits that are NaN or infinite; the message names the weight or the precision
        that causes them.

    Yields:
      The next tokens `[B, n]`: the first of each row, then up to `steps` at a time. Tokens behind
      an end are arbitrary.
    """
    sources = None
    if reads_source(model):
        sources = rows
        rows = [[model.config.start]] * len(rows)
    logits, cache = prefill(model, params, rows, max_new_tokens, sources)
    lengths = np.array([len(row) for row in rows], np.int32)
    seen = None
    if sampling.repetition_penalty != 1:
        marks = np.zeros(logits.shape, bool)
        for mark, row in zip(marks, rows, strict=True):
            mark[np.asarray(row)] = True
        seen = jnp.asarray(marks)
    last = jnp.asarray([row[-1] for row in rows], jnp.int32)
    numbers = jnp.asarray(np.arange(first_row, first_row + len(rows), dtype=np.int32))
    state = State(
        None, last, jnp.asarray(lengths - 1), _row_keys(jax.random.key(seed), numbers), seen
    )
    state = _first(sampling)(state, logits)._replace(cache=cache)
    eos = jnp.asarray([*eos_ids] or [-1], jnp.int32)
    advance = decoder(model, sampling)
    # no steps: only compiles, so that the time of decoding is that of decoding
    if max_new_tokens > 1:
        state, _ = advance(params, state, jnp.array(done), 0, eos)
    first = np.array(state.token)[:, None]  # a copy: the buffer is donated
    _check(first, params)
    yield first
    left = max_new_tokens - 1
    while left and not done.all():
        count = min(left, steps)
        state, tokens = advance(params, state, jnp.array(done), count, eos)
        found = np.asarray(tokens)[:, :count]
        _check(found, params)
        yield found
        left -= count


def _check(tokens: np.ndarray, params: tree.Params) -> None:
    if tokens.min(initial=0) == UNSOUND:
        raise unsound(params)


def unsound(params: tree.Params) -> InputError:
    """Make the error for logits that are NaN or infinite, with its cause; callers raise it.

    Args:
      params: the weights of the model, which are searched for numbers that are not finite.
    """
    for path, leaf in tree.flatten(params).items():
        for part in jax.tree.leaves(leaf):
            if jnp.issubdtype(part.dtype, jnp.floating) and (
                bad := int(jnp.sum(~jnp.isfinite(part)))
            ):
                return InputError(
                    f"params: {path!r} has {bad} values that are NaN or infinite, so the logits "
                    "are not finite; the file is damaged, or was converted to a dtype that is too "
                    "small"
                )
    return InputError(
        "model: the logits are NaN or infinite though all weights are finite: the activations "
        "overflow; compute in float32 "
        "(dtype='float32')"
    )


def reads_source(model: models.Model) -> bool:
    """Return whether a model reads a source and writes a target that begins with `config.start`."""
    return "source" in model.inputs(1, 1)


def padded(rows: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Pad rows on the right to int32 `[B, length]`; also return where they hold a token."""
    tokens = np.zeros((len(rows), length), np.int32)
    lengths = np.array([len(row) for row in rows], np.int32)
    for line, row in zip(tokens, rows, strict=True):
        line[: len(row)] = row
    return tokens, np.arange(length) < lengths[:, None]


def prefill(
    model: models.Model,
    params: tree.Params,
    rows: Sequence[Sequence[int]],
    max_new_tokens: int,
    sources: Sequence[Sequence[int]] | None = None,
) -> tuple[jax.Array, Any]:
    """Run the prompts, padded on the right to one length, and the sources if there are any.

    Returns:
      The logits `[B, V]` of the token after each prompt, and the cache, with room for
      `max_new_tokens` more.
    """
    models.check_params(model, params)
    batch = len(rows)
    longest = max(len(row) for row in rows)
    tail = (longest - 1) % PIECE + 1  # tokens in the last piece
    whole = longest - tail + round_up(tail)
    capacity = round_up(max(whole, longest + max_new_tokens), 64)
    tokens, mask = padded(rows, whole)
    lengths = mask.sum(axis=1)
    source = {}
    if sources is not None:
        given = padded(sources, round_up(max(len(row) for row in sources)))
        source = dict(zip(("source", "source_mask"), map(jnp.asarray, given), strict=True))
    # a single piece attends to itself only; its cache grows afterwards, if it holds nothing but
    # these tokens
    single = longest <= PIECE and sources is None
    logits = None
    cache = new_cache(model, batch, whole if single else capacity)
    for start in range(0, longest, PIECE):
        piece = jnp.asarray(tokens[:, start : start + PIECE])
        count = jnp.asarray(np.clip(lengths - start, 0, piece.shape[1]), jnp.int32)
        new, cache = _piece(model)(params, piece, count, cache, {} if start else source)
        # a row that ended in an earlier piece keeps the logits it has
        logits = new if logits is None else jnp.where(count[:, None] > 0, new, logits)
    assert logits is not None
    return logits, _grow(model)(cache, batch, capacity) if single else cache


def new_cache(model: models.Model, batch: int, capacity: int) -> Any:
    """Return an empty cache.

    Raises:
      InputError: the model has none, so it does not write text.
    """
    if model.init_cache is None:
        raise InputError(
            f"model: the family {model.family!r} cannot decode; allowed: a model with a cache"
        )
    return model.init_cache(batch, capacity)


@functools.cache
def _piece(model: models.Model) -> Callable[..., tuple[jax.Array, Any]]:
    """Return the jitted prefill of a piece; its head runs only on the last token of each row."""

    @functools.partial(jax.jit, donate_argnames="cache")
    def piece(
        params: tree.Params,
        tokens: Int[Array, "B T"],
        count: Int[Array, " B"],
        cache: Any,
        source: dict[str, jax.Array],
    ) -> tuple[Float[Array, "B V"], Any]:
        mask = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] < count[:, None]
        out = model.hidden(params, {"tokens": tokens, "mask": mask, **source}, cache)
        last = jnp.take_along_axis(out.hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)
        return model.parts.head(params, last)[:, 0], out.cache

    return piece


@functools.cache
def _grow(model: models.Model) -> Callable[[Any, int, int], Any]:
    """Return the jitted `(cache, batch, capacity) -> cache`, which makes a cache larger."""

    def begin(whole: jax.Array, part: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(whole, part, (0,) * whole.ndim)

    @functools.partial(jax.jit, static_argnames=("batch", "capacity"))
    def grow(cache: Any, batch: int, capacity: int) -> Any:
        return jax.tree.map(begin, new_cache(model, batch, capacity), cache)

    return grow


@functools.lru_cache(maxsize=64)
def _first(sampling: SamplingParams) -> Callable[[State, jax.Array], State]:
    return jax.jit(functools.partial(_choose, sampling))


@functools.lru_cache(maxsize=64)
def decoder(
    model: models.Model, sampling: SamplingParams
) -> Callable[..., tuple[State, jax.Array]]:
    """Return the jitted `(params, state, done, count, eos) -> (state, tokens [B, STEPS])`.

    It takes up to `count` steps. `state` is donated. Rows that are `done` do not change, and the
    loop ends early when all are.
    """

    @functools.partial(jax.jit, donate_argnames="state")
    def advance(
        params: tree.Params,
        state: State,
        done: Bool[Array, " B"],
        count: Int[Array, ""] | int,
        eos: Int[Array, " E"],
    ) -> tuple[State, Int[Array, "B steps"]]:
        def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            i, state, done, tokens = carry
            out = model.apply(
                params, {"tokens": state.token[:, None], "mask": ~done[:, None]}, state.cache
            )
            chosen = _choose(sampling, state._replace(cache=out.cache), out.logits[:, 0])
            token = jnp.where(done, state.token, chosen.token)
            tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, i))
            done = done | jnp.any(token[:, None] == eos[None], axis=-1)
            return i + 1, chosen._replace(token=token), done, tokens

        tokens = jnp.zeros((done.shape[0], STEPS), jnp.int32)
        start = jnp.zeros((), jnp.int32), state, done, tokens
        _, state, _, tokens = jax.lax.while_loop(
            lambda c: (c[0] < count) & ~jnp.all(c[2]), step, start
        )
        return state, tokens

    return advance


def _choose(sampling: SamplingParams, state: State, logits: jax.Array) -> State:
    """Return the state with the next token."""
    position = state.position + 1
    keys = None if sampling.greedy else jax.vmap(jax.random.fold_in)(state.keys, position)
    token = jnp.where(is_sound(logits), sample(logits, keys, sampling, state.seen), UNSOUND)
    seen = (
        None if state.seen is None else state.seen.at[jnp.arange(token.shape[0]), token].set(True)
    )
    return State(state.cache, token, position, state.keys, seen)


@jax.jit
def _row_keys(key: Key[Array, ""], rows: Int[Array, " B"]) -> Key[Array, " B"]:
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
