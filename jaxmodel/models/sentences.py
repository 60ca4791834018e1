"""Vectors of texts, as encoders with the head "embed" make them.

This is not an architecture: it has no `Config`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxmodel import tree
from jaxmodel.errors import InputError, at_least, one_of
from jaxmodel.models.model import Model

# batches of sentences have this length times a power of two, so that few programs are compiled
SHORTEST = 16


def _weighted(x: jax.Array, weights: jax.Array) -> jax.Array:
    return (
        jnp.einsum("BTD,BT->BD", x, weights, precision="highest")
        / jnp.maximum(weights.sum(axis=1), 1.0)[:, None]
    )


def _last(x: jax.Array, valid: jax.Array) -> jax.Array:
    last = jnp.maximum(jnp.sum(valid, axis=1, dtype=jnp.int32) - 1, 0)
    return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]


def _length(valid: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.sum(valid, axis=1, dtype=jnp.float32), 1.0)[:, None]


POOLINGS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "mean": lambda x, valid: jnp.sum(x, axis=1) / _length(valid),
    "cls": lambda x, valid: x[:, 0],
    "max": lambda x, valid: jnp.max(jnp.where(valid[..., None], x, -jnp.inf), axis=1),
    "mean_sqrt_len_tokens": lambda x, valid: jnp.sum(x, axis=1) / jnp.sqrt(_length(valid)),
    "weightedmean": lambda x, valid: _weighted(
        x, jnp.cumsum(valid, axis=1, dtype=jnp.float32) * valid.astype(jnp.float32)
    ),
    "lasttoken": _last,
}
"""Pooling functions by the names of sentence-transformers.

They take activations `[B, T, D]`, which are zero at padding.
"""


def check_pooling(ways: Sequence[str]) -> None:
    """Refuse names that are not in `POOLINGS`, and an empty list."""
    for way in ways or ("",):
        one_of("pooling", way, POOLINGS)


def pool(
    x: Float[Array, "B T D"], valid: Bool[Array, "B T"], ways: Sequence[str]
) -> Float[Array, "B E"]:
    """Pool the activations of each row to one float32 vector.

    Args:
      x: activations.
      valid: False for padding, whose activations do not count.
      ways: names of `POOLINGS`, whose results are concatenated.
    """
    x = jnp.where(valid[..., None], x.astype(jnp.float32), 0.0)
    return jnp.concatenate([POOLINGS[way](x, valid) for way in ways], axis=-1)


def embed_texts(
    bundle: Any, texts: Sequence[str], *, batch_size: int = 32, max_tokens: int | None = None
) -> np.ndarray:
    """Compute sentence embeddings of length one (Reimers & Gurevych, 2019).

    They are the last activations, pooled as `config.pooling` says. Texts of similar length share a
    batch, so that there is little padding; the results are in the order of the texts.

    Args:
      bundle: a `hub.Bundle` of a model with the head "embed" (of bert, modernbert) and its
        tokenizer.
      texts: N texts.
      batch_size: the number of texts that are computed at once.
      max_tokens: longer texts are truncated, keeping the tokenizer's last token; None for the
        `max_tokens` of the bundle's card, or else the model's context.

    Returns:
      float32 `[N, D]`; the product of two rows is their cosine similarity.

    Raises:
      InputError: the model is of another kind, there is no tokenizer, `texts` is a single string,
        or a size is out of range.
    """
    config = bundle.model.config
    if getattr(config, "head", "") != "embed":
        found = f"{bundle.model.family} {getattr(config, 'head', '')}".strip()
        raise InputError(
            f"bundle: {found} given; allowed: a bert or modernbert with the head 'embed'"
        )
    if bundle.processor is None:
        raise InputError(
            f"bundle: {bundle.card.get('name', 'it')!r} has no tokenizer; text cannot be read"
        )
    at_least("batch_size", batch_size)
    limit = (
        min(int(bundle.card.get("max_tokens", config.context)), config.context)
        if max_tokens is None
        else max_tokens
    )
    if not 2 <= limit <= config.context:
        raise InputError(f"max_tokens: {limit} given; allowed: 2 to {config.context}")
    if isinstance(texts, str):
        raise InputError(
            f"texts: a single string was given ({texts!r:.40}); give a list of strings"
        )
    prompt = str(bundle.card.get("prompt", ""))
    lower = bool(bundle.card.get("lower_case", False))
    read = (
        [prompt + (text.lower() if lower else text) for text in texts] if prompt or lower else texts
    )
    rows = [
        ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]]
        for ids in bundle.processor.encode_batch(read, True)
    ]
    out = np.zeros((len(rows), config.width * len(config.pooling)), np.float32)
    params = bundle.for_inference()
    by_length: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        by_length.setdefault(
            min(_power_of_two(max(len(row), SHORTEST)), config.context), []
        ).append(i)
    batches = [
        (n, which[at : at + batch_size])
        for n, which in by_length.items()
        for at in range(0, len(which), batch_size)
    ]
    for length, batch in batches:
        size = min(_power_of_two(len(batch)), batch_size)
        tokens = np.zeros((size, length), np.int32)
        mask = np.zeros((size, length), bool)
        for row, i in enumerate(batch):
            tokens[row, : len(rows[i])], mask[row, : len(rows[i])] = rows[i], True
        means = _embedded(
            bundle.model, params, {"tokens": jnp.asarray(tokens), "mask": jnp.asarray(mask)}
        )
        out[batch] = np.asarray(means)[: len(batch)]
    return out


def _power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least `n`."""
    return 1 << (n - 1).bit_length()


@functools.partial(jax.jit, static_argnums=0)
def _embedded(model: Model, params: tree.Params, inputs: dict[str, jax.Array]) -> jax.Array:
    means = model.apply(params, inputs).logits
    return means / jnp.maximum(jnp.linalg.norm(means, axis=-1, keepdims=True), 1e-12)
