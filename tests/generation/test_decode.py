from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from contextlib import contextmanager

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import ops
from jaxmodel.errors import InputError
from jaxmodel.generation import beam_search, decode
from jaxmodel.generation.sampling import GREEDY, SamplingParams, is_sound, sample
from jaxmodel.models import families, llama

ROWS = [[5, 9, 2, 7, 7], [3], list(range(40, 57)), [250, 1, 4]]  # 17: over the smallest size


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request):
    family = families()[request.param]
    return family.model(dataclasses.replace(family.SIZES["tiny"], init_scale=0.3))


@pytest.fixture(scope="module")
def params(model):
    return jax.jit(model.init)(jax.random.key(0))


# Drawing and stopping are the same code for all models, which hands them logits and a cache.
ONE_MODEL = pytest.mark.parametrize("model", ["llama"], indirect=True, scope="module")


def generated(model, params, rows, n, sampling=GREEDY, **options):
    done = np.zeros(len(rows), bool)
    pieces = list(
        decode.run(model, params, rows, done, sampling=sampling, max_new_tokens=n, **options)
    )
    return np.concatenate(pieces, axis=1).tolist()


@functools.cache
def jitted(model):
    return jax.jit(model.apply)


def all_logits(model, params, row):
    """The logits after each token of a row, alone and without a cache.

    Padding to one length stands behind it.
    """
    tokens = jnp.array([row + [0] * (64 - len(row))])
    return np.asarray(jitted(model)(params, tokens).logits)[0, : len(row)]


def next_logits(model, params, rows):
    return [all_logits(model, params, row)[-1] for row in rows]


def test_a_context_that_is_no_round_length_is_used_to_its_end(model):
    """Prompts are padded to one of few lengths, here beyond a table of positions."""
    family = families()[type(model.config).__module__.rpartition(".")[2]]
    short = family.model(dataclasses.replace(model.config, context=20))
    params = jax.jit(short.init)(jax.random.key(0))
    rows = [[3, 9], list(range(1, 16))]
    want = [list(row) for row in rows]
    for row in want:
        for _ in range(5):
            row.append(
                int(
                    np.argmax(
                        jitted(short)(params, jnp.array([row + [0] * (20 - len(row))])).logits[
                            0, len(row) - 1
                        ]
                    )
                )
            )
    assert generated(short, params, rows, 5) == [row[-5:] for row in want]
    long = list(range(2, 21))
    last = int(np.argmax(jitted(short)(params, jnp.array([[*long, 0]])).logits[0, len(long) - 1]))
    assert generated(short, params, [long], 1) == [[last]]


def test_prefill_gives_each_row_the_logits_after_its_last_token(model, params):
    logits, cache = decode.prefill(model, params, ROWS, 5)
    np.testing.assert_allclose(logits, np.stack(next_logits(model, params, ROWS)), atol=2e-4)
    assert cache.length.tolist() == [len(row) for row in ROWS]


def test_decoding_with_the_cache_equals_the_full_forward(model, params):
    """Greedy texts of a ragged batch are those of the whole model run again at each position, row
    by row.
    """
    new = generated(model, params, ROWS, 20)
    for row, text in zip(ROWS, new, strict=True):
        logits = all_logits(model, params, row + text)[len(row) - 1 : -1]
        assert text == np.argmax(logits, axis=-1).tolist()
    assert len({token for text in new for token in text}) > 10  # no trivial text


def test_steps_with_the_cache_give_the_logits_of_the_full_forward(model, params):
    """Also where a row has ended (its mask is false) while others go on."""
    forced = [[8, 6, 4, 2, 1], [1, 2], [9, 9, 9, 9, 9], [100, 200, 30, 4, 5]]
    _, cache = decode.prefill(model, params, ROWS, 5)
    for i in range(5):
        alive = jnp.array([i < len(text) for text in forced])
        tokens = jnp.array([text[min(i, len(text) - 1)] for text in forced])
        out = jitted(model)(params, {"tokens": tokens[:, None], "mask": alive[:, None]}, cache)
        cache = out.cache
        expected = next_logits(
            model, params, [row + text[: i + 1] for row, text in zip(ROWS, forced, strict=True)]
        )
        for got, want, lives in zip(out.logits[:, 0], expected, alive, strict=True):
            if lives:
                np.testing.assert_allclose(got, want, atol=3e-4)
    assert cache.length.tolist() == [
        len(row) + len(text) for row, text in zip(ROWS, forced, strict=True)
    ]


