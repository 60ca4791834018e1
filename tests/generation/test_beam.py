"""Beam search against all texts there are, against a search written with lists, and against greedy
decoding.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import tree
from jaxmodel.errors import InputError
from jaxmodel.generation import (
    GREEDY,
    GenerationRequest,
    beam_search,
    beam_texts,
    decode,
    generate,
    generate_ids,
)
from jaxmodel.generation.beam import _search
from jaxmodel.hub.bundle import Bundle
from jaxmodel.models import sizes

FAMILIES = ["llama/tiny", "t5/tiny-gated", "transformer/tiny", "rnn/tiny", "rnn/tiny-gru"]
PROMPTS = [[2, 3, 0], [1], [3, 2]]


@functools.cache
def made(name: str, vocab: int):
    """A model and parameters that are large everywhere, so that no text wins by far."""
    module, config = sizes()[name]
    model = module.model(dataclasses.replace(config, vocab=vocab))
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return model, jax.tree.map(
        lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.3, a.dtype), shapes
    )


def ragged(rows):
    tokens, mask = decode.padded(rows, 4)
    return jnp.asarray(tokens), jnp.asarray(mask)


def arrays(model, rows):
    names = ("source", "source_mask") if decode.reads_source(model) else ("tokens", "mask")
    return dict(zip(names, ragged(rows), strict=True))


@functools.cache
def logits_of(model):
    return jax.jit(lambda params, inputs: model.apply(params, inputs).logits)


def log_probabilities(model, params, row, texts):
    """log p of each token `[M, N]` of texts `[M, N]` after one row, by the whole model and without
    a cache.
    """
    texts = np.asarray(texts, np.int32)
    if decode.reads_source(model):
        source, mask = (jnp.repeat(a, len(texts), axis=0) for a in ragged([row]))
        begin = [model.config.start]
        inputs = {"source": source, "source_mask": mask}
    else:
        begin = row
        inputs = {}
    tokens = np.concatenate([np.repeat([begin], len(texts), axis=0), texts], axis=1)
    tokens = np.pad(tokens, [(0, 0), (0, 12 - tokens.shape[1])])
    logits = np.asarray(
        logits_of(model)(params, {**inputs, "tokens": jnp.asarray(tokens, jnp.int32)}), np.float64
    )
    logp = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    places = len(begin) - 1 + np.arange(texts.shape[1])
    return np.take_along_axis(logp[:, places], texts[:, :, None], axis=2)[:, :, 0]


def cut(text, ends):
    """The text up to its first end token."""
    stop = next((i + 1 for i, token in enumerate(text) if token in ends), len(text))
    return tuple(text[:stop])


def texts_of(found, row):
    return [
        tuple(t[:n])
        for t, n in zip(found.tokens[row].tolist(), found.lengths[row].tolist(), strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "penalty"),
    # the penalty is the search's; a GRU's cache is put in order as an LSTM's
    [*((name, 2.0) for name in FAMILIES if name != "rnn/tiny-gru"), ("llama/tiny", 0.0)],
)
def test_the_best_of_all_texts(name, penalty):
    """Every text of at most 4 tokens out of 4, of which one ends it; no beam has to be given up."""
    model, params = made(name, 4)
    every = np.array(list(itertools.product(range(4), repeat=4)))
    rows = PROMPTS[:2]
    known = [log_probabilities(model, params, row, every) for row in rows]
    options = {
        "beams": 27,
        "max_new_tokens": 4,
        "eos_ids": [3],
        "length_penalty": penalty,
        "patient": penalty > 0,
    }
    found = beam_search(model, params, arrays(model, rows), **options)
    winners = set()
    for row in range(len(rows)):
        scores = {}
        for text, logp in zip(every.tolist(), known[row], strict=True):
            short = cut(text, [3])
            scores[short] = sum(logp[: len(short)]) / ((5 + len(short)) / 6) ** penalty
        best = sorted(scores, key=lambda text: -scores[text])[:10]
        assert texts_of(found, row)[:10] == best
        np.testing.assert_allclose(
            found.scores[row, :10], [scores[text] for text in best], atol=1e-4
        )
        winners |= {len(text) for text in best}
    assert len(winners) > 1  # texts of several lengths compete


def searched(model, params, row, *, beams, max_new_tokens, eos_ids, length_penalty, patient):
    """The same search with lists, one row, all logits anew at each step."""
    live = [(0.0, ())]
    done = []
    score = lambda logp, n: logp / ((5 + n) / 6) ** length_penalty
    for n in range(1, max_new_tokens + 1):
        found = []
        for logp, text in live:
            texts = [[*text, token] for token in range(model.config.vocab)]
            new = log_probabilities(model, params, row, texts)[:, -1]
            found += [(logp + float(p), tuple(t)) for p, t in zip(new, texts, strict=True)]
        found.sort(key=lambda item: -item[0])
        done += [
            (score(p, n), t) for p, t in found[:beams] if t[-1] in eos_ids or n == max_new_tokens
        ]
        done = sorted(done, key=lambda item: -item[0])[:beams]
        live = [(p, t) for p, t in found if t[-1] not in eos_ids][:beams]
        if len(done) == beams and (not patient or done[-1][0] >= score(live[0][0], max_new_tokens)):
            break
    return done


@pytest.mark.parametrize(
    ("name", "penalty", "patient", "ends"),
    [
        ("llama/tiny", 0.0, False, (3, 7)),
        ("llama/tiny", 0.9, True, (3,)),
        ("llama/tiny", 1.5, False, ()),
        ("t5/tiny-gated", 0.9, True, (3,)),  # the options are the search's; a source is the model's
    ],
)
def test_few_beams_equal_a_search_with_lists(name, penalty, patient, ends):
    model, params = made(name, 12)
    options = {
        "beams": 3,
        "max_new_tokens": 6,
        "eos_ids": ends,
        "length_penalty": penalty,
        "patient": patient,
    }
    found = beam_search(model, params, arrays(model, PROMPTS), **options)
    for row, prompt in enumerate(PROMPTS):
        want = searched(model, params, prompt, **options)
        assert texts_of(found, row) == [text for _, text in want]
        np.testing.assert_allclose(found.scores[row], [score for score, _ in want], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "patient"),
    [*((name, False) for name in FAMILIES), ("llama/tiny", True)],
)
def test_one_beam_is_greedy(name, patient):
    model, params = made(name, 64)
    rows = [[5, 9, 2], [3], [7, 7]]
    done = np.zeros(3, bool)
    run = decode.run(model, params, rows, done, sampling=GREEDY, max_new_tokens=9)
    greedy = np.concatenate(list(run), axis=1).tolist()
    options = {"beams": 1, "max_new_tokens": 9, "length_penalty": 1.0, "patient": patient}
    end = max(
        greedy[0][:8], key=greedy[0].index
    )  # the last that is new there: one text at least ends early, but not soon
    found = beam_search(model, params, arrays(model, rows), eos_ids=[end], **options)
    assert [texts_of(found, row)[0] for row in range(3)] == [cut(text, [end]) for text in greedy]


def test_more_beams_find_better_texts_and_rows_do_not_see_each_other():
    model, params = made("transformer/tiny", 64)
    search = functools.partial(beam_search, model, params, max_new_tokens=8, eos_ids=[0])
    one, together = (search(arrays(model, PROMPTS), beams=beams) for beams in (1, 16))
    best = [found.scores[:, 0] for found in (one, together)]
    assert np.all(best[1] > best[0] - 1e-5) and np.any(best[1] > best[0] + 0.1)
    for row, prompt in enumerate(PROMPTS):
        alone = search(arrays(model, [prompt]), beams=16)
        assert texts_of(alone, 0) == texts_of(together, row)


def test_a_source_alone_begins_with_the_start_token_and_nothing_is_traced_twice():
    model, params = made("t5/tiny-gated", 12)
    options = {
        "beams": 3,
        "max_new_tokens": 6,
        "eos_ids": (3,),
        "length_penalty": 0.9,
        "patient": True,
    }
    one = beam_search(model, params, arrays(model, PROMPTS), **options)
    start = jnp.full((3, 1), model.config.start, jnp.int32)
    other = beam_search(model, params, {**arrays(model, PROMPTS[::-1]), "tokens": start}, **options)
    np.testing.assert_array_equal(one.tokens[::-1], other.tokens)
    [search] = {_search(model, plan) for plan in [_plan(options)]}
    assert search._cache_size() == 1


def _plan(options):
    from jaxmodel.generation.beam import _Plan

    return _Plan(
        options["beams"],
        options["max_new_tokens"],
        options["eos_ids"],
        options["length_penalty"],
        options["patient"],
    )


def test_fewer_texts_than_beams():
    model, params = made("llama/tiny", 5)
    found = beam_search(
        model, params, jnp.asarray([[1, 2]], jnp.int32), beams=9, max_new_tokens=1, eos_ids=[3]
    )
    assert found.lengths[0].tolist() == [1] * 5 + [0] * 4
    assert np.isfinite(found.scores[0]).tolist() == [True] * 5 + [False] * 4
    assert sum(math.exp(score) for score in found.scores[0, :5].tolist()) == pytest.approx(
        1.0, abs=1e-5
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beams": 0}, "beams: 0 given; allowed: a whole number of at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0 given"),
        (
            {"length_penalty": -1},
            "length_penalty: -1 given; allowed: a finite number of at least 0",
        ),
        ({"length_penalty": math.nan}, "length_penalty: nan"),
    ],
)
def test_values_out_of_range(options, message):
    model, params = made("llama/tiny", 5)
    with pytest.raises(InputError, match=message):
        beam_search(model, params, jnp.zeros((1, 1), jnp.int32), **options)


def test_a_model_that_does_not_decode():
    model, params = made("llama/tiny", 5)
    with pytest.raises(InputError, match="'llama' cannot decode; allowed: a model with a cache"):
        beam_search(
            dataclasses.replace(model, init_cache=None), params, jnp.zeros((1, 1), jnp.int32)
        )


# -------------------------------------------------------------------------------------------- texts


@pytest.fixture(scope="module")
def translator(bundle):
    module, config = sizes()["transformer/tiny-pre"]
    model = module.model(dataclasses.replace(config, vocab=bundle.processor.vocab_size, context=24))
    rng = np.random.default_rng(2)
    one = lambda path, a: jnp.asarray(
        path.endswith("norm/weight") + rng.normal(size=a.shape) * 0.3, a.dtype
    )
    return Bundle(
        model, tree.map_leaves(one, jax.eval_shape(model.init, jax.random.key(0))), bundle.processor
    )


@pytest.mark.parametrize("which", ["bundle", "translator"])
def test_texts(which, request):
    bundle = request.getfixturevalue(which)
    prompts = ["the cat", "naïve café", "a b c d"]
    greedy = generate(bundle, prompts, max_new_tokens=7)
    assert len(set(greedy)) > 1
    assert [row[0].text for row in beam_texts(bundle, prompts, beams=1, max_new_tokens=7)] == greedy
    found = beam_texts(bundle, prompts, beams=3, max_new_tokens=7, chunk=2)
    for prompt, row in zip(prompts, found, strict=True):
        assert [h.score for h in row] == sorted((h.score for h in row), reverse=True) and len(
            row
        ) == 3
        assert beam_texts(bundle, [prompt], beams=3, max_new_tokens=7)[0][0].text == row[0].text
        assert all(
            h.finish_reason == "length" and bundle.processor.decode(h.ids) == h.text for h in row
        )
    end = found[0][0].ids[3]
    ending = dataclasses.replace(
        bundle, processor=dataclasses.replace(bundle.processor, eos_ids=(end,))
    )
    [row] = beam_texts(ending, prompts[:1], beams=3, max_new_tokens=7)
    reasons = {(h.finish_reason, len(h.ids) < 7) for h in row}
    assert ("eos", True) in reasons and all(end not in h.ids for h in row)


def test_texts_of_a_source_may_be_as_long_as_wanted(translator):
    """The prompt stands in another row, so only it has to fit."""
    [completion] = generate_ids(translator, ["the cat sat"], GenerationRequest(max_new_tokens=40))
    assert len(completion.ids) == 40
    with pytest.raises(InputError, match="fewer than the model's context of 24"):
        beam_texts(translator, ["the cat sat on the mat " * 9])
    with pytest.raises(InputError, match="a single string was given"):
        beam_texts(translator, "the cat")
