"""Losses of classes: functions of logits `[..., C]` and labels with a value for each row;
`supervised` makes a loss of them.

Labels are classes `[...]` or distributions `[..., C]`, as mixup, CutMix and smoothing make them.
Everything is float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmodel.errors import InputError
from jaxmodel.losses.labels import distribution


def softmax_cross_entropy(
    logits: Float[Array, "... C"], labels: Int[Array, "..."] | Float[Array, "... C"]
) -> Float[Array, "..."]:
    """`-sum_c t_c log p_c` with `p = softmax(z)`, in nats: `log sum_c exp(z_c) - z_label` for a
    whole number.

    >>> float(softmax_cross_entropy(jnp.zeros((1, 4)), jnp.array([2]))[0]) == float(jnp.log(4.0))
    True
    """
    log_p, t = _compared(logits, labels)
    return -jnp.sum(t * log_p, axis=-1)


def focal(
    logits: Float[Array, "... C"],
    labels: Int[Array, "..."] | Float[Array, "... C"],
    gamma: float = 2.0,
) -> Float[Array, "..."]:
    """`-sum_c t_c (1 - p_c)^gamma log p_c`: rows that are right already count little (Lin et al.,
    2017).

    Args:
      logits: z.
      labels: classes or distributions t.
      gamma: at least 0, where it is the cross entropy.

    Raises:
      InputError: a gamma below 0.

    >>> logits, labels = jnp.log(jnp.array([[0.9, 0.1]])), jnp.array([0])
    >>> round(float((focal(logits, labels) / softmax_cross_entropy(logits, labels))[0]), 4)
    0.01
    """
    if gamma < 0:
        raise InputError(f"gamma: {gamma} given; allowed: at least 0")
    log_p, t = _compared(logits, labels)
    if gamma == 0:
        return -jnp.sum(t * log_p, axis=-1)
    wrong = jnp.maximum(-jnp.expm1(log_p), 1e-7)  # a power below 1 has no slope at 0
    return -jnp.sum(t * wrong**gamma * log_p, axis=-1)


def generalized_cross_entropy(
    logits: Float[Array, "... C"], labels: Int[Array, "..."] | Float[Array, "... C"], q: float = 0.7
) -> Float[Array, "..."]:
    """`sum_c t_c (1 - p_c^q) / q`: labels that are believed to be wrong pull less (Zhang & Sabuncu,
    2018).

    Args:
      logits: z.
      labels: classes or distributions t, some of them wrong.
      q: from 0, where it is the cross entropy, to 1, where it is half of the absolute error of p,
        which noise moves least and which learns most slowly.

    Raises:
      InputError: a q outside of 0 to 1.

    >>> logits = jnp.log(jnp.array([[0.25, 0.75]]))
    >>> float(generalized_cross_entropy(logits, jnp.array([0]), q=1.0)[0])
    0.75
    """
    if not 0 <= q <= 1:
        raise InputError(f"q: {q} given; allowed: 0 to 1")
    log_p, t = _compared(logits, labels)
    return -jnp.sum(t * (jnp.expm1(q * log_p) / q if q else log_p), axis=-1)


def symmetric_cross_entropy(
    logits: Float[Array, "... C"],
    labels: Int[Array, "..."] | Float[Array, "... C"],
    alpha: float = 0.1,
    beta: float = 1.0,
    log_zero: float = -4.0,
) -> Float[Array, "..."]:
    """`-alpha sum_c t_c log p_c - beta sum_c p_c log t_c`: the second term is bounded and
    withstands noise (Wang et al., 2019).

    Args:
      logits: z.
      labels: classes or distributions t, some of them wrong.
      alpha: of the cross entropy, which converges.
      beta: of the reverse one, which withstands.
      log_zero: what stands for the logarithm of 0 and of all that is below it; below 0.

    Raises:
      InputError: a weight below 0, or a `log_zero` that is not below 0.

    >>> logits, labels = jnp.log(jnp.array([[0.75, 0.25]])), jnp.array([0])
    >>> float(symmetric_cross_entropy(logits, labels, alpha=0.0)[0])
    1.0
    """
    if alpha < 0 or beta < 0 or log_zero >= 0:
        given = f"{alpha}, {beta}, {log_zero}"
        raise InputError(
            f"alpha, beta, log_zero: {given} given; allowed: at least 0, at least 0, below 0"
        )
    log_p, t = _compared(logits, labels)
    log_t = jnp.log(jnp.maximum(t, jnp.exp(jnp.float32(log_zero))))
    return -alpha * jnp.sum(t * log_p, axis=-1) - beta * jnp.sum(jnp.exp(log_p) * log_t, axis=-1)


def kl_divergence(
    logits: Float[Array, "... C"], teacher: Float[Array, "... C"], temperature: float = 1.0
) -> Float[Array, "..."]:
    """`T^2 sum_c p_c (log p_c - log q_c)` with `p = softmax(teacher / T)`,
    `q = softmax(logits / T)` (Hinton et al., 2015).

    The square keeps the size of the gradient the same at every temperature.

    Args:
      logits: of the student.
      teacher: logits of the teacher. They have a gradient too; `jax.lax.stop_gradient` them where
        they are computed beside.
      temperature: T above 0; the higher, the more the unlikely classes count.

    Raises:
      InputError: a temperature that is not above 0.

    >>> float(kl_divergence(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0]]))[0])
    0.0
    """
    if temperature <= 0:
        raise InputError(f"temperature: {temperature} given; allowed: above 0")
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1)
    log_p = jax.nn.log_softmax(teacher.astype(jnp.float32) / temperature, axis=-1)
    return temperature**2 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def _compared(logits: Array, labels: Array) -> tuple[Float[Array, "... C"], Float[Array, "... C"]]:
    """`log p` and the distributions t."""
    t = distribution(labels, logits.shape[-1])
    if t.shape != logits.shape:
        raise InputError(
            f"labels: the shape {list(labels.shape)} given with logits {list(logits.shape)}; "
            f"needed is one a row"
        )
    return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1), t
