"""The loss of auto-encoders."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
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
    """Reconstruction plus `config.penalty` times the model's `kl` or `sparsity`, in nats, on
    average over the rows.

    The reconstruction is the negative logarithm of the likelihood without its constant:
    `sum (x - y)^2 / 2` for normals of variance 1, the cross entropy of each feature for Bernoulli
    variables. With a penalty of 1 a variational one's loss is the negative evidence lower bound
    (Kingma & Welling, 2014).

    Args:
      model: of `jaxmodel.models.autoencoder`.
      params: its parameters.
      batch: `features` `[B, N]`, if there `weights` `[B]`.
      rng: for the noise of a denoising and the sample of a variational one.
      train: False for a held-out loss.

    Returns:
      The loss, `weight`, the number of rows, and `reconstruction` and the model's aux values.
    """
    x = batch["features"].astype(jnp.float32)
    counts = {"counts": batch["weights"] > 0} if "weights" in batch else {}
    out = model.apply(params, {"features": x, **counts}, rng=rng, train=train)
    if model.config.reconstruction == "bernoulli":
        each = jax.nn.softplus(out.logits) - x * out.logits
    else:
        each = 0.5 * (x - out.logits) ** 2
    weights = row_weights(batch, each.shape[:1])
    reconstruction = weighted_mean(jnp.sum(each, axis=-1), weights)
    penalty = sum(
        (out.aux[name] for name in ("kl", "sparsity") if name in out.aux), start=jnp.float32(0)
    )
    metrics = {"weight": jnp.sum(weights), "reconstruction": reconstruction}
    return reconstruction + model.config.penalty * penalty, {**metrics, **out.aux}
