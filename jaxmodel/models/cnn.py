"""The network of two convolutions that Keras's example of MNIST made known: 34,826 parameters.

Convolution of 32 channels, pooling, of 64 channels, pooling, dropout, a dense layer; kernels 3 x 3
without padding.

>>> import jax.numpy as jnp
>>> cnn = model(SIZES["tiny"])
>>> params = jax.jit(cnn.init)(jax.random.key(0))
>>> jax.jit(cnn.apply)(params, jnp.zeros((2, 12, 12, 1))).logits.shape
(2, 4)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax

from jaxmodel import ops
from jaxmodel.axes import Axes
from jaxmodel.errors import InputError
from jaxmodel.layers import conv, dropout
from jaxmodel.models.family import family
from jaxmodel.models.images import Head, check_classifier, two_parts
from jaxmodel.models.model import Model


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes that tell the members of the family apart.

    Attributes:
      convolutions: channels of the convolutions, each with pooling behind it.
      size: Y and X of an image.
      classes: C.
      channels: colours of an image.
      kernel: the side of the kernels.
      dropout: share of the last features that is dropped in training (Srivastava et al., 2014).
    """

    convolutions: tuple[int, ...] = (32, 64)
    size: int = 28
    classes: int = 10
    channels: int = 1
    kernel: int = 3
    dropout: float = 0.5

    def __post_init__(self) -> None:
        check_classifier(self, ("size", "classes", "channels", "kernel"), ("convolutions",))
        side = self.size
        for _ in self.convolutions:
            side = (side - self.kernel + 1) // 2
        if side < 1:
            raise InputError(
                f"size: {self.size} given; an image must outlast {len(self.convolutions)} "
                f"convolutions with pooling"
            )


SIZES = {"tiny": Config((32, 32), 12, 4, dropout=0.2), "mnist": Config()}


def axes(config: Config) -> Axes:
    """What the axes of the leaves are: `C1` the channels of the first convolution, and so on."""
    rules = []
    last = len(config.convolutions)
    for i in range(1, last + 1):
        rules += [(f"conv{i}", f"C{i}(C{i - 1}s)" if i > 1 else "C1p"), (f"conv{i}_bias", f"C{i}")]
    return Axes((*rules, ("head", f"c(qC{last})"), ("head_bias", "c")), (("s", config.kernel**2),))


class _Body(nn.Module):
    config: Config
    policy: ops.Policy

    @nn.compact
    def __call__(self, x: jax.Array, rng: Any = None) -> jax.Array:
        c = self.config
        for i, channels in enumerate(c.convolutions, start=1):
            y = conv(self, x, f"conv{i}", channels, c.kernel, self.policy)
            # the same as pooling last, with a quarter of the work for the ReLU
            x = nn.relu(ops.max_pool(y, (2, 2)))
        return dropout(x.reshape(x.shape[0], -1), c.dropout, rng)


@family(Config, SIZES)
def model(config: Config, policy: ops.Policy = ops.Policy()) -> Model:
    """The pure functions of one config; equal arguments give the same functions, so nothing is
    traced twice.
    """
    return two_parts(
        config, policy, _Body(config, policy), Head(config.classes, policy), axes(config)
    )