def test_long_prompts_in_pieces(model, params, monkeypatch):
    rows = [[i % 250 for i in range(3, 3 + n)] for n in (70, 32, 5, 33)]
    whole, _ = decode.prefill(model, params, rows, 8)
    texts = generated(model, params, rows, 8)
    monkeypatch.setattr(decode, "PIECE", 32)
    logits, cache = decode.prefill(model, params, rows, 8)
    np.testing.assert_allclose(logits, whole, atol=2e-4)
    assert cache.length.tolist() == [70, 32, 5, 33]
    assert generated(model, params, rows, 8) == texts


@ONE_MODEL
@pytest.mark.parametrize("n", [1, 2, 16, 17, 18, 35])
def test_length_and_beginning_do_not_depend_on_the_steps(model, params, n):
    longest = generated(model, params, ROWS, 35, SamplingParams(0.8), seed=3)
    assert generated(model, params, ROWS, n, SamplingParams(0.8), seed=3) == [
        text[:n] for text in longest
    ]
    assert generated(model, params, ROWS, n, SamplingParams(0.8), seed=3, steps=1) == [
        text[:n] for text in longest
    ]


@ONE_MODEL
def test_a_text_does_not_depend_on_its_batch(model, params):
    sampling = SamplingParams(0.9, top_k=40, top_p=0.95, repetition_penalty=1.2)
    together = generated(model, params, ROWS, 12, sampling, seed=5)
    for i, row in enumerate(ROWS):
        assert generated(model, params, [row], 12, sampling, seed=5, first_row=i) == [together[i]]
    assert generated(model, params, ROWS[:2], 12, sampling, seed=5) == together[:2]
    assert generated(model, params, ROWS, 12, sampling, seed=6) != together
    twins = generated(model, params, [ROWS[0], ROWS[0]], 12, sampling, seed=5)
    assert twins[0] == together[0] != twins[1]


@ONE_MODEL
def test_a_text_can_be_continued(model, params):
    """What is drawn depends on the position, so a prompt with half of the text gives the other
    half.
    """
    whole = generated(model, params, ROWS, 12, SamplingParams(0.9), seed=1)
    longer = [row + text[:5] for row, text in zip(ROWS, whole, strict=True)]
    assert generated(model, params, longer, 7, SamplingParams(0.9), seed=1) == [
        text[5:] for text in whole
    ]


@ONE_MODEL
def test_repetition_penalty_sees_prompt_and_text(model, params):
    sampling = SamplingParams(temperature=0.0, repetition_penalty=1.7)
    got = generated(model, params, ROWS, 9, sampling)
    for row, text in zip(ROWS, got, strict=True):
        for i, token in enumerate(text):
            x = all_logits(model, params, row + text[:i])[-1].copy()
            for seen in set(row + text[:i]):
                x[seen] = x[seen] / 1.7 if x[seen] > 0 else x[seen] * 1.7
            assert token == x.argmax()
    assert got != generated(model, params, ROWS, 9)


