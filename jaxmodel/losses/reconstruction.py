"""The loss of auto-encoders."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxmodel import tree
from jaxmodel.losses.contract import row_weights, weighted_mean
from jaxmodel.models import Model


def autoencoder(
    model: Model,
    params: tree.Params,
    batch: Mapping[str, Array],
    rng: Array | None = None,
    *,
    train: bool = True,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Compute the reconstruction loss plus `config.penalty` times the model's `kl` or `sparsity`.

    It is in nats, a mean over the rows. The reconstruction loss is the negative log likelihood
    without its constant: `sum (x - y)^2 / 2` for normal variables of variance 1, the cross entropy
    of each feature for Bernoulli variables. With a penalty of 1, the loss of a variational
    auto-encoder is the negative evidence lower bound (Kingma & Welling, 2014).

    Args:
      model: a model of `jaxmodel.models.autoencoder`.
      params: its parameters.
      batch: `features` `[B, N]` and optionally `weights` `[B]`.
      rng: the key for the noise of a denoising and the sample of a variational auto-encoder.
      train: False for evaluation.

    Returns:
      The loss, and the metrics `weight` (the number of rows), `reconstruction` and the model's aux
      values.
    """
    x = batch["features"].astype(jnp.float32)
    counts = {"counts": batch["weights"] > 0} if "weights" in batch else {}
    out = model.apply(params, {"features": x, **counts}, rng=rng, train=train)
    if model.config.reconstruction == "bernoulli":
        each = optax.losses.sigmoid_binary_cross_entropy(out.logits, x)
    else:
        each = optax.losses.l2_loss(out.logits, x)
    weights = row_weights(batch, each.shape[:1])
    reconstruction = weighted_mean(jnp.sum(each, axis=-1), weights)
    penalty = sum(
        (out.aux[name] for name in ("kl", "sparsity") if name in out.aux), start=jnp.float32(0)
    )
    metrics = {"weight": jnp.sum(weights), "reconstruction": reconstruction}
    return reconstruction + model.config.penalty * penalty, {**metrics, **out.aux}
