"""The laws of models that read a source: what depends on what, and decoding with a cache.

Members are discovered.
"""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import tree
from jaxmodel.errors import InputError
from jaxmodel.generation import GREEDY, decode
from jaxmodel.models import sizes
from jaxmodel.ops import Policy

B = 3
S = 7
T = 8
SOURCES = np.array([7, 3, 5])
TARGETS = np.array([3, 5, 1])
TINY = [
    f"{family}/{name}"
    for family in ("t5", "transformer", "rnn")
    for name in ("tiny", "tiny-gated", "tiny-pre", "tiny-gru")
]
TINY = [name for name in TINY if name in sizes()]


@dataclasses.dataclass(frozen=True)
class Case:
    """A member with parameters that are large everywhere, and inputs whose sources differ in
    length.
    """

    model: object
    params: tree.Params
    inputs: dict[str, jax.Array]
    run: object  # jitted apply
    whole: np.ndarray  # logits of the inputs


@functools.cache
def case_of(name: str) -> Case:
    module, config = sizes()[name]
    model = module.model(config)
    rng = np.random.default_rng(0)
    # norms around 1: where they are small, a text is one token over and over
    one = lambda path, a: jnp.asarray(
        path.endswith("norm/weight") + rng.normal(size=a.shape) * 0.3, a.dtype
    )
    params = tree.map_leaves(one, jax.eval_shape(model.init, jax.random.key(0)))
    inputs = {
        key: jnp.asarray(rng.integers(0, config.vocab, (B, n)), jnp.int32)
        for key, n in (("source", S), ("tokens", T))
    }
    inputs["source_mask"] = jnp.asarray(np.arange(S) < SOURCES[:, None])
    run = jax.jit(model.apply)
    return Case(model, params, inputs, run, np.asarray(run(params, inputs).logits))


@pytest.fixture(scope="module", params=TINY)
def case(request) -> Case:
    return case_of(request.param)


def close(got, want, tolerance: float = 1e-4) -> None:
    np.testing.assert_allclose(got, want, atol=tolerance, rtol=tolerance)


def test_the_members_are_found():
    assert len(TINY) == 6 and all(
        list(m.model(c).inputs(1, 1)) == ["source", "tokens"] for m, c in map(sizes().get, TINY)
    )


def test_padding_of_the_source_changes_nothing_and_the_rest_does(case):
    source = case.inputs["source"]
    mask = case.inputs["source_mask"]
    other = case.run(case.params, {**case.inputs, "source": jnp.where(mask, source, 9)}).logits
    np.testing.assert_array_equal(other, case.whole)
    alone = {"source": source[1:2, : SOURCES[1]], "tokens": case.inputs["tokens"][1:2]}
    close(case.run(case.params, alone).logits[0], case.whole[1])
    changed = {**case.inputs, "source": source.at[:, 2].add(1) % 256}
    assert np.all(
        np.abs(case.run(case.params, changed).logits - case.whole).max(axis=(1, 2)) > 1e-3
    )


def test_the_future_of_the_target_has_no_influence_and_its_padding_neither(case):
    tokens = case.inputs["tokens"]
    later = case.run(case.params, {**case.inputs, "tokens": tokens.at[:, 5].add(1) % 256}).logits
    np.testing.assert_array_equal(later[:, :5], case.whole[:, :5])
    assert np.abs(later[:, 5:] - case.whole[:, 5:]).max() > 1e-2
    mask = np.arange(T) < TARGETS[:, None]
    padded = {
        **case.inputs,
        "tokens": jnp.where(jnp.asarray(mask), tokens, 3),
        "mask": jnp.asarray(mask),
    }
    close(np.asarray(case.run(case.params, padded).logits)[mask], case.whole[mask])


