"""Augmentations that mix each row and its labels with those of its neighbour.

Row i is mixed with row i - 1 (the first with the last). The stream has shuffled the rows, so this
partner is as good as a random one, and on a mesh only the rows at the edges of each device's part
move. Labels become distributions `[B, C]`. If the batch has `weights`, the partner is the last
earlier row with a weight above 0; rows without one stay as they are, and a row labelled -100 has
none. If the labels were whole numbers, the batch has `weights` afterwards.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmodel.data.augment.base import (
    IGNORED,
    AnyKey,
    Augmentation,
    Keys,
    images,
    per_row,
    row_keys,
    row_weights,
    uniforms,
)
from jaxmodel.data.augment.damage import inside
from jaxmodel.errors import InputError
from jaxmodel.schema import Count, Range, Share

type Images = Float[Array, "B Y X C"]

_TRIES = 8  # each succeeds with a probability of at least 0.95


@dataclass(frozen=True)
class _Mixing(Augmentation):
    """Base of the augmentations that mix rows.

    Attributes:
      classes: number of classes, C.
      alpha: the neighbour's share is drawn from Beta(alpha, alpha); 0 for no mixing.
      probability: probability that a row is mixed.
    """

    classes: Count
    alpha: Annotated[float, Range(0, 1e4)] = 1.0
    probability: Share = field(default=1.0, kw_only=True)

    @abc.abstractmethod
    def mix(
        self, keys: Keys, pixels: Images, partner: Images, given: Float[Array, "B"]
    ) -> tuple[Array, Array]:
        """Return the mixed images, and the shares `[B]` that came from the partners.

        Args:
          keys: a key for each row.
          pixels: the images.
          partner: the partner of each image.
          given: the shares that were drawn.
        """

    def __call__(self, key: AnyKey, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Mix rows with their neighbours."""
        unmixed, (labels, weights) = images(batch), distributions(batch, self.classes)
        pixels = unmixed.astype(jnp.float32)
        keys = jax.vmap(lambda key: jax.random.split(key, 3))(row_keys(key, len(pixels)))
        given = beta(keys[:, 0], self.alpha)
        if self.probability < 1:
            given = jnp.where(uniforms(keys[:, 1]) < self.probability, given, 0.0)
        if jnp.ndim(batch.get("weights", 0)) == 1:
            other = neighbour_of(weights > 0)
            partner = pixels[other]
            of_partner = labels[other]
        else:
            partner = neighbour(pixels)
            of_partner = neighbour(labels)
        sound = (weights > 0) & (jnp.sum(of_partner, axis=1) > 0)
        given = jnp.where(sound, given, 0.0)
        mixed, given = self.mix(keys[:, 2], pixels, partner, given)
        labels = labels + given[:, None] * (of_partner - labels)
        same = (
            jnp.issubdtype(jnp.asarray(batch["labels"]).dtype, jnp.floating)
            or jnp.ndim(batch.get("weights", weights)) > 1
        )
        counted = {} if same else {"weights": weights}
        return {**batch, "pixels": mixed.astype(unmixed.dtype), "labels": labels, **counted}


@dataclass(frozen=True)
class Mixup(_Mixing):
    """Mixup: `(1 - s) x_i + s x_(i-1)` for images and labels (Zhang et al., 2018).

    The share s is drawn from Beta(alpha, alpha).

    Attributes:
      classes: number of classes, C.
      alpha: 0 changes nothing, 1 draws s evenly.
      probability: probability that a row is mixed.
    """

    alpha: Annotated[float, Range(0, 1e4)] = 0.2

    def mix(
        self, keys: Keys, pixels: Images, partner: Images, given: Float[Array, "B"]
    ) -> tuple[Array, Array]:
        """Mix the images; see the class."""
        return pixels + per_row(given) * (partner - pixels), given


@dataclass(frozen=True)
class CutMix(_Mixing):
    """CutMix: a box is replaced by that of the neighbour (Yun et al., 2019).

    Labels are mixed by the share of pixels from each. The box has `sqrt(s)` of each side, with s
    from Beta(alpha, alpha), lies around a uniformly drawn pixel and is cut at the image's border.

    Attributes:
      classes: number of classes, C.
      alpha: 0 changes nothing, 1 draws s evenly.
      probability: probability that a row is mixed.
    """

    def mix(
        self, keys: Keys, pixels: Images, partner: Images, given: Float[Array, "B"]
    ) -> tuple[Array, Array]:
        """Mix the images; see the class."""
        sides = jnp.array(pixels.shape[1:3], jnp.float32)[None]
        whole_sides = sides.astype(jnp.int32)
        size = jnp.floor(jnp.sqrt(given)[:, None] * sides).astype(jnp.int32)
        start = jnp.floor(uniforms(keys, 2) * sides).astype(jnp.int32) - size // 2
        start, stop = jnp.clip(start, 0, whole_sides), jnp.clip(start + size, 0, whole_sides)
        area = jnp.prod(stop - start, axis=1).astype(jnp.float32)
        mixed = jnp.where(inside(pixels, start, stop), partner, pixels)
        return mixed, area / (pixels.shape[1] * pixels.shape[2])


