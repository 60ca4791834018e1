"""Base of the augmentations, chains of them and their text form.

An augmentation is a frozen record of settings and a pure function `(key, batch) -> batch`. Its text
form is what people write and what the config of a run records:

>>> augment = parse("random_crop(4) | horizontal_flip() | cutout(8)")
>>> str(augment)
'random_crop(padding=4) | horizontal_flip(probability=0.5) | cutout(size=8)'
>>> parse(str(augment)) == augment
True
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt32

from jaxmodel import text_form
from jaxmodel.errors import InputError
from jaxmodel.schema import Share

IGNORED = -100
"""The label or target of a row or position that does not count, as in torch and transformers."""

type AnyKey = Key[Array, ""] | UInt32[Array, "2"]
type Keys = Key[Array, "B"] | UInt32[Array, "B 2"]
type Augment = Callable[[AnyKey, Mapping[str, Any]], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Augmentation(
    text_form.Member, abc.ABC, kind="augment", example="random_crop(4) | horizontal_flip()"
):
    """Base of the augmentations: a frozen dataclass of settings with one function.

    To add one, write a subclass anywhere; text finds it by its class name in snake case.
    """

    @abc.abstractmethod
    def __call__(self, key: AnyKey, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the augmented batch; other entries are passed on.

        Args:
          key: a random key; row i uses `fold_in(key, i)`, so the rows may lie on any devices.
          batch: arrays `[B, ...]` by name.

        Raises:
          InputError: the batch lacks a field that is needed.
        """

    def __or__(self, other: Augment) -> Chain:
        return chain(self, other)


@dataclasses.dataclass(frozen=True)
class ImageAugmentation(Augmentation):
    """Base of augmentations that change the pixels of each row by itself.

    Attributes:
      probability: probability that a row is changed.
    """

    probability: Share = dataclasses.field(default=1.0, kw_only=True)

    @abc.abstractmethod
    def change(self, keys: Keys, pixels: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        """Return all images changed, in float32; `keys` has a key for each row."""

    def __call__(self, key: AnyKey, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Change each row with the given probability; keep the dtype."""
        given = images(batch)
        pixels = given.astype(jnp.float32)
        keys = jax.vmap(jax.random.split)(row_keys(key, len(pixels)))
        changed = self.change(keys[:, 0], pixels)
        if self.probability < 1:
            changed = jnp.where(per_row(uniforms(keys[:, 1]) < self.probability), changed, pixels)
        return {**batch, "pixels": changed.astype(given.dtype)}


# ------------------------------------------------------------------------------------------- chains


@dataclasses.dataclass(frozen=True)
class Chain:
    """A sequence of augmentations; link i gets `fold_in(key, i)`.

    Attributes:
      links: the augmentations. Any function `(key, batch) -> batch` may be one, but then the text
        form cannot be read back.
    """

    links: tuple[Augment, ...] = ()

    def __call__(self, key: AnyKey, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Apply the augmentations in order."""
        for i, link in enumerate(self.links):
            batch = link(jax.random.fold_in(key, i), batch)
        return dict(batch)

    def __or__(self, other: Augment) -> Chain:
        return chain(self, other)

    def __str__(self) -> str:
        return text_form.write(self.links)


def chain(*augmentations: Augment) -> Chain:
    """Chain augmentations, as `a | b` does; chains among them are flattened.

    >>> str(chain(parse("invert()"), parse("noise(0.1) | blur(1)")))
    'invert(probability=1.0) | noise(deviation=0.1) | blur(sigma=1.0)'
    """
    links: list[Augment] = []
    for augmentation in augmentations:
        links += augmentation.links if isinstance(augmentation, Chain) else [augmentation]
    return Chain(tuple(links))


def members() -> dict[str, type[Augmentation]]:
    """Return every augmentation by the name of its text form."""
    return text_form.members(Augmentation)


def parse(text: str) -> Chain:
    """Parse the text of a chain: augmentations joined by `|`, each a call with literal arguments.

    Empty text is a chain that changes nothing.

    Raises:
      InputError: text of another form, an unknown augmentation, or settings that it does not take.
    """
    return chain(*text_form.read(Augmentation, text))


# --------------------------------------------------------------------------------------------- rows


def row_keys(key: AnyKey, rows: int) -> Keys:
    """Return `fold_in(key, i)` for each row i, wherever the row lies."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows, dtype=jnp.uint32))


def uniforms(keys: Keys, *shape: int) -> Float[Array, "B ..."]:
    """Draw numbers in [0, 1), `[B, *shape]`, each row from its key."""
    return jax.vmap(lambda key: jax.random.uniform(key, shape))(keys)


def row_weights(batch: Mapping[str, Any], rows: int) -> Float[Array, "B"]:
    """Return the weight of each row: its `weights`, or 1 for all if there are none.

    Of weights `[B, T]`, a row has 1 if any is above 0.
    """
    weights = jnp.asarray(batch.get("weights", jnp.ones(rows)), jnp.float32)
    return (
        weights
        if weights.ndim < 2
        else jnp.any(weights > 0, axis=tuple(range(1, weights.ndim))).astype(jnp.float32)
    )


def per_row(values: Array) -> Array:
    """Reshape `[B]` to `[B, 1, 1, 1]`, to broadcast with images."""
    return values[:, None, None, None]


def computed_once(pixels: Array) -> Array:
    """Return the pixels unchanged, behind a barrier for XLA's fusion.

    Without it, code that reads each pixel several times would compute it again for each read
    (measured: 4 times slower).
    """
    return jax.lax.optimization_barrier(pixels)


def field_of(batch: Mapping[str, Any], name: str, axes: str = "") -> Array:
    """Return a field of a batch.

    Args:
      batch: the batch.
      name: the name of the field.
      axes: its axes, for the message.

    Raises:
      InputError: the batch has none of that name.
    """
    if name not in batch:
        given = ", ".join(sorted(batch)) or "nothing"
        raise InputError(f"batch: {given} given; {name!r}{f' {axes}' if axes else ''} is needed")
    return jnp.asarray(batch[name])


def images(batch: Mapping[str, Any]) -> Float[Array, "B Y X C"]:
    """Return the images of a batch.

    Raises:
      InputError: there are none, or they are not floating-point numbers `[B, Y, X, C]`.
    """
    pixels = field_of(batch, "pixels", "[B, Y, X, C]")
    if pixels.ndim != 4 or not jnp.issubdtype(pixels.dtype, jnp.floating):
        raise InputError(
            f"batch: pixels are {pixels.dtype} {pixels.shape}; allowed: floating-point [B, Y, X, "
            "C] from 0 to 1"
        )
    return pixels
