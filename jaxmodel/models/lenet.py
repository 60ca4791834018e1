"""LeNet-300-100 and LeNet-5 (LeCun et al., 1998), networks for handwritten digits.

`lenet-5` is today's usual form, with 61,706 parameters: every map of the second convolution sees
all maps of the first (the paper leaves some out), pooling has no weights, and a dense layer with
softmax replaces the radial basis functions. `lenet-5-wide` is Caffe's, with 431,080 parameters,
which most papers on pruning use.

>>> import jax
>>> import jax.numpy as jnp
>>> lenet = model(SIZES["tiny"])
>>> params = jax.jit(lenet.init)(jax.random.key(0))
>>> jax.jit(lenet.apply)(params, jnp.zeros((2, 16, 16, 1))).logits.shape
(2, 4)
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxmodel import ops
from jaxmodel.models import cnn
from jaxmodel.models.family import family
from jaxmodel.models.model import Model

axes = cnn.axes


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a member of the family.

    Attributes:
      convolutions: the channels of the convolutions, each followed by pooling; () for none.
      widths: the widths of the hidden dense layers.
      size: the height and width of an image in pixels.
      classes: the number of classes C.
      channels: the number of colour channels of an image.
      pad: the padding of the first convolution's input, in pixels.
      pool: "max" or "mean".
      activation: see `layers.activation`.
    """

    convolutions: tuple[int, ...]
    widths: tuple[int, ...]
    size: int = 28
    classes: int = 10
    channels: int = 1
    pad: int = 0
    pool: str = "max"
    activation: str = "relu"

    kernel: ClassVar[int] = 5
    dropout: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        cnn.check(self)


SIZES = {
    "tiny": Config((12, 24), (64,), 16, 4),
    "tiny-dense": Config((), (128, 64), 8, 4),
    "lenet-300-100": Config((), (300, 100)),
    "lenet-5": Config((6, 16), (120, 84), pad=2, pool="mean", activation="tanh"),
    "lenet-5-wide": Config((20, 50), (500,)),
}


@family(Config, SIZES)
def model(config: Config, policy: ops.Policy = ops.Policy()) -> Model:
    """Return the model of one config.

    Equal arguments give the same functions, so nothing is traced twice.
    """
    return cnn.network(config, policy)
