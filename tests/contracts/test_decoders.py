"""The laws of models that read one text and continue it: causality, packing, padding, and the
cache.
"""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import ops, tree

B = 3
T = 8


def close(
    got: np.ndarray | jax.Array, want: np.ndarray | jax.Array, tolerance: float = 1e-4
) -> None:
    chex.assert_trees_all_close(
        np.asarray(got), np.asarray(want), rtol=tolerance, atol=tolerance, strict=True
    )


@pytest.mark.parametrize("depth", [1, 2])
def test_any_depth(decoder, depth):
    model = decoder.module.model(dataclasses.replace(decoder.model.config, depth=depth))
    params = jax.eval_shape(model.init, jax.random.key(0))
    assert tree.depth(params["blocks"]) == depth
    assert jax.eval_shape(model.apply, params, decoder.tokens).logits.shape == (
        B,
        T,
        model.config.vocab,
    )


def test_what_is_left_out_is_the_one_document(decoder):
    """Positions from 0, one segment, no padding; an array alone: test_models.py."""
    ones = jnp.asarray(np.ones((B, T), np.int32))
    positions = jnp.asarray(np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)))
    full = {
        "tokens": decoder.tokens,
        "positions": positions,
        "segments": ones,
        "mask": jnp.asarray(np.ones((B, T), bool)),
    }
    close(decoder.apply(decoder.params, full), decoder.apply(decoder.params, decoder.inputs), 1e-5)


def test_the_future_has_no_influence(decoder):
    changed = np.array(decoder.tokens)
    changed[:, T - 2] = (changed[:, T - 2] + 1) % decoder.model.config.vocab
    texts = decoder.tokens, jnp.asarray(changed)
    before, after = (
        np.asarray(decoder.apply(decoder.params, {"tokens": tokens})) for tokens in texts
    )
    np.testing.assert_array_equal(before[:, : T - 2], after[:, : T - 2])
    assert np.abs(before[:, T - 2 :] - after[:, T - 2 :]).max() > 1e-2


def test_packed_segments_equal_separate_documents(decoder):
    lengths = (3, 4)  # and a position of padding
    tokens = np.array(decoder.tokens)
    rows = {"segments": [1, 1, 1, 2, 2, 2, 2, 0], "positions": [0, 1, 2, 0, 1, 2, 3, 0]}
    rows = {
        name: jnp.asarray(np.broadcast_to(np.array(row, np.int32), (B, T)))
        for name, row in rows.items()
    }
    packed = np.asarray(decoder.apply(decoder.params, {"tokens": decoder.tokens, **rows}))
    start = 0
    for length in lengths:
        documents = np.zeros((B, T), np.int32)
        documents[:, :length] = tokens[:, start : start + length]
        alone = np.asarray(decoder.apply(decoder.params, {"tokens": jnp.asarray(documents)}))
        close(packed[:, start : start + length], alone[:, :length])
        start += length


def test_padding_on_the_right_does_not_change_real_positions(decoder):
    lengths = np.array([3, T, 5])
    mask = np.arange(T) < lengths[:, None]
    fills = (0, 7, -1, 10**6)  # also of what no table has
    rows = [
        jnp.asarray(np.where(mask, np.asarray(decoder.tokens), np.int32(fill))) for fill in fills
    ]
    outs = [
        decoder.apply(decoder.params, {"tokens": row, "mask": jnp.asarray(mask)}) for row in rows
    ]
    for out in outs[1:]:
        np.testing.assert_array_equal(np.asarray(outs[0])[mask], np.asarray(out)[mask])
    close(
        np.asarray(outs[0])[mask], np.asarray(decoder.apply(decoder.params, decoder.inputs))[mask]
    )


def test_padding_may_reach_beyond_the_context(decoder):
    if "positions" not in decoder.params:
        pytest.skip("positions without a table have no end")
    context = len(decoder.params["positions"])
    row = jax.random.randint(jax.random.key(3), (1, context), 0, decoder.model.config.vocab)
    wide = jnp.pad(row, ((0, 0), (0, 7)))
    mask = jnp.arange(context + 7)[None] < context
    whole = decoder.apply(decoder.params, row)
    close(decoder.apply(decoder.params, {"tokens": wide, "mask": mask})[:, :context], whole)
    cache = decoder.model.init_cache(1, context + 7)
    out = jax.jit(decoder.model.apply)(decoder.params, {"tokens": wide, "mask": mask}, cache)
    close(out.logits[:, :context], whole)


