"""A multi-layer perceptron with dropout: the smallest model, and the one to read first.

>>> mlp = model(SIZES["tiny"])
>>> params = jax.jit(mlp.init)(jax.random.key(0))
>>> list(params["blocks"])  # layers that are equal stand stacked and are run by one scan
['0', '1-2', '3']
>>> jax.jit(mlp.apply)(params, jnp.zeros((2, 16))).logits.shape
(2, 4)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodel import ops, tree
from jaxmodel.axes import Axes
from jaxmodel.errors import InputError
from jaxmodel.layers import activation, dense, dropout
from jaxmodel.models.family import family
from jaxmodel.models.images import Head, check_classifier
from jaxmodel.models.model import Model, read
from jaxmodel.models.parts import Parts, feature_inputs, head_of, init_in_turn


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a member of the family.

    Attributes:
      features: the number N of features of an input; the pixels of an image are features too.
      widths: the widths of the hidden layers.
      classes: the number of classes C.
      activation: see `layers.activation`.
      dropout: the dropout rate of each hidden layer (Srivastava et al., 2014).
    """

    features: int
    widths: tuple[int, ...]
    classes: int
    activation: str = "relu"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_classifier(self, ("features", "classes"), ("widths",))
        if not self.widths:
            raise InputError("widths: () given; at least one is needed")


SIZES = {
    "tiny": Config(16, (32, 32, 32, 24), 4, dropout=0.1),
    "mnist": Config(784, (512, 512), 10, dropout=0.2),
}


def axes(config: Config) -> Axes:
    """Return the axes of the leaves.

    `F1` are the units of the first layer, which the second reads, and so on.
    """
    rules = []
    for i, before in enumerate(["n", *(f"F{i + 1}" for i in range(len(config.widths) - 1))]):
        rules += [
            (f"blocks/{i}/dense", f"F{i + 1}{before}"),
            (f"blocks/{i}/dense_bias", f"F{i + 1}"),
        ]
    return Axes((*rules, ("head", f"cF{len(config.widths)}"), ("head_bias", "c")))


class _Layer(nn.Module):
    config: Config
    policy: ops.Policy

    @nn.compact
    def __call__(self, x: jax.Array, rng: Any = None, width: int = 0) -> jax.Array:
        y = dense(self, x, "dense", width, self.policy)  # an existing leaf has its own width
        return dropout(activation(self.config.activation)(y), self.config.dropout, rng)


@family(Config, SIZES)
def model(config: Config, policy: ops.Policy = ops.Policy()) -> Model:
    """Return the model of one config.

    Equal arguments give the same functions, so nothing is traced twice.
    """
    layer_module = _Layer(config, policy)
    head_module = Head(config.classes, policy)

    def embed(
        params: Any, inputs: Any, cache: Any = None, rng: Any = None, train: bool = False
    ) -> Any:
        x = read(inputs, "features")
        return x.reshape(x.shape[0], -1).astype(policy.activation_dtype), {}

    def block(
        params: Any,
        x: Any,
        context: Any,
        cache: Any = None,
        layer: Any = 0,
        rng: Any = None,
        train: bool = False,
    ) -> Any:
        return layer_module.apply({"params": params}, x, rng if train else None), cache, {}

    def init(key: jax.Array) -> tree.Params:
        *keys, head_key = jax.random.split(key, len(config.widths) + 1)
        x = jnp.zeros((1, config.features), policy.activation_dtype)
        x, blocks = init_in_turn(layer_module, keys, x, ((None, width) for width in config.widths))
        return tree.stack({"blocks": blocks, **head_module.init(head_key, x)["params"]})

    parts = Parts(embed, block, head_of(head_module))
    return Model(config, policy, init, parts, feature_inputs(config.features), None, axes(config))
