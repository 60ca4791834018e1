"""The laws of models that read one text and continue it: causality, packing, padding, and the cache."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import ops, tree

B, T = 3, 8


def close(got: jax.Array, want: jax.Array, tolerance: float = 1e-4) -> None:
    chex.assert_trees_all_close(got, want, rtol=tolerance, atol=tolerance, strict=True)


@pytest.mark.parametrize("depth", [1, 2])
def test_any_depth(decoder, depth):
    model = decoder.module.model(dataclasses.replace(decoder.model.config, depth=depth))
    params = jax.eval_shape(model.init, jax.random.key(0))
    assert tree.depth(params["blocks"]) == depth
    assert jax.eval_shape(model.apply, params, decoder.tokens).logits.shape == (B, T, model.config.vocab)


def test_inputs_are_tokens_or_a_dict(decoder):
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    ones = jnp.ones((B, T), jnp.int32)
    plain = decoder.apply(decoder.params, decoder.tokens)
    full = {"tokens": decoder.tokens, "positions": positions, "segments": ones, "mask": ones.astype(bool)}
    close(decoder.apply(decoder.params, {"tokens": decoder.tokens}), plain, 1e-6)
    close(decoder.apply(decoder.params, full), plain, 1e-5)


def test_the_future_has_no_influence(decoder):
    changed = decoder.tokens.at[:, T - 2].set((decoder.tokens[:, T - 2] + 1) % decoder.model.config.vocab)
    before, after = (decoder.apply(decoder.params, tokens) for tokens in (decoder.tokens, changed))
    np.testing.assert_array_equal(before[:, : T - 2], after[:, : T - 2])
    assert np.abs(before[:, T - 2 :] - after[:, T - 2 :]).max() > 1e-2


def test_packed_segments_equal_separate_documents(decoder):
    lengths = (3, 4)  # and a position of padding
    row = decoder.tokens[0]
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 0]], jnp.int32)
    positions = jnp.asarray([[0, 1, 2, 0, 1, 2, 3, 0]], jnp.int32)
    packed = decoder.apply(decoder.params, {"tokens": row[None], "segments": segments, "positions": positions})
    start = 0
    for length in lengths:
        document = jnp.zeros((1, T), jnp.int32).at[0, :length].set(row[start : start + length])
        close(packed[0, start : start + length], decoder.apply(decoder.params, document)[0, :length])
        start += length


def test_padding_on_the_right_does_not_change_real_positions(decoder):
    lengths = np.array([3, T, 5])
    mask = np.arange(T) < lengths[:, None]
    rows = [jnp.where(mask, decoder.tokens, fill) for fill in (0, 7, -1, 10**6)]  # also of what no table has
    outs = [decoder.apply(decoder.params, {"tokens": row, "mask": jnp.asarray(mask)}) for row in rows]
    for out in outs[1:]:
        np.testing.assert_array_equal(np.asarray(outs[0])[mask], np.asarray(out)[mask])
    close(np.asarray(outs[0])[mask], np.asarray(decoder.apply(decoder.params, decoder.tokens))[mask])


def test_padding_may_reach_beyond_the_context(decoder):
    if "positions" not in decoder.params:
        pytest.skip("positions without a table have no end")
    context = len(decoder.params["positions"])
    row = jax.random.randint(jax.random.key(3), (1, context), 0, decoder.model.config.vocab)
    wide, mask = jnp.pad(row, ((0, 0), (0, 7))), jnp.arange(context + 7)[None] < context
    whole = decoder.apply(decoder.params, row)
    close(decoder.apply(decoder.params, {"tokens": wide, "mask": mask})[:, :context], whole)
    cache = decoder.model.init_cache(1, context + 7)
    out = decoder.model.apply(decoder.params, {"tokens": wide, "mask": mask}, cache)
    close(out.logits[:, :context], whole)


def test_a_new_model_knows_nothing(decoder):
    params = jax.jit(decoder.model.init)(jax.random.key(0))
    logits = decoder.apply(params, decoder.inputs)
    nll = jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)
    assert float(jnp.mean(nll)) == pytest.approx(np.log(decoder.model.config.vocab), rel=0.05)


def test_the_cache_equals_the_whole_at_every_position_for_ragged_rows(decoder):
    """Rows of 3, 8 and 5 tokens are read together, then each is continued a token at a time."""
    cache, lengths = decoder.model.init_cache(B, 2 * T), np.array([3, 5, 1])
    whole = np.asarray(decoder.apply(decoder.params, decoder.inputs))
    run = jax.jit(decoder.model.apply)
    mask = np.arange(T) < lengths[:, None]
    out = run(decoder.params, {"tokens": jnp.asarray(np.where(mask, decoder.tokens, 7)), "mask": jnp.asarray(mask)}, cache)
    close(np.asarray(out.logits)[mask], whole[mask])
    rows = np.arange(B)
    for step in range(T - lengths.max()):
        at = lengths + step
        out = run(decoder.params, {"tokens": decoder.tokens[rows, at][:, None]}, out.cache)
        close(np.asarray(out.logits)[:, 0], whole[rows, at])


def test_attention_in_blocks_is_the_same_with_a_cache_and_without(decoder):
    """Long texts take that path, whatever the scores of a member have besides (sinks, caps, windows)."""
    model = decoder.model.with_policy(ops.Policy(attention="blockwise"))
    whole, run = decoder.apply(decoder.params, decoder.inputs), jax.jit(model.apply)
    close(run(decoder.params, decoder.inputs).logits, whole)
    first = run(decoder.params, decoder.tokens[:, : T - 2], model.init_cache(B, T + 3))
    last = run(decoder.params, decoder.tokens[:, T - 2 :], first.cache)
    close(jnp.concatenate([first.logits, last.logits], axis=1), whole)


def test_the_cache_with_layers_in_segments(decoder):
    params = tree.unstack(decoder.params)
    run = jax.jit(decoder.model.apply)
    first = run(params, decoder.tokens[:, : T - 1], decoder.model.init_cache(B, T))
    last = run(params, decoder.tokens[:, T - 1 :], first.cache)
    got = jnp.concatenate([first.logits, last.logits], axis=1)
    close(got, decoder.apply(decoder.params, decoder.tokens))


def test_segments_with_a_cache_are_refused(decoder):
    inputs = {"tokens": decoder.tokens, "segments": jnp.ones((B, T), jnp.int32)}
    with pytest.raises(ValueError, match="segments: given with a cache"):
        decoder.model.apply(decoder.params, inputs, decoder.model.init_cache(B, T))
