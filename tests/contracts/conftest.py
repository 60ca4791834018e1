"""The members that the laws are about: every size whose name begins with `tiny`, of every file in jaxmodel/models."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import tree
from jaxmodel.models import Model, sizes

B, T = 3, 8
TINY = [name for name in sizes() if name.split("/")[1].startswith("tiny")]


def is_decoder(name: str) -> bool:
    """Whether a member reads one text and continues it."""
    module, config = sizes()[name]
    model = module.model(config)
    return model.init_cache is not None and list(model.inputs(1, 1)) == ["tokens"]


def example(model: Model, batch: int, length: int, seed: int = 0) -> dict[str, jax.Array]:
    """Inputs with the shapes that the model says it needs."""
    rng = np.random.default_rng(seed)

    def one(a: jax.ShapeDtypeStruct) -> jax.Array:
        whole = jnp.issubdtype(a.dtype, jnp.integer)
        return jnp.asarray(rng.integers(0, model.config.vocab, a.shape) if whole else rng.normal(size=a.shape), a.dtype)

    return {name: one(a) for name, a in model.inputs(batch, length).items()}


@dataclasses.dataclass(frozen=True)
class Case:
    """A member with parameters that are large everywhere, biases and norms too."""

    name: str
    module: Any
    model: Model
    params: tree.Params
    inputs: dict[str, jax.Array]
    apply: Any  # jitted: params, inputs -> logits

    @property
    def tokens(self) -> jax.Array:
        return self.inputs["tokens"]


def make_case(name: str) -> Case:
    module, config = sizes()[name]
    model = module.model(config)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.2, a.dtype), shapes)
    params = positive(params)
    apply = jax.jit(lambda params, inputs: model.apply(params, inputs).logits)
    return Case(name, module, model, params, example(model, B, T), apply)


def positive(params: tree.Params) -> tree.Params:
    """Statistics that are variances must be above zero to mean anything."""
    return tree.map_leaves(lambda path, leaf: jnp.abs(leaf) + 0.5 if path.endswith("variance") else leaf, params)


@pytest.fixture(scope="module", params=TINY)
def case(request) -> Case:
    return make_case(request.param)


@pytest.fixture(scope="module", params=[name for name in TINY if is_decoder(name)])
def decoder(request) -> Case:
    return make_case(request.param)
