"""Parts that image classifiers share. This is not an architecture: it has no `Config`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodel import layers, ops, tree
from jaxmodel.axes import Axes
from jaxmodel.errors import BELOW_ONE, InputError, within
from jaxmodel.models.model import Model, check_sizes, read
from jaxmodel.models.parts import Embed, Parts, head_of


def check_classifier(config: Any, sizes: Iterable[str], widths: Iterable[str] = ()) -> None:
    """Refuse a config with sizes that are not positive integers, or an unknown activation.

    A dropout outside of [0, 1) is refused too.

    Args:
      config: the config to check.
      sizes: the names of its fields that are numbers.
      widths: the names of its fields that are tuples of numbers.

    Raises:
      InputError: a field is wrong; the message names it.
    """
    check_sizes(config, sizes)
    for name in widths:
        value = getattr(config, name)
        if not isinstance(value, tuple) or any(not isinstance(n, int) or n < 1 for n in value):
            raise InputError(
                f"{name}: {value!r} given; allowed: a tuple of whole numbers of at least 1"
            )
    if hasattr(config, "activation"):
        layers.activation(config.activation)
    within("dropout", getattr(config, "dropout", 0), BELOW_ONE)


def pixel_inputs(size: int, channels: int) -> Callable[[int, int], dict[str, jax.ShapeDtypeStruct]]:
    """Return the inputs of a model of square images: `pixels` `[B, Y, X, C]`.

    Their sides are those of the config, whatever the length.
    """
    return lambda batch, length: {
        "pixels": jax.ShapeDtypeStruct((batch, size, size, channels), jnp.float32)
    }


def read_pixels(inputs: Mapping[str, jax.Array], policy: ops.Policy) -> Float[Array, "B Y X C"]:
    """Return the pixels of some inputs, in the policy's dtype.

    Raises:
      InputError: there are no pixels, they have other axes, or they are integers, since 0 to 255
        must not pass for the scaled values that a model was trained on.
    """
    pixels = read(inputs, "pixels", "BYXC")
    if not jnp.issubdtype(pixels.dtype, jnp.floating):
        raise InputError(
            f"pixels: {pixels.dtype} given; allowed: floating-point numbers, scaled as in training"
        )
    return pixels.astype(policy.activation_dtype)


def two_parts(
    config: Any,
    policy: ops.Policy,
    body: nn.Module,
    top: nn.Module,
    axes: Axes,
) -> Model:
    """Make a model without layers that repeat.

    Args:
      config: a config with `size`, the side of an image, and `channels`, its colours.
      policy: dtypes and placement.
      body: a module `(pixels, rng) -> [B, D]`; the rng is None outside of training.
      top: a module `[B, D] -> logits`.
      axes: the axes of the leaves.
    """
    inputs = pixel_inputs(config.size, config.channels)

    def embed(
        params: tree.Params, inputs: Any, cache: Any = None, rng: Any = None, train: bool = False
    ) -> Any:
        return body.apply(
            {"params": params}, read_pixels(inputs, policy), rng if train else None
        ), {}

    def init(key: jax.Array) -> tree.Params:
        body_key, head_key = jax.random.split(key)
        pixels = jnp.zeros(inputs(1, 1)["pixels"].shape, policy.activation_dtype)
        x, own = body.init_with_output(body_key, pixels, None)
        return {**own["params"], **top.init(head_key, x)["params"]}

    return Model(config, policy, init, Parts(embed, None, head_of(top)), inputs, None, axes)


def stem_of(module: nn.Module, policy: ops.Policy) -> Embed:
    """Return the first part of a model of images that runs a module `(pixels, train) -> x`."""

    def embed(
        params: tree.Params,
        inputs: dict[str, jax.Array],
        cache: Any = None,
        rng: jax.Array | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, dict[str, Any]]:
        x: Any = module.apply({"params": params}, read_pixels(inputs, policy), train)
        return x, {}

    return embed


class Head(nn.Module):
    """A linear head with float32 logits of classes.

    Leaves: head `[C, D]` and head_bias.

    Attributes:
      classes: C of new leaves.
      policy: dtypes and placement.
    """

    classes: int
    policy: ops.Policy

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the logits."""
        return layers.dense(self, x, "head", self.classes, self.policy, stream="float32")