def neighbour(rows: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """Shift rows by one: row i - 1 at place i, the last at place 0."""
    return jnp.roll(rows, 1, axis=0)


def neighbour_of(counts: Bool[Array, "B"]) -> Int[Array, "B"]:
    """Return for each row the index of the last earlier row that counts.

    For the first that counts and the rows before it, this is the last of all.

    >>> neighbour_of(jnp.array([True, False, True, True, False])).tolist()
    [3, 0, 0, 2, 3]
    """
    place = jnp.where(counts, jnp.arange(len(counts), dtype=jnp.int32), -1)
    before = jnp.roll(jax.lax.cummax(place), 1).at[0].set(-1)
    return jnp.where(before < 0, jnp.maximum(jnp.max(place), 0), before)


def distributions(
    batch: Mapping[str, Any], classes: int
) -> tuple[Float[Array, "B C"], Float[Array, "B"]]:
    """Return the labels as distributions over the classes, and the weights of the rows.

    A distribution is NaN if its label is not a class, and 0 if its row does not count.

    Raises:
      InputError: no labels, or neither classes `[B]` nor distributions `[B, C]`.
    """
    if "labels" not in batch:
        raise InputError(f"batch: {', '.join(sorted(batch))} given; 'labels' [B] is needed too")
    labels = jnp.asarray(batch["labels"])
    own = jnp.ndim(batch.get("weights", 0)) == 1
    weights = row_weights(batch, len(labels)) if own else jnp.ones(len(labels), jnp.float32)
    if (
        labels.ndim == 2
        and labels.shape[1] == classes
        and jnp.issubdtype(labels.dtype, jnp.floating)
    ):
        return labels.astype(jnp.float32), weights
    if labels.ndim != 1 or not jnp.issubdtype(labels.dtype, jnp.integer):
        given = f"{labels.dtype} {labels.shape}"
        raise InputError(
            f"batch: labels are {given}; allowed: integers [B] or distributions [B, {classes}]"
        )
    weights = jnp.where(labels == IGNORED, 0.0, weights)
    labels = jnp.where(weights > 0, labels, 0)
    known = (labels >= 0) & (labels < classes)
    found = jnp.where(known[:, None], jax.nn.one_hot(labels, classes, dtype=jnp.float32), jnp.nan)
    return jnp.where(weights[:, None] > 0, found, 0.0), weights


def beta(keys: Keys, alpha: float) -> Float[Array, "B"]:
    """Draw from Beta(alpha, alpha), once for each key; an alpha of 0 gives 0.

    `jax.random.beta` loops until every row has its draw, which on a mesh is a reduction over all
    devices in each round. This draws two gamma variates with a fixed number of tries (Marsaglia &
    Tsang, 2000), in logarithms so that a small alpha does not underflow.
    """
    if alpha == 0:
        return jnp.zeros(len(keys), jnp.float32)
    d = (
        alpha + 1 - 1 / 3
        # The method needs a shape of at least 1, so it draws for alpha + 1; a power of one uniform
        # number leads back to alpha.
    )
    c = 1 / (9 * d) ** 0.5

    def one(key: Array) -> Array:
        keys = jax.random.split(key, 3)
        z = jax.random.normal(keys[0], (2, _TRIES))
        v = (1 + c * z) ** 3
        log_v = jnp.log(jnp.maximum(v, 1e-30))
        right = (v > 0) & (
            jnp.log1p(-jax.random.uniform(keys[1], (2, _TRIES)))
            < 0.5 * z**2 + d - d * v + d * log_v
        )
        first = jnp.argmax(right, axis=1)
        chosen = jnp.take_along_axis(log_v, first[:, None], axis=1)[:, 0]
        log_gamma = chosen + jnp.log1p(-jax.random.uniform(keys[2], (2,))) / alpha
        return jax.nn.sigmoid(log_gamma[0] - log_gamma[1])

    return jax.vmap(one)(keys)
