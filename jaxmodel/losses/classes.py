"""Classification losses: functions of logits and labels that return a value for each row.

`supervised` turns them into a `Loss`. Logits are `[..., C]`; labels are classes `[...]` or
distributions `[..., C]`, as mixup, CutMix and label smoothing produce them. Everything is float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxmodel.errors import ABOVE_ZERO, FROM_ZERO, SHARE, InputError, within
from jaxmodel.losses.labels import distribution


def softmax_cross_entropy(
    logits: Float[Array, "... C"], labels: Int[Array, "..."] | Float[Array, "... C"]
) -> Float[Array, "..."]:
    """Compute the cross entropy `-sum_c t_c log p_c` with `p = softmax(z)`, in nats.

    For an integer label it is `log sum_c exp(z_c) - z_label`.

    >>> float(softmax_cross_entropy(jnp.zeros((1, 4)), jnp.array([2]))[0]) == float(jnp.log(4.0))
    True
    """
    return optax.losses.softmax_cross_entropy(*_compared(logits, labels))


def focal(
    logits: Float[Array, "... C"],
    labels: Int[Array, "..."] | Float[Array, "... C"],
    gamma: float = 2.0,
) -> Float[Array, "..."]:
    """Compute the focal loss `-sum_c t_c (1 - p_c)^gamma log p_c` (Lin et al., 2017).

    Rows that are already classified well count little.

    Args:
      logits: z.
      labels: classes or distributions t.
      gamma: at least 0; at 0 the loss is the cross entropy.

    Raises:
      InputError: gamma is below 0.

    >>> logits, labels = jnp.log(jnp.array([[0.9, 0.1]])), jnp.array([0])
    >>> round(float((focal(logits, labels) / softmax_cross_entropy(logits, labels))[0]), 4)
    0.01
    """
    within("gamma", gamma, FROM_ZERO)
    if gamma == 0:
        return softmax_cross_entropy(logits, labels)
    z, t = _compared(logits, labels)
    log_p = jax.nn.log_softmax(z)
    wrong = jnp.maximum(-jnp.expm1(log_p), 1e-7)  # a power below 1 has no gradient at 0
    return -jnp.sum(t * wrong**gamma * log_p, axis=-1)


def generalized_cross_entropy(
    logits: Float[Array, "... C"], labels: Int[Array, "..."] | Float[Array, "... C"], q: float = 0.7
) -> Float[Array, "..."]:
    """Compute `sum_c t_c (1 - p_c^q) / q` (Zhang & Sabuncu, 2018).

    Rows whose label the model finds unlikely, and which may be mislabelled, have smaller gradients.

    Args:
      logits: z.
      labels: classes or distributions t, some of which may be wrong.
      q: from 0, where it is the cross entropy, to 1, where it is half of the absolute error of p,
        which is the most robust to noise and the slowest to learn.

    Raises:
      InputError: q is outside of 0 to 1.

    >>> logits = jnp.log(jnp.array([[0.25, 0.75]]))
    >>> float(generalized_cross_entropy(logits, jnp.array([0]), q=1.0)[0])
    0.75
    """
    within("q", q, SHARE)
    if q == 0:
        return softmax_cross_entropy(logits, labels)
    z, t = _compared(logits, labels)
    return -jnp.sum(t * jnp.expm1(q * jax.nn.log_softmax(z)), axis=-1) / q


def symmetric_cross_entropy(
    logits: Float[Array, "... C"],
    labels: Int[Array, "..."] | Float[Array, "... C"],
    alpha: float = 0.1,
    beta: float = 1.0,
    log_zero: float = -4.0,
) -> Float[Array, "..."]:
    """Compute `-alpha sum_c t_c log p_c - beta sum_c p_c log t_c` (Wang et al., 2019).

    The second term is bounded and makes the loss robust to label noise.

    Args:
      logits: z.
      labels: classes or distributions t, some of which may be wrong.
      alpha: the weight of the cross entropy, which makes training converge.
      beta: the weight of the reverse cross entropy, which is robust.
      log_zero: the lower limit of `log t_c`, also used for `log 0`; below 0.

    Raises:
      InputError: a weight is below 0, or `log_zero` is not.

    >>> logits, labels = jnp.log(jnp.array([[0.75, 0.25]])), jnp.array([0])
    >>> float(symmetric_cross_entropy(logits, labels, alpha=0.0)[0])
    1.0
    """
    if alpha < 0 or beta < 0 or log_zero >= 0:
        given = f"{alpha}, {beta}, {log_zero}"
        raise InputError(
            f"alpha, beta, log_zero: {given} given; allowed: at least 0, at least 0, below 0"
        )
    z, t = _compared(logits, labels)
    log_t = jnp.log(jnp.maximum(t, jnp.exp(jnp.float32(log_zero))))
    reverse = -jnp.sum(jax.nn.softmax(z) * log_t, axis=-1)
    return alpha * optax.losses.softmax_cross_entropy(z, t) + beta * reverse


def kl_divergence(
    logits: Float[Array, "... C"], teacher: Float[Array, "... C"], temperature: float = 1.0
) -> Float[Array, "..."]:
    """Compute the distillation loss `T^2 sum_c p_c (log p_c - log q_c)` (Hinton et al., 2015).

    Here `p = softmax(teacher / T)` and `q = softmax(logits / T)`. The factor `T^2` keeps the size
    of the gradient the same at every temperature.

    Args:
      logits: the student's logits.
      teacher: the teacher's logits. Gradients flow into them too: apply `jax.lax.stop_gradient`
        where they are computed in the same function.
      temperature: T above 0; the higher it is, the more the unlikely classes count.

    Raises:
      InputError: the temperature is not above 0.

    >>> float(kl_divergence(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0]]))[0])
    0.0
    """
    within("temperature", temperature, ABOVE_ZERO)
    log_q, log_p = (
        jax.nn.log_softmax(z.astype(jnp.float32) / temperature) for z in (logits, teacher)
    )
    return temperature**2 * optax.losses.kl_divergence_with_log_targets(log_q, log_p)


def _compared(logits: Array, labels: Array) -> tuple[Float[Array, "... C"], Float[Array, "... C"]]:
    """Return the logits z in float32, and the distributions t."""
    t = distribution(labels, logits.shape[-1])
    if t.shape != logits.shape:
        raise InputError(
            f"labels: the shape {list(labels.shape)} given with logits {list(logits.shape)}; "
            "allowed: one for each row"
        )
    return logits.astype(jnp.float32), t
