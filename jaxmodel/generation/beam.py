"""Beam search for the most probable texts, for any model with a cache.

A beam is an unfinished text. At each step, all tokens after all beams of a row are candidates.
Those among the best `beams` that end (with an end token, or at the largest length) become
hypotheses, and the best of the others are the next beams. A row is done when it has as many
hypotheses as beams ("first come, first served" in Kasai et al., 2022), or, with `patient`, when no
beam can still beat the worst of its hypotheses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import core
from jaxtyping import Array, Bool, Float, Int

from jaxmodel import models, tree
from jaxmodel.errors import FROM_ZERO, InputError, at_least, within
from jaxmodel.generation.decode import new_cache, unsound
from jaxmodel.generation.sampling import is_sound
from jaxmodel.models.checks import check_ids
from jaxmodel.models.model import Inputs, unpadded


class Beams(NamedTuple):
    """The hypotheses of each row, the best first.

    Attributes:
      tokens: int32 `[B, K, N]`, without the prompt. An end token is part of the text; ignore what
        is behind it.
      scores: `[B, K]`, the log probability divided by the length penalty; -inf for a missing
        hypothesis.
      lengths: int32 `[B, K]`, the number of tokens of each text, with its end token.
    """

    tokens: Int[Array, "B K N"]
    scores: Float[Array, "B K"]
    lengths: Int[Array, "B K"]


class _State(NamedTuple):
    step: Int[Array, ""]  # tokens chosen so far
    cache: Any  # of B * K rows
    live: Beams  # the beams; scores are log probabilities, lengths the beams that they come from
    done: Beams  # the hypotheses
    over: Bool[Array, " B"]
    sound: Bool[Array, " B"]  # whether all logits that a row has seen are numbers


class _Plan(NamedTuple):
    beams: int
    steps: int
    ends: tuple[int, ...]
    penalty: float
    patient: bool


def beam_search(
    model: models.Model,
    params: tree.Params,
    inputs: Inputs,
    *,
    beams: int = 4,
    max_new_tokens: int = 64,
    eos_ids: Sequence[int] = (),
    length_penalty: float | int = 0.0,
    patient: bool = False,
) -> Beams:
    """Search for the texts with the highest scores.

    The score is `log p(text) / ((5 + length) / 6)^length_penalty`. One program is compiled for each
    model, set of options and shape of the inputs.

    Args:
      model: a decoder, or an encoder with a decoder.
      params: its parameters, best in the form of `Bundle.running`.
      inputs: inputs of `model.apply`: `tokens` `[B, T]` (prompts, or the start of the targets; with
        only a source it is `config.start`), `mask` if lengths differ (padding on the right), and
        `source` with `source_mask`.
      beams: number of beams K; 1 is greedy.
      max_new_tokens: largest length N of a text.
      eos_ids: ids that end a text.
      length_penalty: finite and at least 0; 0 prefers short texts, larger values do so less (Wu et
        al., 2016).
      patient: continue until no beam can win, instead of until there are K hypotheses.

    Returns:
      See `Beams`.

    Raises:
      InputError: a model without a cache, a value out of its range, a text beyond the context, ids
        outside of the vocabulary, or logits that are NaN or infinite.

    >>> from jaxmodel.models import gpt2
    >>> model = gpt2.model(gpt2.SIZES["tiny"])
    >>> params, tokens = jax.jit(model.init)(jax.random.key(0)), jnp.zeros((2, 3), jnp.int32)
    >>> found = beam_search(model, params, tokens, beams=3, max_new_tokens=5)
    >>> found.tokens.shape, bool(jnp.all(found.scores[:, 0] >= found.scores[:, 2]))
    ((2, 3, 5), True)
    """
    at_least("beams", beams)
    at_least("max_new_tokens", max_new_tokens)
    within("length_penalty", length_penalty, FROM_ZERO)
    if model.init_cache is None:
        new_cache(model, 1, 1)  # says why not
    models.check_params(model, params)
    named = dict(inputs) if isinstance(inputs, Mapping) else {"tokens": inputs}
    if "tokens" not in named and "source" in named:
        named["tokens"] = jnp.full((named["source"].shape[0], 1), model.config.start, jnp.int32)
    known = unpadded(named)
    for name in {"tokens", "source"} & named.keys():
        check_ids(name, known[name], model.config.vocab)
    if model.continues:
        _check_room(named, model.config.context, max_new_tokens)
    plan = _Plan(
        beams,
        max_new_tokens,
        tuple(sorted({int(i) for i in eos_ids})),
        float(length_penalty),
        patient,
    )
    found = _search(model, plan)(params, named)
    if not isinstance(found.scores, core.Tracer) and bool(jnp.any(jnp.isnan(found.scores))):
        raise unsound(params)
    return found


def _check_room(inputs: Mapping[str, Any], context: int, new: int) -> None:
    mask = inputs.get("mask")
    longest = inputs["tokens"].shape[1]
    if mask is not None and not isinstance(mask, core.Tracer):
        longest = int(jnp.max(jnp.sum(mask, axis=1)))
    if longest + new > context:
        raise InputError(
            f"max_new_tokens: {new}; allowed: at most {max(context - longest, 0)}, because the "
            f"model's context is {context} and "
            f"the longest row has {longest} tokens"
        )


@functools.lru_cache(maxsize=64)
def _search(model: models.Model, plan: _Plan) -> Callable[..., Beams]:
    k = plan.beams
    n = plan.steps
    places = _places(model)

    @jax.jit
    def search(params: tree.Params, inputs: dict[str, jax.Array]) -> Beams:
        tokens = inputs["tokens"]
        batch, length = tokens.shape
        mask = inputs.get("mask")
        count = (
            jnp.full(batch, length, jnp.int32)
            if mask is None
            else jnp.sum(mask, axis=1, dtype=jnp.int32)
        )
        out = model.hidden(params, inputs, new_cache(model, batch, length + n))
        last = jnp.take_along_axis(out.hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)
        logits = model.parts.head(params, last)[:, 0]
        nothing = Beams(
            jnp.zeros((batch, k, n), jnp.int32),
            jnp.full((batch, k), -jnp.inf, jnp.float32),
            jnp.zeros((batch, k), jnp.int32),
        )
        # one beam, so that no text is there twice
        first = nothing._replace(scores=nothing.scores.at[:, 0].set(0.0))
        cache = _map_rows(lambda a, axis: jnp.repeat(a, k, axis=axis), out.cache, places, True)
        state = _State(
            jnp.zeros((), jnp.int32),
            cache,
            first,
            nothing,
            jnp.zeros(batch, jnp.bool_),
            jnp.ones(batch, jnp.bool_),
        )
        state = choose(state, jnp.repeat(logits, k, axis=0))

        def step(state: _State) -> _State:
            newest = jax.lax.dynamic_index_in_dim(
                state.live.tokens, state.step - 1, axis=2, keepdims=False
            )
            alive = jnp.repeat(~state.over, k)[:, None]
            out = model.apply(params, {"tokens": newest.reshape(-1, 1), "mask": alive}, state.cache)
            return choose(state._replace(cache=out.cache), out.logits[:, 0])

        end = jax.lax.while_loop(lambda s: (s.step < n) & ~jnp.all(s.over), step, state)
        return end.done._replace(scores=jnp.where(end.sound[:, None], end.done.scores, jnp.nan))

    def choose(state: _State, logits: Float[Array, "R V"]) -> _State:
        """Return the state with one more token."""
        batch = state.over.shape[0]
        vocab = logits.shape[-1]
        steps = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1).reshape(batch, k, vocab)
        total = (state.live.scores[:, :, None] + steps).reshape(batch, k * vocab)
        # Take enough candidates: one per beam and end token may end, and K others must be left.
        scores, place = jax.lax.top_k(total, min(k * (1 + len(plan.ends)), k * vocab))
        parent = place // vocab
        token = place % vocab
        texts = jnp.take_along_axis(state.live.tokens, parent[:, :, None], axis=1)
        texts = jax.lax.dynamic_update_slice(texts, token[:, :, None], (0, 0, state.step))
        step = state.step + 1
        ends = functools.reduce(
            jnp.logical_or, [token == end for end in plan.ends], jnp.zeros(token.shape, jnp.bool_)
        )
        among = jnp.arange(token.shape[1], dtype=jnp.int32)[None] < k
        wins = (ends | (step == n)) & among & ~state.over[:, None]
        won = Beams(
            texts,
            jnp.where(wins, scores / _penalty(plan, step), -jnp.inf),
            jnp.broadcast_to(step, token.shape),
        )
        done = _best(_joined(state.done, won), k)
        live = Beams(texts, jnp.where(ends, -jnp.inf, scores), parent)
        live = _best(live, k)
        full = jnp.isfinite(done.scores[:, -1])
        if (
            plan.patient and k > 1
            # With a penalty a longer text of equal probability scores better, so the score at the
            # largest length is an upper bound.
        ):
            full = full & (
                done.scores[:, -1] >= live.scores[:, 0] / _penalty(plan, jnp.asarray(n, jnp.int32))
            )
        row = jnp.arange(batch, dtype=jnp.int32)[:, None] * k
        rows = (row + live.lengths).reshape(-1)
        cache = _map_rows(lambda a, axis: jnp.take(a, rows, axis=axis), state.cache, places, False)
        fine = jnp.all(is_sound(logits).reshape(batch, k), axis=1)
        return _State(
            step, cache, live, done, state.over | full | ~fine, state.sound & (fine | state.over)
        )

    return search


def _penalty(plan: _Plan, length: Int[Array, ""]) -> Float[Array, ""]:
    return ((5 + length.astype(jnp.float32)) / 6) ** plan.penalty


def _joined(one: Beams, other: Beams) -> Beams:
    return Beams(*(jnp.concatenate(both, axis=1) for both in zip(one, other, strict=True)))


def _best(found: Beams, k: int) -> Beams:
    """Return the k best hypotheses; of equal ones the first."""
    scores, order = jax.lax.top_k(found.scores, k)
    tokens = jnp.take_along_axis(found.tokens, order[:, :, None], axis=1)
    return Beams(tokens, scores, jnp.take_along_axis(found.lengths, order, axis=1))


class _Place(NamedTuple):
    """The axis of the rows in an array of a cache."""

    axis: int | None  # None where there is no such axis
    # True if all beams of a row share the array: those of the source, which an empty cache lacks
    shared: bool


def _places(model: models.Model) -> list[_Place]:
    """Find the axis of rows in each array of the cache.

    It is the axis in which caches for two and for three rows differ.
    """
    two, three = (
        jax.eval_shape(lambda n=n: jax.tree.leaves(new_cache(model, n, 8))) for n in (2, 3)
    )
    axes = [
        [i for i, n in enumerate(a.shape) if n != b.shape[i]]
        for a, b in zip(two, three, strict=True)
    ]
    return [
        _Place(axis[0] if axis else None, a.size == 0) for axis, a in zip(axes, two, strict=True)
    ]


def _map_rows(
    change: Callable[[jax.Array, int], jax.Array],
    cache: Any,
    places: Sequence[_Place],
    shared: bool,
) -> Any:
    """Apply `change(array, axis of the rows)` to each array of the cache.

    Shared arrays are changed only if `shared`.
    """
    arrays, structure = jax.tree.flatten(cache)
    pairs = zip(arrays, places, strict=True)
    out = [
        a if p.axis is None or (p.shared and not shared) else change(a, p.axis) for a, p in pairs
    ]
    return jax.tree.unflatten(structure, out)
