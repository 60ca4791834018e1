"""Convolutions and dense layers for images, with their biases or norms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodel import ops
from jaxmodel.errors import one_of
from jaxmodel.layers.encoder import ACTIVATIONS
from jaxmodel.layers.leaf import leaf
from jaxmodel.layers.linear import linear
from jaxmodel.ops.norms import on_last
from jaxmodel.sharding import constrain

he_normal = nn.initializers.variance_scaling(
    2.0, "fan_in", "truncated_normal", in_axis=-1, out_axis=-2
)
"""Initialiser of weights `[out, in]` before a ReLU (He et al., 2015)."""

_OF_JAX = (
    *(
        "celu",
        "elu",
        "hard_sigmoid",
        "hard_silu",
        "hard_tanh",
        "leaky_relu",
        "log_sigmoid",
        "mish",
        "relu6",
        "selu",
        "sigmoid",
    ),
    *("silu", "soft_sign", "softplus", "sparse_plus", "squareplus", "tanh"),
)


def activation(name: str) -> Callable[[Array], Array]:
    """Return an elementwise function by name.

    Known are the names in `ACTIVATIONS`, "identity", and the functions of `jax.nn` without
    settings.

    Raises:
      InputError: the name is unknown.

    >>> float(activation("relu")(jnp.float32(-1)))
    0.0
    """
    known = {
        **ACTIVATIONS,
        "identity": jax.nn.identity,
        **{one: getattr(jax.nn, one) for one in _OF_JAX},
    }
    one_of("activation", name, known)
    return known[name]


def dense(
    module: nn.Module,
    x: Float[Array, "B I"],
    name: str,
    width: int,
    policy: ops.Policy,
    stream: str | None = None,
) -> Float[Array, "B O"]:
    """Compute `x @ w.T + b` with the module's leaves `name` `[O, I]` and `name_bias`.

    Args:
      module: the Linen module that owns the leaves.
      x: the input.
      name: the name of the weight.
      width: O of a new leaf; an existing leaf has its own.
      policy: dtypes and placement.
      stream: the dtype of the result; None for the policy's.
    """
    policy = dataclasses.replace(policy, activation_dtype=stream or policy.activation_dtype)
    (y,) = linear(module, x[:, None], {name: width}, he_normal, True, policy)
    return constrain(y[:, 0], "BF", policy.axes)


def conv(
    module: nn.Module,
    x: Float[Array, "B Y X I"],
    name: str,
    channels: int,
    kernel: int,
    policy: ops.Policy,
    *,
    stride: int = 1,
    pad: int = 0,
    norm: Callable[..., Callable[[Array], Any]] | None = None,
) -> Float[Array, "B P Q O"]:
    """Convolve, then add a bias or run a norm.

    The leaves are `name` `[O, I * kernel^2]`, and `name_bias` or `name_norm`.

    Args:
      module: the Linen module that owns the leaves.
      x: images.
      name: the name of the weight.
      channels: O of a new leaf; an existing leaf has its own.
      kernel: the side of the kernel.
      policy: dtypes and placement.
      stride: the distance between two positions of the kernel.
      pad: rows and columns of zeros on each side.
      norm: a function that makes the norm from its name; None for a bias. An existing bias replaces
        the norm; see `fold_batch_norm`.
    """
    w = leaf(module, name, he_normal, (channels, x.shape[-1] * kernel**2))
    same = stride == 1 and kernel == 2 * pad + 1
    # with a stride, "SAME" may pad only one side, but published weights expect both
    if pad and not same:
        x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    y = ops.conv(
        x,
        w,
        policy,
        kernel=(kernel, kernel),
        stride=(stride, stride),
        padding="SAME" if same else "VALID",
    )
    if norm is None or module.has_variable("params", f"{name}_bias"):
        y = y + on_last(
            leaf(module, f"{name}_bias", nn.initializers.zeros, y.shape[-1:]).astype(y.dtype),
            y.ndim,
        )
    else:
        y = norm(name=f"{name}_norm")(y)
    return constrain(y, "BYXF", policy.axes)
