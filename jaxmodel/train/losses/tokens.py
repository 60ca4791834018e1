"""The next token's cross entropy, over chunks of positions so that the logits need not exist at once."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmodel import tree
from jaxmodel.errors import at_least
from jaxmodel.models import Model
from jaxmodel.sharding import auto_axes, axes_of
from jaxmodel.train.losses.contract import row_weights, weighted_mean


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

    In training a model of experts adds `config.balance` times its load balance (Fedus et al., 2022): what `aux["load_balance"]`
    sums over the layers, divided by their number, so that the coefficient means the same at every depth.

    Args:
      model: a decoder, or an encoder with a decoder.
      params: its parameters.
      batch: `targets` `[B, T]`, if there `weights` `[B, T]` (0 where there is nothing to predict), and the model's inputs:
        `tokens` `[B, T]`, `segments`, `positions`, `source`.
      rng: for dropout.
      train: False for a held-out loss, which is the cross entropy alone.
      chunk: see `cross_entropy`.

    Returns:
      The loss, and `weight`, the number of tokens; of a model of experts also `load_balance`, the mean over the layers, which is
      the number of experts of a token where all are used alike.
    """
    inputs = {name: a for name, a in batch.items() if name not in ("targets", "weights")}
    out = model.hidden(params, inputs, rng=rng, train=train)
    targets = batch["targets"]
    weights = row_weights(batch, targets.shape)
    loss = weighted_mean(cross_entropy(model, params, out.hidden, targets, chunk=chunk), weights)
    metrics = {"weight": jnp.sum(weights)}
    if "load_balance" not in out.aux:
        return loss, metrics
    balance = out.aux["load_balance"] / model.config.depth
    return loss + model.config.balance * balance if train else loss, {**metrics, "load_balance": balance}


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
      chunk: positions whose logits exist at once (on all devices that they are cut over, of each at least one), so that
        `[B, T, V]` never does, in the backward pass neither; None for all.

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

    # a mesh that cuts positions has a part of every piece on each device: else the devices would gather them
    devices = math.prod(auto_axes()[name] for name in axes_of("T", model.policy.axes, length))
    own, size = length // devices, max(1, chunk // devices)

    def pieces(a: Array) -> Array:
        """`[B, T, ...]` -> `[chunks, B, devices * size, ...]`; the last is filled up with zeros."""
        a = a.reshape(a.shape[0], devices, own, *a.shape[2:])
        a = jnp.pad(a, [(0, 0), (0, 0), (0, -own % size), *[(0, 0)] * (a.ndim - 3)])
        a = jnp.moveaxis(a.reshape(a.shape[0], devices, -1, size, *a.shape[3:]), 2, 0)
        return a.reshape(*a.shape[:2], devices * size, *a.shape[4:])

    one = jax.checkpoint(lambda xs: part(*xs))  # the backward pass makes a chunk's logits again
    values = jax.lax.map(one, (pieces(hidden), pieces(targets)))
    values = jnp.moveaxis(values.reshape(*values.shape[:2], devices, size), 0, 2)
    return values.reshape(targets.shape[0], devices, -1)[:, :, :own].reshape(targets.shape)