def test_decoding_with_a_cache_equals_the_whole_at_every_position(case):
    """Sources and targets of unequal length are read together; then a token at a time, while some
    rows have ended.
    """
    tokens = case.inputs["tokens"]
    rows = np.arange(B)
    mask = np.arange(T) < TARGETS[:, None]
    first = {
        **case.inputs,
        "tokens": jnp.where(jnp.asarray(mask), tokens, 7),
        "mask": jnp.asarray(mask),
    }
    out = case.run(case.params, first, case.model.init_cache(B, 2 * T))
    close(np.asarray(out.logits)[mask], case.whole[mask])
    for step in range(T - 1):
        at = np.minimum(TARGETS + step, T - 1)
        alive = TARGETS + step < T
        out = case.run(
            case.params,
            {"tokens": tokens[rows, at][:, None], "mask": jnp.asarray(alive[:, None])},
            out.cache,
        )
        close(np.asarray(out.logits)[alive, 0], case.whole[rows, at][alive])
    assert out.cache.length.tolist() == [T] * B


@pytest.mark.parametrize("case", ["t5/tiny", "transformer/tiny-pre", "rnn/tiny"], indirect=True)
def test_decoding_in_bfloat16_with_layers_in_segments(case):
    """Beside the whole text in the same arithmetic: how far bfloat16 is from float32 is a matter of
    the weights.
    """
    small = case.model.with_policy(Policy(compute_dtype="bfloat16", activation_dtype="bfloat16"))
    first = {**case.inputs, "tokens": case.inputs["tokens"][:, :5]}
    run = jax.jit(small.apply)
    params = jax.jit(lambda p: tree.cast(p, jnp.bfloat16))(case.params)
    whole = np.asarray(run(params, case.inputs).logits)[:, 5:]
    params = jax.jit(tree.unstack)(params)
    out = run(params, first, small.init_cache(B, T))
    last = np.asarray(run(params, {"tokens": case.inputs["tokens"][:, 5:]}, out.cache).logits)
    assert last.dtype == np.float32
    assert np.sqrt(np.mean((last - whole) ** 2)) < 0.05 * np.std(case.whole)
    assert np.sqrt(np.mean((last - case.whole[:, 5:]) ** 2)) < 0.2 * np.std(case.whole)


def test_greedy_texts_are_those_of_the_whole_model(case):
    rows = [
        row[:n].tolist() for row, n in zip(np.asarray(case.inputs["source"]), SOURCES, strict=True)
    ]
    run = decode.run(
        case.model,
        case.params,
        rows,
        np.zeros(B, bool),
        sampling=GREEDY,
        max_new_tokens=T - 1,
        steps=4,
    )
    texts = np.concatenate(list(run), axis=1)
    begin = np.full((B, 1), case.model.config.start)
    tokens = jnp.asarray(np.concatenate([begin, texts], axis=1), jnp.int32)
    logits = case.run(case.params, {**case.inputs, "tokens": tokens}).logits
    assert texts.tolist() == np.argmax(logits[:, :-1], axis=-1).tolist()
    assert len(np.unique(texts)) > 3


def test_what_does_not_fit_is_refused(case):
    cache = case.model.init_cache(B, T)
    tokens = case.inputs["tokens"]
    for inputs, given in (({"tokens": tokens}, None), ({"tokens": tokens}, cache)):
        with pytest.raises(InputError, match="source: none given; allowed: token ids"):
            case.model.apply(case.params, inputs, given)
    with pytest.raises(InputError, match="segments: given to a model that reads a source"):
        case.model.apply(case.params, {**case.inputs, "segments": jnp.ones((B, T), jnp.int32)})


@pytest.mark.parametrize("name", ["t5/tiny", "transformer/tiny-pre", "rnn/tiny"])
def test_dropout_is_for_training_with_a_key_only(name):
    case = case_of(name)
    changed = dataclasses.replace(sizes()[name][1], dropout=0.4)
    run = jax.jit(sizes()[name][0].model(changed).apply, static_argnames="train")
    chex.assert_trees_all_equal(
        run(case.params, case.inputs, rng=jax.random.key(0)).logits, case.whole
    )
    one, other, again = (
        run(case.params, case.inputs, rng=jax.random.key(i), train=True).logits for i in (0, 1, 0)
    )
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.05 and np.abs(one - case.whole).max() > 0.05
