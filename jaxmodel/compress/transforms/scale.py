"""Scale migration: channels with large inputs get smaller ones, and larger weights."""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodel import tree
from jaxmodel.compress.draft import opened
from jaxmodel.compress.observe import Stats
from jaxmodel.compress.quantize.rtn import Rtn
from jaxmodel.compress.stats import Places, places, statistic, stats_of
from jaxmodel.compress.transforms.moves import (
    Feed,
    Map,
    gathered,
    move,
    one_reader,
    plain,
    spread,
    survey,
)
from jaxmodel.compress.transforms.transform import Transform
from jaxmodel.errors import InputError
from jaxmodel.leaves import Compressed, Turned
from jaxmodel.models import Model
from jaxmodel.schema import Count, Range, Share
from jaxmodel.text_form import name_of

_LEAST = 1e-5  # of a factor, and of what it is made of


@dataclasses.dataclass(frozen=True)
class Smooth(Transform):
    """Move the size of inputs into weights, so that both are easy to round.

    A channel j of an input is divided by `s_j = |x_j|^alpha / max|W_j|^(1 - alpha)`, and the
    weights that read it are multiplied with it (SmoothQuant: Xiao et al., 2023). `|x_j|` is the
    root mean square, a sum that batches and shards add to, where the paper has the maximum. The
    factor moves into the norm or the linear map in front of the weights (`Axes.feeds`), and the
    model computes the same as before.

    Attributes:
      alpha: how much of the input's size moves into the weights.
      online: also scale the inputs of matrices that nothing feeds by itself, when the model runs:
        such a leaf becomes a `Turned` one.
    """

    alpha: Share = 0.5
    online: bool = False

    needs: ClassVar[tuple[str, ...]] = ("square",)

    def inputs(self, model: Model, params: tree.Params) -> frozenset[str]:
        """Return one reader of each feed, and with `online` all other matrices."""
        known = _survey(self, model, params, needed=not self.online)
        rest = _unfed(known, params) if self.online else ()
        return frozenset((*(one_reader(known, feed) for feed in known.feeds), *rest))

    def change(
        self, model: Model, params: tree.Params, stats: Stats, key: jax.Array
    ) -> tuple[Model, tree.Params]:
        """Return the model, as it is, and its parameters with other scales."""
        known = _survey(self, model, params, needed=not self.online)
        leaves = tree.flatten(tree.unstack(params))
        where = places(stats, leaves)
        for feed in known.feeds:
            size = _sizes(known, feed, stats, where)
            weight = functools.reduce(
                jnp.maximum,
                [gathered(known, feed, _largest(leaves, path), path) for path in feed.readers],
            )
            move(known, leaves, feed, self._factor(size, weight))
        for path in _unfed(known, params) if self.online else ():
            size = _rms(path, stats, where)
            factor = self._factor(size, _largest(leaves, path))[..., None, :]
            leaf = leaves[path]
            leaves[path] = Turned((leaf * factor).astype(leaf.dtype), 1 / factor)
        return model, tree.stack(tree.unflatten(leaves))

    def _factor(self, size: Array, weight: Array) -> Array:
        size = jnp.maximum(size, _LEAST) ** self.alpha
        return jnp.maximum(size / jnp.maximum(weight, _LEAST) ** (1 - self.alpha), _LEAST)


