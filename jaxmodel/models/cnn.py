"""Convolutions with pooling, then dense layers: the code of this family and of `lenet`.

`mnist` is the network of Keras's MNIST example, with 34,826 parameters: a convolution with 32
channels, pooling, a convolution with 64 channels, pooling, dropout and a dense layer. The kernels
are 3 x 3, without padding.

>>> import jax.numpy as jnp
>>> cnn = model(SIZES["tiny"])
>>> params = jax.jit(cnn.init)(jax.random.key(0))
>>> jax.jit(cnn.apply)(params, jnp.zeros((2, 12, 12, 1))).logits.shape
(2, 4)
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec as P

from jaxmodel import ops
from jaxmodel.axes import Axes
from jaxmodel.errors import InputError, at_least, one_of
from jaxmodel.layers import activation, conv, dense, dropout
from jaxmodel.models.family import family
from jaxmodel.models.images import Head, check_classifier, two_parts
from jaxmodel.models.model import Model

POOLS = {"max": ops.max_pool, "mean": ops.avg_pool}  # over windows of 2 x 2


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

    widths: ClassVar[tuple[int, ...]] = ()
    pad: ClassVar[int] = 0
    pool: ClassVar[str] = "max"
    activation: ClassVar[str] = "relu"

    def __post_init__(self) -> None:
        check(self)


def check(config: Any) -> None:
    """Refuse a config whose values are wrong, or whose images are too small for its convolutions.

    Raises:
      InputError: a field is wrong; the message names it.
    """
    check_classifier(config, ("size", "classes", "channels", "kernel"), ("convolutions", "widths"))
    one_of("pool", config.pool, POOLS)
    at_least("pad", config.pad, 0)
    side = config.size + 2 * config.pad
    for _ in config.convolutions:
        side = (side - config.kernel + 1) // 2
    if side < 1:
        raise InputError(
            f"size: {config.size} given, with pad {config.pad}; an image must be large enough for "
            f"{len(config.convolutions)} convolutions of {config.kernel} x {config.kernel}, each "
            f"with pooling"
        )


SIZES = {"tiny": Config((32, 32), 12, 4, dropout=0.2), "mnist": Config()}


def axes(config: Any) -> Axes:
    """Return the axes of the leaves.

    `C1` are the channels of the first convolution, `F1` the units of the first dense layer.
    """
    rules = []
    before = "n"
    for i in range(1, len(config.convolutions) + 1):
        # few channels times an odd window: no mesh axis divides them
        reads = f"(C{i - 1}s)" if i > 1 else "p"
        rules += [(f"conv{i}", f"C{i}{reads}", P("tensor")), (f"conv{i}_bias", f"C{i}")]
        before = f"(qC{i})"
    for i in range(1, len(config.widths) + 1):
        rules += [(f"dense{i}", f"F{i}{before}"), (f"dense{i}_bias", f"F{i}")]
        before = f"F{i}"
    return Axes((*rules, ("head", f"c{before}"), ("head_bias", "c")), (("s", config.kernel**2),))


class _Body(nn.Module):
    config: Any
    policy: ops.Policy

    @nn.compact
    def __call__(self, x: jax.Array, rng: Any = None) -> jax.Array:
        c = self.config
        act = activation(c.activation)
        # a maximum and a ReLU change places freely, and then a quarter of the ReLU's work is left
        pool_first = (c.pool, c.activation) == ("max", "relu")
        for i, channels in enumerate(c.convolutions, start=1):
            pad = c.pad if i == 1 else 0
            y = conv(self, x, f"conv{i}", channels, c.kernel, self.policy, pad=pad)
            pooled = POOLS[c.pool](y if pool_first else act(y), (2, 2))
            x = act(pooled) if pool_first else pooled
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(c.widths, start=1):
            x = act(dense(self, x, f"dense{i}", width, self.policy))
        return dropout(x, c.dropout, rng)


def network(config: Any, policy: ops.Policy) -> Model:
    """Make the model of a config of this family or of `lenet`."""
    body = _Body(config, policy)
    return two_parts(config, policy, body, Head(config.classes, policy), axes(config))


@family(Config, SIZES)
def model(config: Config, policy: ops.Policy = ops.Policy()) -> Model:
    """Return the model of one config.

    Equal arguments give the same functions, so nothing is traced twice.
    """
    return network(config, policy)
