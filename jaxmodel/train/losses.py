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
      The loss, and `tokens`, the sum of the weights; of a model of experts also `load_balance`, the mean over the layers, which
      is the number of experts of a token where all are used alike.
    """
    inputs = {name: a for name, a in batch.items() if name not in ("targets", "weights")}
    out = model.hidden(params, inputs, rng=rng, train=train)
    targets = batch["targets"]
    weights = batch.get("weights", jnp.ones(targets.shape, jnp.float32))
    tokens = jnp.sum(weights)
    loss = jnp.sum(cross_entropy(model, params, out.hidden, targets, chunk=chunk) * weights) / jnp.maximum(tokens, 1.0)
    if "load_balance" not in out.aux:
        return loss, {"tokens": tokens}
    balance = out.aux["load_balance"] / model.config.depth
    return loss + model.config.balance * balance if train else loss, {"tokens": tokens, "load_balance": balance}


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


def autoencoder(
    model: Model, params: tree.Params, batch: Mapping[str, Array], rng: Array | None = None, *, train: bool = True
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Reconstruction plus `config.penalty` times the model's `kl` or `sparsity`, in nats, on average over the rows.

    The reconstruction is the negative logarithm of the likelihood without its constant: `sum (x - y)^2 / 2` for normals of
    variance 1, the cross entropy of each feature for Bernoulli variables. With a penalty of 1 a variational one's loss is the
    negative evidence lower bound (Kingma & Welling, 2014).

    Args:
      model: of `jaxmodel.models.autoencoder`.
      params: its parameters.
      batch: `features` `[B, N]`.
      rng: for the noise of a denoising and the sample of a variational one.
      train: False for a held-out loss.

    Returns:
      The loss, and `reconstruction` and the model's aux values.
    """
    x = batch["features"].astype(jnp.float32)
    out = model.apply(params, {"features": x}, rng=rng, train=train)
    if model.config.reconstruction == "bernoulli":
        each = jax.nn.softplus(out.logits) - x * out.logits
    else:
        each = 0.5 * (x - out.logits) ** 2
    reconstruction = jnp.mean(jnp.sum(each, axis=-1))
    penalty = sum((out.aux[name] for name in ("kl", "sparsity") if name in out.aux), start=jnp.float32(0))
    return reconstruction + model.config.penalty * penalty, {"reconstruction": reconstruction, **out.aux}


def classification(
    model: Model,
    params: tree.Params,
    batch: Mapping[str, Array],
    rng: Array | None = None,
    *,
    train: bool = True,
    smoothing: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean cross entropy of the classes, in nats: `log sum_c exp(z_c) - (1 - s) z_label - s mean_c z_c`.

    Args:
      model: whose logits are `[B, C]`.
      params: its parameters.
      batch: `labels` `[B]`, and the model's inputs. A label that is no class gives NaN.
      rng: for dropout.
      train: False for a held-out loss.
      smoothing: s, the share of each label that is spread over all classes (Szegedy et al., 2015).

    Returns:
      The loss, and `accuracy`, the share of rows whose largest logit is the label's.
    """
    labels = batch["labels"]
    inputs = {name: a for name, a in batch.items() if name != "labels"}
    logits = model.apply(params, inputs, rng=rng, train=train).logits
    chosen = jnp.take_along_axis(logits, labels[:, None], axis=-1, mode="fill")[:, 0]
    loss = jax.nn.logsumexp(logits, axis=-1) - (1 - smoothing) * chosen - smoothing * jnp.mean(logits, axis=-1)
    right = jnp.argmax(logits, axis=-1).astype(labels.dtype) == labels
    return jnp.mean(loss), {"accuracy": jnp.mean(right.astype(jnp.float32))}
