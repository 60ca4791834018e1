"""ResNet (He et al., 2015) with batch norm or group norm (Wu & He, 2018).

Residual blocks have two convolutions, or three with a narrow one in the middle (bottleneck). A
block that halves the image has a leaf `halve`, a 1 x 1 convolution that makes the shapes of the sum
equal; one that only widens has `widen`. As in torchvision, whose weights most people have, a
bottleneck's stride is that of its 3 x 3 convolution.

>>> resnet = model(SIZES["tiny"])
>>> params = jax.jit(resnet.init)(jax.random.key(0))
>>> list(params["blocks"])
['0-1', '2']
>>> jax.jit(resnet.apply)(params, jnp.zeros((2, 16, 16, 3))).logits.shape
(2, 4)
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodel import ops, tree
from jaxmodel.axes import Axes
from jaxmodel.errors import InputError, one_of
from jaxmodel.layers import BatchNorm, GroupNorm, conv
from jaxmodel.models.family import family
from jaxmodel.models.images import Head, check_classifier, pixel_inputs, stem_of
from jaxmodel.models.model import Model
from jaxmodel.models.parts import Parts, init_in_turn

NORMS = ("batch", "group")


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a member of the family.

    Attributes:
      stages: the number of blocks of each stage. Each stage but the first halves the sides of its
        input and doubles the width.
      width: the number of channels of the first stage.
      bottleneck: whether a block has three convolutions; its output is four times as wide.
      classes: the number of classes C.
      size: the height and width of an image in pixels.
      channels: the number of colour channels of an image.
      norm: "batch" or "group".
      groups: the number of groups of a group norm.
      norm_eps: added to the variance by the norms.
      small: for small images: a stem of 3 x 3 at stride 1, not 7 x 7 at stride 2 with pooling.
    """

    stages: tuple[int, ...]
    width: int = 64
    bottleneck: bool = False
    classes: int = 1000
    size: int = 224
    channels: int = 3
    norm: str = "batch"
    groups: int = 32
    norm_eps: float = 1e-5
    small: bool = False

    def __post_init__(self) -> None:
        check_classifier(self, ("width", "classes", "size", "channels", "groups"), ("stages",))
        if not self.stages:
            raise InputError("stages: () given; at least one is needed")
        one_of("norm", self.norm, NORMS)
        if self.norm == "group" and self.width % self.groups:
            raise InputError(
                f"groups: {self.groups} given; allowed: a divisor of the width {self.width}"
            )

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """The width and the stride of every block."""
        return tuple(
            (self.width * 2**stage, 2 if stage and not i else 1)
            for stage, n in enumerate(self.stages)
            for i in range(n)
        )


SIZES = {
    "tiny": Config((2, 1), 16, classes=4, size=16),
    "tiny-group": Config((2, 1), 8, True, 4, 8, norm="group", groups=4, small=True),
    "resnet-18": Config((2, 2, 2, 2)),
    "resnet-34": Config((3, 4, 6, 3)),
    "resnet-50": Config((3, 4, 6, 3), bottleneck=True),
    "resnet-18-group": Config((2, 2, 2, 2), norm="group"),
    "resnet-50-group": Config((3, 4, 6, 3), bottleneck=True, norm="group"),
}


def axes(config: Config) -> Axes:
    """Return the axes of the leaves.

    Each stage has its channels, `C0` and so on; `F` and `H` are inside of a block.
    """
    rules = _conv_axes("stem", "C0", "p")
    stream = "C0"
    layer = 0
    for stage, depth in enumerate(config.stages):
        out = f"C{stage + config.bottleneck}"
        for _ in range(depth):
            if config.bottleneck:
                convs = {"conv1": ("F", stream), "conv2": ("H", "(Fs)"), "conv3": (out, "H")}
            else:
                convs = {"conv1": ("F", f"({stream}s)"), "conv2": (out, "(Fs)")}
            if out != stream:
                convs["halve" if stage else "widen"] = (out, stream)
            for name, letters in convs.items():
                rules += _conv_axes(f"blocks/{layer}/{name}", *letters)
            stream = out
            layer = layer + 1
    # a group norm knows which channels are neighbours
    ordered = ("V", "C", "F", "H") if config.norm == "group" else ("V",)
    return Axes((*rules, ("head", f"c{stream}"), ("head_bias", "c")), (("s", 9),), ordered=ordered)


