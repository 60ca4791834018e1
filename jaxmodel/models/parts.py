"""The functions that a model is composed of, as types, and some that several families share.

This is not an architecture: it has no `Config`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodel import tree
from jaxmodel.errors import at_least
from jaxmodel.layers.repeat import Block

type Inputs = jax.Array | Mapping[str, jax.Array]


@runtime_checkable
class Embed(Protocol):
    """The first part of a model: from inputs to activations."""

    def __call__(
        self,
        params: tree.Params,
        inputs: dict[str, jax.Array],
        cache: Any = None,
        rng: jax.Array | None = None,
        train: bool = False,
        /,
    ) -> tuple[Float[Array, "B *axes D"], dict[str, Any]]:
        """Return the activations, and the context of all layers.

        Args:
          params: all parameters of the model.
          inputs: the inputs by name; padding is zero.
          cache: None, or what `Model.init_cache` made, before these tokens.
          rng: a key of this part, or None for no randomness.
          train: whether this is a step of training.

        Returns:
          The activations in the policy's activation dtype: `[B, T, D]` for tokens (T positions),
          `[B, D]` or `[B, Y, X, D]` for other models. The context is a dict of values that are
          computed once for all layers: arrays `[B, ...]` or `[1, ...]`, and scalars. It may have
          `aux`, named float32 scalars, and `cache`, which then replaces the given one.
        """
        ...


@runtime_checkable
class Head(Protocol):
    """The last part of a model: from activations to logits."""

    def __call__(
        self,
        params: tree.Params,
        x: Float[Array, "B *axes D"],
        rng: jax.Array | None = None,
        train: bool = False,
        /,
    ) -> Float[Array, "B *out"]:
        """Return the logits, float32.

        They are `[B, T, V]` for tokens and `[B, C]` for classes; a model of vectors returns
        `[B, D]`.

        Args:
          params: all parameters of the model; a tied head reads the embedding.
          x: the activations behind the last layer.
          rng: a key of this part, or None for no randomness.
          train: whether this is a step of training.
        """
        ...


class Parts(NamedTuple):
    """The three functions that `apply` is composed of.

    Attributes:
      embed: inputs -> activations and context; see `Embed`.
      block: one layer of `params["blocks"]`; see `layers.repeat.Block`. None for a model without
        layers that repeat.
      head: activations -> logits; see `Head`.
    """

    embed: Embed
    block: Block | None
    head: Head


def pattern(layers: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the values of the layers as the shortest pattern that repeats; () if all are empty.

    >>> pattern((5, 5, 0, 5, 5, 0, 5)), pattern((False, False))
    ((5, 5, 0), ())
    """
    if not any(layers):
        return ()
    repeats = lambda period: all(value == layers[i % period] for i, value in enumerate(layers))
    return layers[: next(filter(repeats, range(1, len(layers))), len(layers))]


class Windowed:
    """A config with windows of attention.

    Attributes:
      depth: the number of layers.
      windows: the windows of the layers in turn, in tokens, beginning again at the end; 0 for a
        layer that sees everything, () for no windows.
    """

    depth: int
    windows: tuple[int, ...]

    def window_of_layers(self) -> tuple[int, ...]:
        """Return the window of every layer; 0 for none."""
        return tuple(
            self.windows[i % len(self.windows)] if self.windows else 0 for i in range(self.depth)
        )

    def of_layers(self, layers: Sequence[int]) -> Any:
        """Return the config of the model that has only these layers, in this order."""
        windows = self.window_of_layers()
        changes = {"depth": len(layers), "windows": pattern(tuple(windows[i] for i in layers))}
        return dataclasses.replace(self, **changes)  # pyright: ignore

    def check_windows(self) -> None:
        """Raise InputError if a window is not a whole number of at least 0."""
        for window in self.windows:
            at_least("windows", window, 0)


def encoder_layer(module: nn.Module, zero_padding: bool = False) -> Block:
    """Return a layer that runs a module `(x, context) -> x`.

    Args:
      module: the module.
      zero_padding: whether the rows of padding become zeros, by which a head, which sees only the
        activations, recognises them.
    """

    def block(
        params: tree.Params,
        x: Array,
        context: dict[str, Any],
        cache: Any = None,
        layer: int | Array = 0,
        rng: Array | None = None,
        train: bool = False,
    ) -> tuple[Array, Any, dict[str, Array]]:
        y: Any = module.apply({"params": params}, x, context)
        mask = context["seen"].valid if zero_padding else None
        if mask is not None:
            y = jnp.where(mask[..., None], y, jnp.zeros((), y.dtype))
        return y, cache, {}

    return block


def head_of(module: nn.Module) -> Head:
    """Return a head that runs a module `(x) -> logits` on the parameters of its own names."""

    def head(params: tree.Params, x: Array, rng: Any = None, train: bool = False) -> Any:
        return module.apply({"params": params}, x)

    return head


def feature_inputs(width: int) -> Callable[[int, int], dict[str, jax.ShapeDtypeStruct]]:
    """Return the inputs of a model of rows of numbers: `features` `[B, N]`, whatever the length."""
    return lambda batch, length: {"features": jax.ShapeDtypeStruct((batch, width), jnp.float32)}


def init_in_turn(
    module: nn.Module, keys: Sequence[Array], x: Array, settings: Iterable[tuple[Any, ...]]
) -> tuple[Array, tree.Params]:
    """Initialise layers that may differ in shape, each on the output of the one before.

    Args:
      module: a module `(x, *settings) -> x`.
      keys: a key for each layer.
      x: the activations in front of the first layer.
      settings: the further arguments of each layer.

    Returns:
      The activations behind the last layer, and the layers by number, not yet stacked.
    """
    blocks = {}
    for i, (key, more) in enumerate(zip(keys, settings, strict=True)):
        x, own = module.init_with_output(key, x, *more)
        blocks[str(i)] = own["params"]
    return x, blocks
