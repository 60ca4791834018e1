"""Norms of images: batch norm, whose statistics are leaves, and group norm."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodel import ops, tree
from jaxmodel.errors import InputError
from jaxmodel.layers.leaf import leaf

BATCH_NORM = {"weight", "bias", "mean", "variance"}  # the leaves of a batch norm


class BatchNorm(nn.Module):
    """Batch norm (Ioffe & Szegedy, 2015) with leaves weight, bias, mean and variance, each `[D]`.

    In training it normalises by the moments of the batch and keeps nothing. The statistics mean and
    variance start at zero and one, have no gradient, and are set by
    `jaxmodel.train.recalibrate_batch_norm`.

    Attributes:
      eps: added to the variance.
      train: whether to normalise by the moments of the batch.

    >>> x, norm = jnp.array([[1.0], [5.0]]), BatchNorm(eps=0.0)
    >>> params = norm.init(jax.random.key(0), x)["params"]
    >>> norm.apply({"params": params}, x).tolist()
    [[1.0], [5.0]]
    >>> BatchNorm(0.0, train=True).apply({"params": params}, x).tolist()
    [[-1.0], [1.0]]
    """

    eps: float
    train: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B *space D"]) -> Float[Array, "B *space D"]:
        """Normalise each channel."""
        width = x.shape[-1:]
        weight = leaf(self, "weight", nn.initializers.ones, width)
        bias = leaf(self, "bias", nn.initializers.zeros, width)
        mean = leaf(self, "mean", nn.initializers.zeros, width)
        variance = leaf(self, "variance", nn.initializers.ones, width)
        return ops.batch_norm(x, weight, bias, mean, variance, self.eps, self.train)


class GroupNorm(nn.Module):
    """Group norm (Wu & He, 2018) with a weight and a bias `[D]`.

    Attributes:
      groups: the number of groups of channels, a divisor of D.
      eps: added to the variance.
    """

    groups: int
    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "B *space D"]) -> Float[Array, "B *space D"]:
        """Normalise each group of channels of each row."""
        weight = leaf(self, "weight", nn.initializers.ones, x.shape[-1:])
        bias = leaf(self, "bias", nn.initializers.zeros, x.shape[-1:])
        return ops.group_norm(x, weight, bias, self.groups, self.eps)


def fold_batch_norm(params: tree.Params, eps: float) -> tree.Params:
    """Fold every batch norm into the convolution before it, for inference.

    The function stays the same: `w' = w * s` and `b' = bias - mean * s` with
    `s = weight / sqrt(variance + eps)`. The leaves `conv` and `conv_norm/*` become `conv` and
    `conv_bias`, which the same model runs. Like `fuse`, this is for running only: store and train
    the tree with its norms. Norms that do not follow a convolution (half of a DenseNet's, which
    precede an activation) are left alone.

    Args:
      params: a tree in which a norm `X_norm` is next to the weight `X` of its convolution; weights
        are plain arrays.
      eps: the `norm_eps` of the model's config.

    Raises:
      InputError: no batch norm follows a convolution, or one follows a compressed weight.

    >>> norm = {"weight": jnp.full(3, 2.0), "bias": jnp.ones(3)}
    >>> norm |= {"mean": jnp.full(3, 5.0), "variance": jnp.full(3, 4.0)}
    >>> folded = fold_batch_norm({"conv": jnp.ones((3, 2)), "conv_norm": norm}, eps=0.0)
    >>> float(folded["conv"][0, 0]), float(folded["conv_bias"][0])
    (1.0, -4.0)
    """
    folded = _fold(params, eps, ())
    if tree.flatten(folded).keys() == tree.flatten(params).keys():
        raise InputError(
            "params: there is no batch norm to fold; allowed: a weight .../X with a leaf "
            ".../X_norm/variance"
        )
    return folded


def _fold(node: tree.Params, eps: float, keys: tuple[str, ...]) -> tree.Params:
    out = dict(node)
    for key, child in node.items():
        if tree.is_leaf(child):
            continue
        name = key.removesuffix("_norm")
        if set(child) != BATCH_NORM or name == key or name not in node:
            out[key] = _fold(child, eps, (*keys, key))
            continue
        w = node[name]
        where = "/".join((*keys, key))
        if not isinstance(w, jax.Array):
            raise InputError(
                f"params: the weight before the norm {where!r} is {type(w).__name__}; allowed: a "
                "plain array"
            )
        wide = {part: leaf.astype(jnp.float32) for part, leaf in child.items()}
        scale = wide["weight"] * jax.lax.rsqrt(wide["variance"] + eps)
        del out[key]
        out[name] = (w.astype(jnp.float32) * scale[..., None]).astype(w.dtype)
        out[f"{name}_bias"] = (wide["bias"] - wide["mean"] * scale).astype(child["bias"].dtype)
    return out
