"""How layers are stacked is storage: optimisers, penalties, projections and averages are those of
each layer alone.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodel import optim, train, tree
from jaxmodel.axes import Axes, role_of
from jaxmodel.losses import penalties as regularize
from jaxmodel.optim import optimizers
from jaxmodel.optim.optimizers import each_layer
from jaxmodel.train.exchange import GradientCompression
from jaxmodel.train.state import init_state

L = 3
E = 2


def leaf(*shape: int, seed: int = 0) -> jax.Array:
    """Layers, and experts, of quite different size."""
    random = np.random.default_rng(seed).normal(size=shape)
    factors = (4.0 ** np.arange(L)).reshape(-1, *[1] * (len(shape) - 1))
    return jnp.asarray(random * factors, jnp.float32)


def stacked(seed: int = 0) -> tree.Params:
    """Matrices large enough for factors (128) and 8 bits (4,096), vectors that are not, though all
    of them together are.
    """
    layer = {
        "attn": {"q": leaf(L, 130, 160, seed=seed), "q_bias": leaf(L, 1600, seed=seed + 1)},
        "moe": {
            "up": leaf(L, E, 132, 160, seed=seed + 2),
            "router": leaf(L, E, 160, seed=seed + 3),
        },
        "attn_norm": {"weight": leaf(L, 160, seed=seed + 4)},
    }
    return {"blocks": {f"0-{L - 1}": layer}, "embed": leaf(L, 160, seed=seed + 5)}


def updates_of(optimizer, params: tree.Params, steps: int = 2) -> tree.Params:
    optimizer = optax.with_extra_args_support(optimizer)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params, value=jnp.float32(1))
        return jax.tree.map(jnp.add, params, updates), state

    for i in range(steps):
        grads = stacked(10 + i)
        params, state = step(params, state, apart(grads) if "0" in params["blocks"] else grads)
    return params


def apart(params: tree.Params) -> tree.Params:
    return tree.unstack(params)


@pytest.mark.parametrize("name", optimizers.NAMES)
def test_an_optimiser_of_stacked_layers_is_that_of_each(name):
    config = train.TrainConfig(
        steps=9, optimizer=name, warmup_steps=0, max_grad_norm=1.0, weight_decay=0.3
    )
    optimizer = train.make_optimizer(config)
    together = updates_of(optimizer, stacked())
    alone = updates_of(optimizer, apart(stacked()))
    chex.assert_trees_all_close(apart(together), alone, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", optimizers.NAMES)
def test_an_expert_is_a_matrix_of_its_own(name):
    """Beside one whose gradients are a thousand times as large an expert moves as it would
    alone.
    """
    if name == "adamw8":
        pytest.skip("rounded at random: an expert's dither is that of its place in the leaf")
    small = leaf(1, 140, 150)[0]
    large = 1e3 * leaf(1, 140, 150, seed=1)[0]
    make = lambda *experts: {"blocks": {"0": {"moe": {"up": jnp.stack(experts)}}}}
    optimizer = optimizers.optimizer(name, 0.1, roles=role_of(Axes(((".*", "EFD"),))))
    both = make(small, large)
    one = make(small)
    found = [optimizer.update(params, optimizer.init(params), params)[0] for params in (both, one)]
    both, one = (np.asarray(u["blocks"]["0"]["moe"]["up"])[0] for u in found)
    np.testing.assert_allclose(both, one, rtol=1e-4, atol=1e-7)


def test_others_become_so_by_each_layer():
    """LAMB's trust ratio, clipping by blocks: |w| / |u| over a stack would mix its layers."""
    for direction in (optax.lamb(0.1), optax.adaptive_grad_clip(0.1), optax.clip_by_block_rms(0.1)):
        wrapped = each_layer(direction)
        together = updates_of(wrapped, stacked())
        alone = updates_of(wrapped, apart(stacked()))
        chex.assert_trees_all_close(apart(together), alone, rtol=1e-5, atol=1e-6)


def test_penalties_and_bounds():
    params = stacked()
    rules = [(".*/attn/q", "elastic(0.1, 0.2)"), (".*", None)]
    together, alone = (regularize.penalties(rules, p) for p in (params, apart(params)))
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    bound = optim.project([(".*/q", "max_norm(0.5)"), (".*", None)])
    chex.assert_trees_all_close(
        apart(updates_of(bound, params)), updates_of(bound, apart(params)), rtol=1e-6, atol=1e-6
    )


def test_what_is_sent_in_fewer_bytes_is_chosen_by_layer():
    exchange = GradientCompression("int8", smallest=3000)
    for path, a in tree.flatten(stacked()).items():
        ones = [
            exchange._large(layer, jax.ShapeDtypeStruct(tree.layer_shape(path, a), a.dtype))
            for layer in tree.layer_paths(path)
        ]
        assert {exchange._large(path, a)} == set(ones), path


def test_masters_and_averages():
    params = tree.cast(stacked(), jnp.bfloat16)
    optimizer = optimizers.optimizer("adafactor", 0.01)
    states = [init_state(p, optimizer, average=True) for p in (params, apart(params))]
    chex.assert_trees_all_equal(apart(states[0].extra["average"]), states[1].extra["average"])
    chex.assert_trees_all_equal(apart(states[0].opt_state.params), states[1].opt_state.params)
