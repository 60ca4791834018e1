"""DenseNet (Huang et al., 2017): each layer reads the outputs of all layers before it in its stage.

The outputs are concatenated. Norm and activation precede each convolution; a bottleneck of 1 x 1
precedes one of 3 x 3. Between two stages a 1 x 1 transition halves the channels, and pooling halves
the sides; here it is the start of the next stage's first layer.

>>> densenet = model(SIZES["tiny"])
>>> params = jax.jit(densenet.init)(jax.random.key(0))
>>> {key: layer["conv1"].shape[1] for key, layer in params["blocks"].items()}  # the channels grow
{'0': 64, '1': 128, '2': 96}
>>> jax.jit(densenet.apply)(params, jnp.zeros((2, 4, 4, 3))).logits.shape
(2, 4)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodel import ops, tree
from jaxmodel.axes import Axes
from jaxmodel.errors import InputError
from jaxmodel.layers import BatchNorm, conv, dense
from jaxmodel.models.family import family
from jaxmodel.models.images import check_classifier, pixel_inputs, stem_of
from jaxmodel.models.model import Model
from jaxmodel.models.parts import Parts, init_in_turn


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a member of the family.

    Attributes:
      stages: the number of layers of each stage.
      growth: the number of channels that a layer adds.
      classes: the number of classes C.
      size: the height and width of an image in pixels.
      channels: the number of colour channels of an image.
      width: the channels of the stem; 0 for twice the growth.
      bottleneck: the channels of a layer's first convolution, in units of the growth.
      norm_eps: added to the variance by the norms.
      small: for small images: a stem of 3 x 3 at stride 1, not 7 x 7 at stride 2 with pooling.
    """

    stages: tuple[int, ...]
    growth: int = 32
    classes: int = 1000
    size: int = 224
    channels: int = 3
    width: int = 0
    bottleneck: int = 4
    norm_eps: float = 1e-5
    small: bool = False

    def __post_init__(self) -> None:
        check_classifier(self, ("growth", "classes", "size", "channels", "bottleneck"), ("stages",))
        if not self.stages or self.width < 0:
            raise InputError(
                f"stages, width: {self.stages}, {self.width} given; at least one stage and a "
                f"width of 0 or more"
            )

    @property
    def starts(self) -> tuple[bool, ...]:
        """Return, for every layer, whether it begins with a transition."""
        return tuple(stage > 0 and i == 0 for stage, n in enumerate(self.stages) for i in range(n))


SIZES = {
    "tiny": Config((2, 1), 64, 4, 4, width=64, bottleneck=1, small=True),
    "densenet-121": Config((6, 12, 24, 16)),
    "densenet-161": Config((6, 12, 36, 24), 48, width=96),
    "densenet-169": Config((6, 12, 32, 32)),
    "densenet-201": Config((6, 12, 48, 32)),
}


def axes(config: Config) -> Axes:
    """Return the axes of the leaves.

    The channels of each convolution are concatenated to those of all before it in the stage.
    """
    rules = [("stem", "C0p"), *_norm_axes("stem_norm", "C0")]
    parts = ["C0"]
    count = 1
    for layer, starts in enumerate(config.starts):
        at = f"blocks/{layer}"
        if starts:
            rules += [(f"{at}/transition", f"C{count}{_joined(parts)}")]
            rules += _norm_axes(f"{at}/transition_in_norm", _joined(parts))
            parts = [f"C{count}"]
            count = count + 1
        rules += [(f"{at}/conv1", f"F{_joined(parts)}"), (f"{at}/conv2", f"C{count}(Fs)")]
        rules += [
            *_norm_axes(f"{at}/in_norm", _joined(parts)),
            *_norm_axes(f"{at}/conv1_norm", "F"),
        ]
        parts = [*parts, f"C{count}"]
        count = count + 1
    top = [("head", f"c{_joined(parts)}"), ("head_bias", "c"), *_norm_axes("norm", _joined(parts))]
    return Axes((*rules, *top), (("s", 9),))


def _joined(parts: list[str]) -> str:
    return f"[{'+'.join(parts)}]"


def _norm_axes(path: str, letters: str) -> list[tuple[str, str]]:
    """Return the axes of a norm, which may have been folded into a convolution as its bias."""
    return [
        (tree.optional(f"{path}/(weight|bias)"), letters),
        (tree.optional(f"{path}/(mean|variance)"), f"{letters} measured"),
        (tree.optional(f"{path.removesuffix('_norm')}_bias"), letters),
    ]


def _bare(name: str) -> Callable[[jax.Array], jax.Array]:
    """Replace the norm of a convolution by nothing.

    The convolution has no bias either, since the next norm reads what is concatenated.
    """
    return lambda y: y


class _Stem(nn.Module):
    config: Config
    policy: ops.Policy

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        c = self.config
        side, stride = (3, 1) if c.small else (7, 2)
        norm = functools.partial(BatchNorm, c.norm_eps, train)
        y = conv(
            self,
            x,
            "stem",
            c.width or 2 * c.growth,
            side,
            self.policy,
            stride=stride,
            pad=side // 2,
            norm=norm,
        )
        return nn.relu(y) if c.small else ops.max_pool(nn.relu(y), (3, 3), (2, 2), pad=1)


class _Layer(nn.Module):
    config: Config
    policy: ops.Policy

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, starts: bool = False) -> jax.Array:
        """Run one layer; `starts` says whether new leaves have a transition."""
        c = self.config
        norm = functools.partial(BatchNorm, c.norm_eps, train)
        if starts or self.has_variable("params", "transition"):
            y = nn.relu(norm(name="transition_in_norm")(x))
            x = ops.avg_pool(
                conv(self, y, "transition", x.shape[-1] // 2, 1, self.policy, norm=_bare), (2, 2)
            )
        y = nn.relu(norm(name="in_norm")(x))
        y = nn.relu(conv(self, y, "conv1", c.bottleneck * c.growth, 1, self.policy, norm=norm))
        return jnp.concatenate(
            [x, conv(self, y, "conv2", c.growth, 3, self.policy, pad=1, norm=_bare)], axis=-1
        )


class _Head(nn.Module):
    config: Config
    policy: ops.Policy

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        y = nn.relu(BatchNorm(self.config.norm_eps, train, name="norm")(x))
        return dense(
            self,
            jnp.mean(y.astype(jnp.float32), axis=(1, 2)),
            "head",
            self.config.classes,
            self.policy,
            "float32",
        )


@family(Config, SIZES)
def model(config: Config, policy: ops.Policy = ops.Policy()) -> Model:
    """Return the model of one config.

    Equal arguments give the same functions, so nothing is traced twice.
    """
    stem, layer_module, head_module = (module(config, policy) for module in (_Stem, _Layer, _Head))
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
        return layer_module.apply({"params": params}, x, train), cache, {}

    def head(params: Any, x: Any, rng: Any = None, train: bool = False) -> Any:
        return head_module.apply({"params": params}, x, train)

    def init(key: jax.Array) -> tree.Params:
        stem_key, head_key, *keys = jax.random.split(key, sum(config.stages) + 2)
        x, own = stem.init_with_output(
            stem_key, jnp.zeros(inputs(1, 1)["pixels"].shape, policy.activation_dtype)
        )
        x, blocks = init_in_turn(layer_module, keys, x, ((False, one) for one in config.starts))
        return tree.stack(
            {**own["params"], "blocks": blocks, **head_module.init(head_key, x)["params"]}
        )

    return Model(
        config, policy, init, Parts(stem_of(stem, policy), block, head), inputs, None, axes(config)
    )
