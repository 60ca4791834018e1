"""LeNet-300-100 and LeNet-5 (LeCun et al., 1998), networks for handwritten digits.

`lenet-5` is today's usual form, with 61,706 parameters: every map of the second convolution sees
all maps of the first (the paper leaves some out), pooling has no weights, and a dense layer with
softmax replaces the radial basis functions. `lenet-5-wide` is Caffe's, with 431,080 parameters,
which most papers on pruning use.

>>> import jax.numpy as jnp
>>> lenet = model(SIZES["tiny"])
>>> params = jax.jit(lenet.init)(jax.random.key(0))
>>> jax.jit(lenet.apply)(params, jnp.zeros((2, 16, 16, 1))).logits.shape
(2, 4)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec as P

from jaxmodel import ops
from jaxmodel.axes import Axes
from jaxmodel.errors import InputError, unknown
from jaxmodel.layers import activation, conv, dense
from jaxmodel.models.family import family
from jaxmodel.models.images import Head, check_classifier, two_parts
from jaxmodel.models.model import Model

POOLS = {"max": ops.max_pool, "mean": ops.avg_pool}
KERNEL = 5  # the side of every convolution's kernel; windows of pooling are 2 x 2


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

    def __post_init__(self) -> None:
        check_classifier(self, ("size", "classes", "channels"), ("convolutions", "widths"))
        if self.pool not in POOLS:
            raise unknown("pool", self.pool, POOLS)
        side = self.size + 2 * self.pad
        for _ in self.convolutions:
            side = (side - KERNEL + 1) // 2
        if side < 1 or self.pad < 0:
            raise InputError(
                f"size, pad: {self.size}, {self.pad} given; an image must outlast "
                f"{len(self.convolutions)} convolutions of "
                f"{KERNEL} x {KERNEL}, each with pooling"
            )


SIZES = {
    "tiny": Config((12, 24), (64,), 16, 4),
    "tiny-dense": Config((), (128, 64), 8, 4),
    "lenet-300-100": Config((), (300, 100)),
    "lenet-5": Config((6, 16), (120, 84), pad=2, pool="mean", activation="tanh"),
    "lenet-5-wide": Config((20, 50), (500,)),
}


def axes(config: Config) -> Axes:
    """Return the axes of the leaves.

    `C1` are the channels of the first convolution, `F1` the units of the first dense layer.
    """
    rules = []
    before = "n"
    for i in range(1, len(config.convolutions) + 1):
        rules += [
            (f"conv{i}", f"C{i}(C{i - 1}s)" if i > 1 else "C1p", P("tensor")),
            (f"conv{i}_bias", f"C{i}"),
        ]
        before = f"(qC{i})"
    for i in range(1, len(config.widths) + 1):
        rules += [(f"dense{i}", f"F{i}{before}"), (f"dense{i}_bias", f"F{i}")]
        before = f"F{i}"
    return Axes((*rules, ("head", f"c{before}"), ("head_bias", "c")), (("s", KERNEL**2),))


class _Body(nn.Module):
    config: Config
    policy: ops.Policy

    @nn.compact
    def __call__(self, x: jax.Array, rng: Any = None) -> jax.Array:
        c = self.config
        act = activation(c.activation)
        for i, channels in enumerate(c.convolutions, start=1):
            y = conv(self, x, f"conv{i}", channels, KERNEL, self.policy, pad=c.pad if i == 1 else 0)
            x = POOLS[c.pool](act(y), (2, 2))
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(c.widths, start=1):
            x = act(dense(self, x, f"dense{i}", width, self.policy))
        return x


@family(Config, SIZES)
def model(config: Config, policy: ops.Policy = ops.Policy()) -> Model:
    """Return the model of one config.

    Equal arguments give the same functions, so nothing is traced twice.
    """
    return two_parts(
        config, policy, _Body(config, policy), Head(config.classes, policy), axes(config)
    )
