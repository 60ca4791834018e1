"""Functions of an auto-encoder's code.

They sample it, keep its largest entries, and measure its distance from a prior.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxmodel.errors import InputError


def sample_normal(
    mean: Float[Array, "B Z"], log_variance: Float[Array, "B Z"], rng: Key[Array, ""] | None
) -> Float[Array, "B Z"]:
    """Sample `mean + exp(log_variance / 2) * noise` (Kingma & Welling, 2014).

    Without an rng it returns the mean.

    >>> mean, log_variance = jnp.ones((1, 2)), jnp.full((1, 2), -100.0)
    >>> sample_normal(mean, log_variance, jax.random.key(0)).tolist()  # almost no variance
    [[1.0, 1.0]]
    """
    if rng is None:
        return mean
    return mean + jnp.exp(0.5 * log_variance) * jax.random.normal(rng, mean.shape, mean.dtype)


def kl_to_normal(
    mean: Float[Array, "B Z"], log_variance: Float[Array, "B Z"]
) -> Float[Array, " B"]:
    """Compute `KL(N(mean, variance) || N(0, 1))` of each row, in nats.

    It is `sum (mean^2 + variance - 1 - log variance) / 2`.

    >>> kl_to_normal(jnp.array([[0.0, 2.0]]), jnp.zeros((1, 2))).tolist()
    [2.0]
    """
    mean = mean.astype(jnp.float32)
    log_variance = log_variance.astype(jnp.float32)
    return 0.5 * jnp.sum(mean**2 + jnp.exp(log_variance) - 1 - log_variance, axis=-1)


def kl_of_rates(code: Float[Array, "B Z"], rate: float) -> Float[Array, ""]:
    """Compute `sum_j KL(rate || mean over the batch of code_j)` of Bernoulli variables, in nats.

    Source: Ng, 2011.

    Args:
      code: the activations, in (0, 1).
      rate: the desired mean activation of each entry.

    >>> float(kl_of_rates(jnp.full((3, 4), 0.25), 0.25))
    0.0
    """
    mean = jnp.clip(jnp.mean(code.astype(jnp.float32), axis=0), 1e-6, 1 - 1e-6)
    return jnp.sum(rate * jnp.log(rate / mean) + (1 - rate) * jnp.log((1 - rate) / (1 - mean)))


def keep_top(code: Float[Array, "B Z"], k: int) -> Float[Array, "B Z"]:
    """Keep the `k` largest entries of each row if they are positive; the others are zero.

    Never more than `k` are kept: of equal entries, which are frequent in bfloat16, the first ones
    (Gao et al., 2024).

    Raises:
      InputError: k is not between 1 and Z.

    >>> keep_top(jnp.array([[3.0, -1.0, 2.0, 5.0]]), 2).tolist()
    [[3.0, 0.0, 0.0, 5.0]]
    """
    if not 0 < k <= code.shape[-1]:
        raise InputError(f"k: {k} given; allowed: 1 to {code.shape[-1]}, the width of the code")
    values, places = jax.lax.top_k(code, k)
    rows = jnp.arange(code.shape[0])[:, None]
    return jnp.zeros_like(code).at[rows, places].set(jax.nn.relu(values), unique_indices=True)
