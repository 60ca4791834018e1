"""Losses: `loss(model, params, batch, rng, train=True) -> (scalar, metrics)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodel import tree
from jaxmodel.errors import InputError
from jaxmodel.models import Model

type Loss = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


def next_token(
    model: Model,
    params: tree.Params,
    batch: Mapping[str, Array],
    rng: Array | None = None,
    *,
    train: bool = True,
    chunk: int | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean cross entropy of the next token, in nats, over the positions with weight.

    Args:
      model: a decoder.
      params: its parameters.
      batch: `tokens`, `targets` `[B, T]`, and if there `weights` (0 where there is nothing to predict), `segments`,
        `positions`.
      rng: for dropout.
      train: False for a held-out loss.
      chunk: positions whose logits exist at once, so that `[B, T, V]` never does; None for all. It divides T.
    """
    inputs = {name: batch[name] for name in ("tokens", "segments", "positions") if name in batch}
    x = model.hidden(params, inputs, rng=rng, train=train).hidden
    targets = batch["targets"]
    weights = batch.get("weights", jnp.ones(targets.shape, jnp.float32))

    def part(x: Array, targets: Array, weights: Array) -> Array:
        logits = model.parts.head(params, x)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - chosen) * weights)

    if chunk is None or chunk >= targets.shape[1]:
        total = part(x, targets, weights)
    elif targets.shape[1] % chunk:
        raise InputError(f"chunk: {chunk} does not divide the {targets.shape[1]} positions of the batch")
    else:
        pieces = [jnp.moveaxis(a.reshape(a.shape[0], -1, chunk, *a.shape[2:]), 1, 0) for a in (x, targets, weights)]
        total, _ = jax.lax.scan(lambda sum_, xs: (sum_ + jax.checkpoint(part)(*xs), None), jnp.zeros(()), tuple(pieces))
    count = jnp.maximum(jnp.sum(weights), 1.0)
    return total / count, {"tokens": jnp.sum(weights)}
