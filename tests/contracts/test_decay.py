"""Which weights decay as the settings stand: matrices, in every family and in modules of others,
and nothing else.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmodel import adapt, axes, models, optim, train, tree
from jaxmodel.models import gpt2

X = jax.ShapeDtypeStruct((1, 4, 6), jnp.float32)


class Linen(nn.Module):
    """Attention, whose biases have two axes, and a class token of three."""

    @nn.compact
    def __call__(self, x):
        cls = self.param("cls", nn.initializers.ones, (1, 1, 6))
        x = nn.LayerNorm()(x + self.param("offset_bias", nn.initializers.ones, (4, 6))[None])
        x = nn.MultiHeadDotProductAttention(num_heads=2)(x)
        x = nn.BatchNorm(use_running_average=True)(nn.GroupNorm(num_groups=2)(x)) + cls
        return nn.Dense(3)(nn.Conv(5, (1,))(x))


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.out = nnx.Linear(6, 3, rngs=rngs)
        self.query = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)

    def __call__(self, x):
        return self.out(self.query(self.norm(x)))


def members() -> dict[str, models.Model]:
    found = {
        f"{family}/{size}": module.model(config)
        for family, module in models.families().items()
        for size, config in module.SIZES.items()
        if size.startswith("tiny")
    }
    adapted = adapt.with_adapters(gpt2.model(gpt2.SIZES["tiny"]))
    return {
        **found,
        "linen": models.from_linen(Linen(), X),
        "nnx": models.from_nnx(Nnx, X),
        "lora": adapted,
    }


MEMBERS = members()
VECTORS = (
    "bias",
    "scale",
    "weight_bias",
    "class",
    "cls",
    "mean",
    "variance",
    "var",
    "importance",
    "score",
)


def decaying(optimizer, params: tree.Params) -> set[str]:
    """What moves where the gradient is zero."""
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params, value=0.0
    )
    return {path for path, u in tree.flatten(updates).items() if np.any(np.asarray(u) != 0)}


def ones(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Two units for each axis, since how many there are is nothing to decay: few shapes, so few
    programs.
    """
    layers = leaf.ndim - len(tree.layer_shape(path, leaf))
    return jnp.ones((*leaf.shape[:layers], *(min(n, 2) for n in leaf.shape[layers:])), leaf.dtype)


@pytest.mark.parametrize("name", MEMBERS)
def test_matrices_decay_and_nothing_else(name):
    model = MEMBERS[name]
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    if name == "lora":
        one = gpt2.model(gpt2.SIZES["tiny"])
        rules = [(".*/attn/q", adapt.LoRA(2)), (".*", None)]
        shapes = jax.eval_shape(
            lambda key: adapt.lora(one, one.init(key), rules, key)[1], jax.random.key(0)
        )
    params = tree.map_leaves(ones, tree.partition(shapes, axes.trainable(model.axes))[0])
    settings = {
        "schedule": "constant",
        "warmup_steps": 0,
        "learning_rate": 0.1,
        "weight_decay": 0.5,
    }
    for optimizer in (
        train.make_optimizer(train.TrainConfig(steps=4, optimizer="sgd", **settings), model.axes),
        optim.optimizer("sgd", 0.1, weight_decay=0.5),
    ):
        found = decaying(optimizer, params)
        for path, leaf in tree.flatten(params).items():
            last = path.split("/")[-1]
            above = (path.split("/")[-2:-1] or [""])[0].lower()
            vector = (
                len(tree.layer_shape(path, leaf)) < 2
                or last in VECTORS
                or last.endswith("_bias")
                or "norm" in above
            )
            assert (path in found) == (not vector), path
    apart = tree.unstack(params)
    assert {layer for path in found for layer in tree.layer_paths(path)} == decaying(
        optimizer, apart
    )  # storage is not meaning


def test_rules_still_say_otherwise():
    params = {"w": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    config = train.TrainConfig(
        optimizer="sgd", schedule="constant", warmup_steps=0, decay=[("bias", True), (".*", False)]
    )
    assert decaying(train.make_optimizer(config), params) == {"bias"}
    everything = optim.optimizer(
        "sgd", 0.1, weight_decay=1.0, mask=lambda p: jax.tree.map(lambda _: True, p)
    )
    assert decaying(everything, params) == {"w", "bias"}


def test_a_bare_array_decays_by_its_axes():
    for leaf, moves in ((jnp.ones((2, 3)), True), (jnp.ones(3), False)):
        sgd = optim.optimizer("sgd", 1.0, weight_decay=1.0)
        updates, _ = sgd.update(jnp.zeros_like(leaf), sgd.init(leaf), leaf)
        assert bool(np.any(np.asarray(updates) != 0)) == moves