@ONE_MODEL
def test_generation_ends_when_all_rows_have(model, params):
    [text] = generated(model, params, [ROWS[0]], 35)
    eos = text[20]
    done = np.zeros(1, bool)
    pieces = []
    run = decode.run(
        model, params, [ROWS[0]], done, sampling=GREEDY, max_new_tokens=35, eos_ids=[eos, 9999]
    )
    for piece in run:
        pieces.append(piece)
        done[:] = eos in piece
    got = np.concatenate(pieces, axis=1)[0].tolist()
    end = text.index(eos) + 1
    assert got[:end] == text[:end]
    assert len(got) <= 1 + 16 * -(-(end - 1) // 16)  # the call that drew it is the last


@ONE_MODEL
def test_a_row_that_has_ended_keeps_still(model, params):
    logits, cache = decode.prefill(model, params, ROWS, 16)
    b = len(ROWS)
    state = decode.State(
        cache,
        sample(logits, None, GREEDY),
        cache.length + 0,
        jax.random.split(jax.random.key(0), b),
        None,
    )
    first = state.token.tolist()
    before = state.cache.length.tolist()
    done = jnp.array([False, True, False, True])
    state, tokens = decode.decoder(model, GREEDY)(params, state, done, 5, jnp.array([-1]))
    moved = (np.array(state.cache.length) - before).tolist()
    assert moved == [5, 0, 5, 0]
    assert tokens[1, :5].tolist() == [first[1]] * 5
    state, _ = decode.decoder(model, GREEDY)(params, state, jnp.ones(b, bool), 5, jnp.array([-1]))
    assert (np.array(state.cache.length) - before).tolist() == moved


@contextmanager
def compilations():
    """Counts what JAX traces and compiles, whoever asks for it."""
    events: Counter[str] = Counter()

    def listen(event: str, *_: float, **__: str) -> None:
        events[event] += event.startswith("/jax/core/compile")

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(
    "sampling", [GREEDY, SamplingParams(0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.1)]
)
def test_nothing_is_compiled_on_the_second_call(model, params, sampling):
    with compilations() as first:
        generated(model, params, [[1, 2, 3], [4] * 30], 20, sampling, seed=1, eos_ids=[0])
    assert first.total() > 0
    with compilations() as second:  # other prompts, lengths, seed; the same sizes
        generated(model, params, [[9] * 27, [8, 7]], 34, sampling, seed=2, eos_ids=[1], first_row=3)
        generated(model, params, [[9] * 27, [8, 7]], 12, sampling, seed=2, eos_ids=[1], steps=1)
    assert second.total() == 0, second
    equal = families()[type(model.config).__module__.split(".")[-1]].model(model.config)
    with compilations() as third:
        generated(equal, params, [[1, 2, 3], [4] * 30], 20, sampling, seed=1, eos_ids=[0])
    assert third.total() == 0, third


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_small_cache(model, params, dtype):
    small = families()[type(model.config).__module__.split(".")[-1]].model(
        model.config, ops.Policy(cache_dtype=dtype)
    )
    logits, cache = decode.prefill(small, params, ROWS, 4)
    assert jax.tree.leaves(cache.k)[0].dtype == dtype and cache.capacity >= 21
    np.testing.assert_allclose(logits, decode.prefill(model, params, ROWS, 4)[0], atol=0.2)


def test_few_sizes():
    sizes = [decode.round_up(n) for n in range(1, 3000)]
    assert all(n <= size <= max(16, 1.5 * n) for n, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes) and len(set(sizes)) == 2 * 8


# ----------------------------------------------------------------------- logits that are no numbers


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(0.8, top_k=5, top_p=0.9)])
@pytest.mark.parametrize("how", ["damaged", "overflow"])
def test_logits_that_are_no_numbers_are_an_error_with_its_cause(sampling, how):
    model = llama.model(llama.SIZES["tiny"])
    params = jax.jit(model.init)(jax.random.key(0))
    if how == "damaged":
        params["norm"]["weight"] = params["norm"]["weight"].at[3].set(jnp.nan)
        says = "params: 'norm/weight' has 1 values that are NaN or infinite"
    else:
        params["head"] = jnp.full_like(params["head"], 3e38)
        says = "all weights are finite: the activations overflow; compute in float32"
    with pytest.raises(InputError, match=says):
        list(
            decode.run(
                model, params, [[1, 2]], np.zeros(1, bool), sampling=sampling, max_new_tokens=3
            )
        )
    with pytest.raises(InputError, match=says):
        beam_search(model, params, jnp.asarray([[1, 2]], jnp.int32), beams=2, max_new_tokens=3)


def test_a_logit_that_is_no_number_is_never_chosen():
    logits = jnp.asarray([[0.0, jnp.nan, 9.0, 1.0]])
    keys = jax.random.split(jax.random.key(0), 1)
    assert sample(logits, None, GREEDY).tolist() == [2]
    assert sample(logits, keys, SamplingParams(0.01, top_p=0.9)).tolist() == [2]
    assert is_sound(jnp.asarray([[0.0, -jnp.inf], [-jnp.inf] * 2, [jnp.inf, 0.0]])).tolist() == [
        True,
        False,
        False,
    ]
