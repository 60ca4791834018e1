"""Normalisation, computed in float32."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodel.errors import InputError
from jaxmodel.leaves.leaf import register, static


def rms_norm(
    x: Float[Array, "... D"], weight: Float[Array, " D"], eps: float
) -> Float[Array, "... D"]:
    """Compute `x / sqrt(mean(x^2) + eps) * weight`, in x's dtype (Zhang & Sennrich, 2019)."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * on_last(weight.astype(jnp.float32), x.ndim)).astype(x.dtype)


def layer_norm(
    x: Float[Array, "... D"],
    weight: Float[Array, " D"],
    bias: Float[Array, " D"] | None,
    eps: float,
) -> Float[Array, "... D"]:
    """Compute `(x - mean) / sqrt(var + eps) * weight + bias`, in x's dtype (Ba et al., 2016)."""
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    wide = wide * on_last(weight.astype(jnp.float32), x.ndim)
    return (wide if bias is None else wide + on_last(bias.astype(jnp.float32), x.ndim)).astype(
        x.dtype
    )


def group_norm(
    x: Float[Array, "B *space D"],
    weight: Float[Array, " D"],
    bias: Float[Array, " D"],
    groups: int,
    eps: float,
) -> Float[Array, "B *space D"]:
    """Compute `(x - mean) / sqrt(var + eps) * weight + bias` over groups of channels, in x's dtype.

    The moments are those of each row's groups of channels (Wu & He, 2018).

    Raises:
      InputError: the number of groups does not divide the channels.
    """
    if groups < 1 or x.shape[-1] % groups:
        raise InputError(
            f"groups: {groups} given; allowed: a divisor of the {x.shape[-1]} channels"
        )
    wide = x.astype(jnp.float32).reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    wide = wide - jnp.mean(wide, axis=(1, 3), keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=(1, 3), keepdims=True) + eps)
    wide = wide.reshape(x.shape) * on_last(weight.astype(jnp.float32), x.ndim)
    return (wide + on_last(bias.astype(jnp.float32), x.ndim)).astype(x.dtype)


def batch_norm(
    x: Float[Array, "B *space D"],
    weight: Float[Array, " D"],
    bias: Float[Array, " D"],
    mean: Any,
    variance: Float[Array, " D"],
    eps: float,
    train: bool = False,
) -> Float[Array, "B *space D"]:
    """Compute `(x - mean) / sqrt(variance + eps) * weight + bias` of each channel, in x's dtype.

    Source: Ioffe & Szegedy, 2015.

    Args:
      x: activations.
      weight: the factor of the normalised values.
      bias: what is added to them.
      mean: the running mean `[D]`, by which inference normalises. It is set, not trained, so it has
        no gradient; see `jaxmodel.train.recalibrate_batch_norm`. Or a `BatchStatsProbe`, which also
        measures x.
      variance: the running variance, likewise.
      eps: added to the variance.
      train: normalise by the moments of x itself, over all axes but the last, for the rows that
        count (see `BatchStatsProbe`).
    """
    measured = mean if isinstance(mean, BatchStatsProbe) else None
    counts = None if measured is None else measured.counts
    wide = x.astype(jnp.float32)
    if train or (measured is not None and measured.own):
        center = _mean(wide, counts)
        wide = wide - on_last(center, x.ndim)
        spread = _mean(wide * wide, counts)
    else:
        center: Any = mean if measured is None else measured.mean
        center, spread = (jax.lax.stop_gradient(a.astype(jnp.float32)) for a in (center, variance))
        wide = wide - on_last(center, x.ndim)
    scale = jax.lax.rsqrt(spread + eps) * weight.astype(jnp.float32)
    y = (wide * on_last(scale, x.ndim) + on_last(bias.astype(jnp.float32), x.ndim)).astype(x.dtype)
    if measured is None or measured.zeros is None:
        return y
    return _tap(y, jax.lax.stop_gradient(x), measured.mean, counts, measured.zeros)


def _mean(wide: Float[Array, "B *space D"], counts: Array | None) -> Float[Array, " D"]:
    """Return the mean of each channel over the rows that count."""
    axes = tuple(range(wide.ndim - 1))
    if counts is None:
        return jnp.mean(wide, axis=axes)
    places = math.prod(wide.shape[1:-1])
    total = jnp.maximum(jnp.sum(counts, dtype=jnp.float32), 1.0) * places
    return jnp.sum(wide, axis=axes, where=counts.reshape(-1, *[1] * (wide.ndim - 1))) / total


@register
class BatchStatsProbe:
    """A replacement of a batch norm's `mean` that does more than normalise.

    `counts` marks the rows of the batch whose moments are taken; rows that only fill up a batch do
    not count. `zeros` measures the input, as a `Probe` does for a contraction: the gradient of
    anything downstream with respect to the zeros is, for each channel, the number of values of x,
    the sum of `x - mean` and the sum of its squares. They are sums, so those of batches and shards
    can be added. They are taken around a mean that is nearly right, since otherwise the variance
    would be the difference of two large numbers.

    Attributes:
      mean: `[D]`, with a leading axis of layers if they are stacked.
      zeros: a dict of `count` `[]`, `sum` and `square` `[D]`, with leading layers as above; None to
        measure nothing.
      counts: bool `[B]`, with leading layers as above; None for all rows.
      own: whether each batch is normalised by its own moments, as in training, rather than by
        `mean` and `variance`.
    """

    mean: Any
    zeros: Any = None
    counts: Any = None
    own: bool = static(default=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """The mean's shape."""
        return self.mean.shape

    @property
    def dtype(self) -> jnp.dtype:
        """The mean's dtype."""
        return self.mean.dtype


@jax.custom_vjp
def _tap(y: Array, x: Array, mean: Array, counts: Array | None, zeros: dict[str, Array]) -> Array:
    return y


def _forward(
    y: Array, x: Array, mean: Array, counts: Array | None, zeros: dict[str, Array]
) -> tuple[Array, tuple[Any, ...]]:
    return y, (x, mean, counts)


def _backward(saved: tuple[Any, ...], g: Array) -> tuple[Any, ...]:
    x, mean, counts = saved
    wide = x.astype(jnp.float32) - on_last(mean.astype(jnp.float32), x.ndim)
    rows = jnp.ones(len(x), bool) if counts is None else counts
    wide = jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), wide, 0.0).reshape(-1, x.shape[-1])
    count = jnp.sum(rows, dtype=jnp.float32) * math.prod(x.shape[1:-1])
    return (
        g,
        None,
        None,
        None,
        {"count": count, "sum": jnp.sum(wide, axis=0), "square": jnp.sum(wide * wide, axis=0)},
    )


_tap.defvjp(_forward, _backward)


def on_last(vector: Array, ndim: int) -> Array:
    """Reshape a vector to the last of `ndim` axes, so that ranks are not promoted silently."""
    return vector.reshape((1,) * (ndim - 1) + vector.shape)
