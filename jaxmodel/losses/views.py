"""Contrastive losses: two views of a row are similar, those of different rows are not."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxmodel import tree
from jaxmodel.errors import ABOVE_ZERO, InputError, within
from jaxmodel.losses.contract import Loss, row_weights, weighted_mean
from jaxmodel.models import Model


def info_nce(
    first: Float[Array, "B D"],
    second: Float[Array, "B D"],
    temperature: float = 0.1,
    counts: Bool[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """Compute InfoNCE `-log(exp(s_ii / T) / sum_j exp(s_ij / T))`, averaged over both directions.

    Here s is the cosine similarity of two vectors. Each row of `first` must find its partner among
    the B rows of `second`, and the other way round (van den Oord et al., 2018; in both directions:
    Radford et al., 2021).

    Args:
      first: the vectors of one view.
      second: the vectors of the other view.
      temperature: T, above 0.
      counts: False for rows that only fill up a batch. No row is compared with them, and their own
        value means nothing.

    Raises:
      InputError: the temperature is not above 0.

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
    """Compute NT-Xent, the loss of SimCLR (Chen et al., 2020).

    It is InfoNCE among all 2B vectors except oneself, averaged over the two views of a row.

    Args:
      first: the vectors of one view.
      second: the vectors of the other view.
      temperature: T, above 0.
      counts: as in `info_nce`.

    >>> all_alike = jnp.ones((4, 3))
    >>> bool(jnp.allclose(nt_xent(all_alike, all_alike), jnp.log(7.0)))  # a guess among seven
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
    """Make a contrastive loss of pairs of views.

    The batch has `views` `[B, 2, ...]`, two versions of the model's only input, and optionally
    `views_mask` `[B, 2, T]`, true for the tokens of texts, and `weights` `[B]`. The model reads all
    2B views as one batch, and its outputs `[2B, D]` are compared. Rows are compared with each
    other, so the loss of a batch taken in parts differs: each part has fewer rows to tell apart.

    Args:
      each: `info_nce`, `nt_xent` or your own; bind the temperature with `functools.partial`.

    Returns:
      The loss. Its only metric is `weight`, the number of rows.

    >>> from jaxmodel.models import mlp
    >>> model = mlp.model(mlp.Config(2, (3,), 4))
    >>> params = jax.jit(model.init)(jax.random.key(0))
    >>> loss = lambda views: contrastive()(model, params, {"views": views})
    >>> value, _ = jax.jit(loss)(jnp.ones((4, 2, 2)))
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
            raise InputError(f"views: the shape {list(views.shape)} given; allowed: [B, 2, ...]")
        names = list(model.inputs(1, 1))
        if len(names) != 1:
            raise InputError(
                f"model: a model that reads {', '.join(names)} given; allowed for a contrastive "
                "loss: a model of one input"
            )
        weights = row_weights(batch, views.shape[:1])
        inputs = {names[0]: views.reshape(-1, *views.shape[2:])}
        if "views_mask" in batch:
            inputs["mask"] = batch["views_mask"].reshape(inputs[names[0]].shape)
        if "weights" in batch:
            inputs["counts"] = jnp.repeat(weights > 0, 2)
        out = model.apply(params, inputs, rng=rng, train=train).logits
        pairs = out.reshape(-1, 2, out.shape[-1])
        values = each(pairs[:, 0], pairs[:, 1], counts=weights > 0 if "weights" in batch else None)
        return weighted_mean(values, weights), {"weight": jnp.sum(weights)}

    return loss


def _cosines(first: Array, second: Array, temperature: float) -> Float[Array, "N M"]:
    """Compute the cosine similarities of all pairs, divided by the temperature."""
    within("temperature", temperature, ABOVE_ZERO)
    a, b = (
        x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), 1e-24))
        for x in map(_wide, (first, second))
    )
    return jnp.einsum("nd,md->nm", a, b, precision="highest") / temperature


def _wide(x: Array) -> Array:
    return x.astype(jnp.float32)


def _others(alike: Array, counts: Array | None) -> Callable[[Array], Array]:
    """Leave out the columns that do not count, except one's own, so that no row is empty."""
    if counts is None:
        return lambda a: a
    seen = jnp.broadcast_to(counts[None, :], alike.shape) | ~jnp.broadcast_to(
        counts[:, None], alike.shape
    )
    return lambda a: jnp.where(seen, a, -jnp.inf)
