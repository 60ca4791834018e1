"""Losses: `loss(model, params, batch, rng, train=True) -> (scalar, metrics)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmodel import tree
from jaxmodel.errors import at_least
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
      chunk: see `cross_entropy`.

    Returns:
      The loss, and `tokens`, the sum of the weights.
    """
    inputs = {name: batch[name] for name in ("tokens", "segments", "positions") if name in batch}
    x = model.hidden(params, inputs, rng=rng, train=train).hidden
    targets = batch["targets"]
    weights = batch.get("weights", jnp.ones(targets.shape, jnp.float32))
    tokens = jnp.sum(weights)
    total = jnp.sum(cross_entropy(model, params, x, targets, chunk=chunk) * weights)
    return total / jnp.maximum(tokens, 1.0), {"tokens": tokens}


def cross_entropy(
    model: Model,
    params: tree.Params,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    *,
    chunk: int | None = None,
) -> Float[Array, "B T"]:
    """Cross entropy of each target: `log sum_v exp(z_v) - z_target` with `z = head(hidden)`, in nats.

    Args:
      model: its head is run.
      params: its parameters.
      hidden: what `model.hidden` gives.
      targets: the token that each position should predict.
      chunk: positions whose logits exist at once, so that `[B, T, V]` never does, in the backward pass neither; None for all.

    Raises:
      InputError: a chunk below 1.
    """

    def part(x: Array, targets: Array) -> Array:
        logits = model.parts.head(params, x)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen

    length = targets.shape[1]
    if chunk is not None:
        at_least("chunk", chunk)
    if chunk is None or chunk >= length:
        return part(hidden, targets)

    def pieces(a: Array) -> Array:
        """`[B, T, ...]` -> `[chunks, B, chunk, ...]`; the last is filled up with zeros."""
        a = jnp.pad(a, [(0, 0), (0, -length % chunk), *[(0, 0)] * (a.ndim - 2)])
        return jnp.moveaxis(a.reshape(a.shape[0], -1, chunk, *a.shape[2:]), 1, 0)

    one = jax.checkpoint(lambda xs: part(*xs))  # the backward pass makes a chunk's logits again
    values = jnp.moveaxis(jax.lax.map(one, (pieces(hidden), pieces(targets))), 0, 1)
    return values.reshape(targets.shape[0], -1)[:, :length]
