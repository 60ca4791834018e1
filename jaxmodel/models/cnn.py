"""The network with two convolutions of Keras's MNIST example: 34,826 parameters.

It has a convolution with 32 channels, pooling, a convolution with 64 channels, pooling, dropout and
a dense layer. The kernels are 3 x 3, without padding.

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
    """The sizes of a member of the family.

    Attributes:
      convolutions: the channels of the convolutions, each followed by pooling.
      size: the height and width of an image in pixels.
      classes: the number of classes C.
      channels: the number of colour channels of an image.
      kernel: the side of the kernels.
      dropout: the dropout rate of the last features (Srivastava et al., 2014).
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
    """Return the axes of the leaves.

    `C1` are the channels of the first convolution, and so on.
    """
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
            # equal to pooling after the ReLU, with a quarter of the work for the ReLU
            x = nn.relu(ops.max_pool(y, (2, 2)))
        return dropout(x.reshape(x.shape[0], -1), c.dropout, rng)


@family(Config, SIZES)
def model(config: Config, policy: ops.Policy = ops.Policy()) -> Model:
    """Return the model of one config.

    Equal arguments give the same functions, so nothing is traced twice.
    """
    return two_parts(
        config, policy, _Body(config, policy), Head(config.classes, policy), axes(config)
    )