@dataclasses.dataclass(frozen=True)
class Awq(Transform):
    """Scale up the weights that meet large inputs, as far as rounding them gets better.

    For each set of matrices that read one input, the factor is `s_j = |x_j|^alpha`, scaled so that
    its largest and smallest value are inverses, with the alpha of a grid that gives the smallest
    error of the outputs after rounding to nearest (AWQ: Lin et al., 2024). The factor moves into
    the norm or the linear map in front (`Axes.feeds`), and the model computes the same as before.

    Attributes:
      bits: of the rounding that comes afterwards.
      group: of this rounding; None for whole rows.
      symmetric: whether this rounding is.
      points: how many values of alpha are tried, from 0 on, below 1.
    """

    bits: Annotated[int, Range(1, 8)] = 4
    group: Count | None = None
    symmetric: bool = True
    points: Annotated[int, Range(2, 100)] = 20

    needs: ClassVar[tuple[str, ...]] = ("gram",)

    def inputs(self, model: Model, params: tree.Params) -> frozenset[str]:
        """Return one reader of each feed."""
        known = _survey(self, model, params)
        return frozenset(one_reader(known, feed) for feed in known.feeds)

    def change(
        self, model: Model, params: tree.Params, stats: Stats, key: jax.Array
    ) -> tuple[Model, tree.Params]:
        """Return the model, as it is, and its parameters with other scales."""
        known = _survey(self, model, params)
        leaves = tree.flatten(tree.unstack(params))
        where = places(stats, leaves)
        alphas = jnp.arange(self.points, dtype=jnp.float32) / self.points
        for feed in known.feeds:
            size = jnp.maximum(_sizes(known, feed, stats, where), _LEAST)
            each = feed.letters.index("E") if "E" in feed.letters else None
            units = tuple(i for i in range(len(feed.shape)) if i != each)
            log = jnp.log(size)
            middle = (log.max(axis=units, keepdims=True) + log.min(axis=units, keepdims=True)) / 2
            power = alphas.reshape(-1, *(1,) * log.ndim)
            factors = jnp.exp(power * (log - middle)[None])
            gram = statistic("gram", one_reader(known, feed), stats, where)
            error: Any = 0.0
            for path in feed.readers:
                if known.letters[path].role == "router":
                    continue  # it is not rounded
                columns = jnp.stack([spread(known, feed, factor, path) for factor in factors])
                own = _errors(self._rounding(), plain(path, leaves[path]), gram, columns)
                error = error + (own if each is not None else own.reshape(len(alphas), -1).sum(1))
            best = jnp.argmin(error, axis=0)  # for each expert, if the units are those of experts
            chosen = factors[best] if each is None else factors[best, jnp.arange(feed.shape[each])]
            move(known, leaves, feed, chosen)
        return model, tree.stack(tree.unflatten(leaves))

    def _rounding(self) -> Rtn:
        return Rtn(self.bits, group=self.group, symmetric=self.symmetric)


@functools.partial(jax.jit, static_argnums=0)
def _errors(
    rounding: Rtn,
    weight: Float[Array, "*lead out in"],
    gram: Float[Array, "*#lead in in"],
    factors: Float[Array, "points *#lead 1 in"],
) -> Float[Array, "points *lead"]:
    """Return the squared error of the outputs for each of some factors of the inputs."""

    def one(weight: Array, gram: Array, factor: Array) -> Array:
        scaled = weight.astype(jnp.float32) * factor
        rounded = opened((rounding,), scaled, {}, jax.random.key(0)).dense()
        off = (rounded - scaled) / factor
        return jnp.sum(jnp.matmul(off, gram) * off)

    run = one
    lead = weight.shape[:-2]
    for _ in lead:
        run = jax.vmap(run)
    gram = jnp.broadcast_to(gram, (*lead, *gram.shape[-2:]))
    factors = jnp.broadcast_to(factors, (len(factors), *lead, *factors.shape[-2:]))
    return jax.lax.map(lambda factor: run(weight, gram, factor), factors)


def _survey(one: Transform, model: Model, params: tree.Params, needed: bool = True) -> Map:
    """Return what the axes say, with the feeds whose leaves are all plain.

    Raises:
      InputError: there is no such feed, and one is needed.
    """
    known = survey(model.axes, params)
    whole = {
        layer: not isinstance(leaf, Compressed)
        for path, leaf in tree.flatten(params).items()
        for layer in tree.layer_paths(path)
    }
    feeds = tuple(
        feed for feed in known.feeds if all(whole[path] for path in (*feed.sources, *feed.readers))
    )
    if needed and not feeds:
        raise InputError(
            f"{name_of(type(one))}: the model's axes name no plain leaves between which a factor "
            "may move (Axes.feeds); allowed: smooth(online=True), or no such transform"
        )
    return known._replace(feeds=feeds)


def _unfed(known: Map, params: tree.Params) -> list[str]:
    """Return the plain matrices into which nothing moves."""
    fed = {path for feed in known.feeds for path in feed.readers}
    return [
        layer
        for path, leaf in tree.flatten(params).items()
        for layer in tree.layer_paths(path)
        if layer not in fed
        and not isinstance(leaf, Compressed)
        and known.letters[layer].role in ("matrix", "experts")
    ]


def _rms(path: str, stats: Stats, where: Places) -> Array:
    """Return the root mean square of each column of a leaf's input; 1 where nothing was seen."""
    found = stats_of(path, stats, where) or {}
    if "gram" in found:
        square = jnp.diagonal(found["gram"], axis1=-2, axis2=-1)
    else:
        square = statistic("square", path, stats, where)
    count = found["count"][..., None]
    return jnp.where(count > 0, jnp.sqrt(square / jnp.maximum(count, 1)), 1.0)


def _sizes(known: Map, feed: Feed, stats: Stats, where: Places) -> Array:
    path = one_reader(known, feed)
    return gathered(known, feed, _rms(path, stats, where), path)


def _largest(leaves: dict[str, Any], path: str) -> Array:
    return jnp.max(jnp.abs(plain(path, leaves[path]).astype(jnp.float32)), axis=-2)