def test_a_new_model_knows_nothing(decoder):
    params = decoder.init(jax.random.key(0))
    logits = np.asarray(decoder.apply(params, decoder.inputs), np.float64)
    nll = np.log(np.exp(logits).sum(-1)) - np.mean(logits, axis=-1)
    assert float(np.mean(nll)) == pytest.approx(np.log(decoder.model.config.vocab), rel=0.05)


def test_the_cache_equals_the_whole_at_every_position_for_ragged_rows(decoder):
    """Rows of 3, 5 and 1 tokens are read together, then each is continued a token at a time, in two
    programs for all. A row without room gets NaN, not the text of a cache that was written over.
    """
    tokens = np.asarray(decoder.tokens)
    lengths = np.array([3, 5, 1])
    traces = []
    cache = decoder.model.init_cache(B, T)
    whole = np.asarray(decoder.apply(decoder.params, decoder.inputs))

    @jax.jit
    def run(params, inputs, cache):
        traces.append(inputs["tokens"].shape)
        return decoder.model.apply(params, inputs, cache)

    mask = np.arange(T) < lengths[:, None]
    out = run(
        decoder.params,
        {"tokens": jnp.asarray(np.where(mask, tokens, 7)), "mask": jnp.asarray(mask)},
        cache,
    )
    close(np.asarray(out.logits)[mask], whole[mask])
    np.testing.assert_array_equal(out.cache.length, lengths)
    rows = np.arange(B)
    one = jnp.asarray(np.ones((B, 1), bool))
    for step in range(T - lengths.max()):
        at = lengths + step
        out = run(
            decoder.params,
            {"tokens": jnp.asarray(tokens[rows, at][:, None]), "mask": one},
            out.cache,
        )
        close(np.asarray(out.logits)[:, 0], whole[rows, at])
    np.testing.assert_array_equal(out.cache.length, lengths + T - lengths.max())
    more = np.asarray(
        run(decoder.params, {"tokens": jnp.asarray(tokens[:, :1]), "mask": one}, out.cache).logits
    )
    np.testing.assert_array_equal(np.isnan(more).all(axis=(1, 2)), lengths == lengths.max())
    assert np.isfinite(more[lengths < lengths.max()]).all()
    assert traces == [(B, T), (B, 1)]


def in_halves(model, params, tokens: jax.Array) -> np.ndarray:
    """The logits of a text that comes in two pieces."""
    run = jax.jit(model.apply)
    cache = model.init_cache(B, T + 3)
    found = []
    for piece in np.split(np.asarray(tokens), 2, axis=1):
        out = run(params, {"tokens": jnp.asarray(piece)}, cache)
        cache = out.cache
        found = [*found, out.logits]
    return np.concatenate(found, axis=1)


def test_attention_in_blocks_is_the_same_with_a_cache_and_without(decoder):
    """Long texts take that path, whatever the scores of a member have besides (sinks, caps,
    windows).
    """
    model = decoder.model.with_policy(ops.Policy(attention="blockwise"))
    whole = decoder.apply(decoder.params, decoder.inputs)
    close(decoder.run(model, decoder.params, decoder.inputs)[0], whole)
    close(in_halves(model, decoder.params, decoder.tokens), whole)


def test_the_cache_with_layers_in_segments(cached):
    close(
        in_halves(cached.model, cached.apart, cached.tokens),
        cached.apply(cached.params, cached.inputs),
    )


def test_segments_with_a_cache_are_refused(decoder):
    inputs = {"tokens": decoder.tokens, "segments": jnp.ones((B, T), jnp.int32)}
    with pytest.raises(ValueError, match="segments: given with a cache"):
        decoder.model.apply(decoder.params, inputs, decoder.model.init_cache(B, T))