def _conv_axes(path: str, out: str, before: str) -> list[tuple[str, str]]:
    return [
        (path, out + before),
        (tree.optional(f"{path}_norm/(weight|bias)"), out),
        (tree.optional(f"{path}_norm/(mean|variance)"), f"{out} measured"),
        (tree.optional(f"{path}_bias"), out),  # a convolution into which its norm was folded
    ]


def _norm(config: Config, train: bool) -> Any:
    if config.norm == "batch":
        return functools.partial(BatchNorm, config.norm_eps, train)
    return functools.partial(GroupNorm, config.groups, config.norm_eps)


class _Stem(nn.Module):
    config: Config
    policy: ops.Policy

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        c = self.config
        side, stride = (3, 1) if c.small else (7, 2)
        y = conv(
            self,
            x,
            "stem",
            c.width,
            side,
            self.policy,
            stride=stride,
            pad=side // 2,
            norm=_norm(c, train),
        )
        return nn.relu(y) if c.small else ops.max_pool(nn.relu(y), (3, 3), (2, 2), pad=1)


class _Block(nn.Module):
    config: Config
    policy: ops.Policy

    @nn.compact
    def __call__(
        self, x: jax.Array, stride: int = 1, train: bool = False, width: int = 0
    ) -> jax.Array:
        """Run one block; `width` is that of new leaves, existing ones have their own."""
        c = self.config

        def step(x: jax.Array, name: str, width: int, side: int, stride: int = 1) -> jax.Array:
            return conv(
                self,
                x,
                name,
                width,
                side,
                self.policy,
                stride=stride,
                pad=side // 2,
                norm=_norm(c, train),
            )

        if c.bottleneck:
            y = nn.relu(step(x, "conv1", width, 1))
            y = nn.relu(step(y, "conv2", width, 3, stride))
            y = step(y, "conv3", 4 * width, 1)
        else:
            y = nn.relu(step(x, "conv1", width, 3, stride))
            y = step(y, "conv2", width, 3)
        if stride == 2 or y.shape != x.shape:
            x = step(x, "halve" if stride == 2 else "widen", y.shape[-1], 1, stride)
        return nn.relu(x + y)


@family(Config, SIZES)
def model(config: Config, policy: ops.Policy = ops.Policy()) -> Model:
    """Return the model of one config.

    Equal arguments give the same functions, so nothing is traced twice.
    """
    stem = _Stem(config, policy)
    block_module = _Block(config, policy)
    head_module = Head(config.classes, policy)
    inputs = pixel_inputs(config.size, config.channels)

    def block(
        params: Any,
        x: Any,
        context: Any,
        cache: Any = None,
        layer: Any = 0,
        rng: Any = None,
        train: bool = False,
    ) -> Any:
        # What a block does follows from its leaves, not from its index, which is traced in a scan.
        return (
            block_module.apply({"params": params}, x, 2 if "halve" in params else 1, train),
            cache,
            {},
        )

    def head(params: Any, x: Any, rng: Any = None, train: bool = False) -> Any:
        mean = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        return head_module.apply({"params": params}, mean)

    def init(key: jax.Array) -> tree.Params:
        stem_key, head_key, *keys = jax.random.split(key, len(config.blocks) + 2)
        x, own = stem.init_with_output(
            stem_key, jnp.zeros(inputs(1, 1)["pixels"].shape, policy.activation_dtype)
        )
        settings = ((stride, False, width) for width, stride in config.blocks)
        x, blocks = init_in_turn(block_module, keys, x, settings)
        top = head_module.init(head_key, jnp.mean(x, axis=(1, 2)))["params"]
        return tree.stack({**own["params"], "blocks": blocks, **top})

    return Model(
        config, policy, init, Parts(stem_of(stem, policy), block, head), inputs, None, axes(config)
    )
