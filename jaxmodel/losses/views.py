"""Contrastive losses: two views of a row are alike, those of other rows are not."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxmodel import tree
from jaxmodel.errors import InputError
from jaxmodel.losses.contract import Loss, row_weights, weighted_mean
from jaxmodel.models import Model


def info_nce(
    first: Float[Array, "B D"],
    second: Float[Array, "B D"],
    temperature: float = 0.1,
    counts: Bool[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """`-log(exp(s_ii / T) / sum_j exp(s_ij / T))`, on average over both directions, with s the
    cosine of two views' vectors.

    Each row of `first` finds its partner among the B of `second`, and the other way round (van den
    Oord et al., 2018; in both directions: Radford et al., 2021).

    Args:
      first: vectors of one view.
      second: of the other.
      temperature: T, above 0.
      counts: False for rows that fill a batch up, which nothing is compared with; their own value
        means nothing.

    Raises:
      InputError: a temperature that is not above 0.

    >>> all_alike = jnp.ones((4, 3))
    >>> bool(jnp.allclose(info_nce(all_alike, all_alike), jnp.log(4.0)))  # a guess among four
    True
    """
    alike = _cosines(first, second, temperature)
    there = _others(alike, counts)
    rows, columns = (jax.nn.logsumexp(there(a), axis=1) for a in (alike, alike.T))
    return (rows + columns) / 2 - jnp.diagonal(alike)


def nt_xent(
    first: Float[Array, "B D"],
    second: Float[Array, "B D"],
    temperature: float = 0.5,
    counts: Bool[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """InfoNCE among all 2B vectors but oneself, on average over a row's two: the loss of SimCLR
    (Chen et al., 2020).

    Args:
      first: vectors of one view.
      second: of the other.
      temperature: T, above 0.
      counts: as in `info_nce`.

    >>> all_alike = jnp.ones((4, 3))
    >>> bool(jnp.allclose(nt_xent(all_alike, all_alike), jnp.log(7.0)))  # a guess among eight but oneself
    True
    """
    rows = first.shape[0]
    both = jnp.concatenate([first, second])
    alike = _cosines(both, both, temperature)
    there = _others(alike, None if counts is None else jnp.concatenate([counts, counts]))
    others = jnp.where(jnp.eye(2 * rows, dtype=bool), -jnp.inf, there(alike))
    each = jax.nn.logsumexp(others, axis=1)
    return (each[:rows] + each[rows:]) / 2 - jnp.diagonal(alike, offset=rows)


def contrastive(each: Callable[..., Array] = nt_xent) -> Loss:
    """A loss of pairs of views: the batch has `views` `[B, 2, ...]`, twice the model's one input,
    and if there `weights` `[B]`.

    The model reads all 2B views as one batch; what it gives, `[2B, D]`, is compared. Rows are
    compared with each other, so the loss of a batch in parts is another, with fewer rows to tell
    apart.

    Args:
      each: `info_nce` or `nt_xent`, with its temperature bound, or the like.

    Returns:
      The loss. Its one metric is `weight`, the number of rows.

    >>> from jaxmodel.models import mlp
    >>> model = mlp.model(mlp.Config(2, (3,), 4))
    >>> loss = lambda views: contrastive()(model, model.init(jax.random.key(0)), {"views": views})[0]
    >>> value = jax.jit(loss)(jnp.ones((4, 2, 2)))
    >>> bool(jnp.allclose(value, jnp.log(7.0)))
    True
    """

    def loss(
        model: Model,
        params: tree.Params,
        batch: Mapping[str, Array],
        rng: Array | None = None,
        *,
        train: bool = True,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        views = batch["views"]
        if views.ndim < 2 or views.shape[1] != 2:
            raise InputError(f"views: the shape {list(views.shape)} given; needed is [B, 2, ...]")
        names = list(model.inputs(1, 1))
        if len(names) != 1:
            raise InputError(
                f"model: one that reads {', '.join(names)} given; a contrastive loss needs a "
                f"model of one input"
            )
        weights = row_weights(batch, views.shape[:1])
        inputs = {names[0]: views.reshape(-1, *views.shape[2:])}
        if "weights" in batch:
            inputs["counts"] = jnp.repeat(weights > 0, 2)
        out = model.apply(params, inputs, rng=rng, train=train).logits
        pairs = out.reshape(-1, 2, out.shape[-1])
        values = each(pairs[:, 0], pairs[:, 1], counts=weights > 0 if "weights" in batch else None)
        return weighted_mean(values, weights), {"weight": jnp.sum(weights)}

    return loss


def _cosines(first: Array, second: Array, temperature: float) -> Float[Array, "N M"]:
    """Cosines of all pairs, divided by the temperature."""
    if temperature <= 0:
        raise InputError(f"temperature: {temperature} given; allowed: above 0")
    a, b = (
        x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), 1e-24))
        for x in map(_wide, (first, second))
    )
    return jnp.einsum("nd,md->nm", a, b, precision="highest") / temperature


def _wide(x: Array) -> Array:
    return x.astype(jnp.float32)


def _others(alike: Array, counts: Array | None) -> Callable[[Array], Array]:
    """Leaves out the columns that do not count, but for one's own, so that no row is empty."""
    if counts is None:
        return lambda a: a
    seen = jnp.broadcast_to(counts[None, :], alike.shape) | ~jnp.broadcast_to(
        counts[:, None], alike.shape
    )
    return lambda a: jnp.where(seen, a, -jnp.inf)
