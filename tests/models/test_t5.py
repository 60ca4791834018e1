"""T5's own: sizes of the named members against the published ones, and its bias of relative
positions.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import tree
from jaxmodel.errors import InputError
from jaxmodel.models import t5

# weights of the released checkpoints, a tied head counted once
COUNTS = {
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-v1.1-small": 76_961_152,
    "flan-t5-small": 76_961_152,
}


@pytest.mark.parametrize("name", COUNTS)
def test_named_sizes_have_the_published_number_of_weights(name):
    shapes = jax.eval_shape(t5.model(t5.SIZES[name]).init, jax.random.key(0))
    assert sum(math.prod(a.shape) for a in jax.tree.leaves(shapes)) == COUNTS[name]


def test_the_bias_is_one_leaf_for_all_layers_and_moves_with_the_text():
    config = t5.SIZES["tiny"]
    params = jax.jit(t5.model(config).init)(jax.random.key(0))
    assert [path for path in tree.flatten(params) if path.endswith("positions")] == [
        "encoder/positions",
        "positions",
    ]
    table = params["positions"]
    places = jnp.arange(9, dtype=jnp.int32)[None]
    bias = t5.position_bias(table, places, places, False, config)
    assert bias.shape == (1, config.heads, 9, 9)
    np.testing.assert_array_equal(
        bias, t5.position_bias(table, places + 50, places + 50, False, config)
    )
    np.testing.assert_array_equal(
        bias[0, :, 0, :], np.repeat(table[0][:, None], 9, axis=1)
    )  # what follows counts as near
    both = t5.position_bias(table, places, places, True, config)
    assert (
        len(np.unique(both[0, 0, 4])) == 8 - 1
    )  # 4 buckets on each side; distance 0 has one only, 1 to 4 fall into the rest


def test_new_queries_make_up_for_scores_that_are_not_scaled():
    config = dataclasses.replace(t5.SIZES["tiny"], width=64, heads=8, head_width=32)
    params = jax.jit(t5.model(config).init)(jax.random.key(0))
    of_q, of_k = (np.std(params["encoder"]["blocks"]["0-1"]["attn"][name]) for name in "qk")
    assert of_k == pytest.approx(64**-0.5, rel=0.05) and of_q == pytest.approx(
        (64 * 32) ** -0.5, rel=0.05
    )


def test_the_head_is_scaled_where_it_is_tied():
    config = dataclasses.replace(t5.SIZES["tiny"], head_scale=None)
    params = jax.jit(t5.model(config).init)(jax.random.key(0))
    x = jnp.ones((1, 1, 32), jnp.float32)
    assert config.scale == 32**-0.5 and dataclasses.replace(config, tied=False).scale == 1
    want = jnp.einsum("btd,vd->btv", x, params["embed"]) / math.sqrt(32)
    np.testing.assert_allclose(t5.model(config).parts.head(params, x), want, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp": "gelu"}, "mlp: 'gelu' is not known; allowed: gated-gelu, gated-silu, relu"),
        (
            {"buckets": 3},
            "buckets, distance: 3, 6 given; allowed: at least 4 buckets, and a distance of more "
            "than half of them",
        ),
        ({"distance": 4}, "buckets, distance: 8, 4 given"),
        ({"encoder_depth": 0}, "encoder_depth: 0 given"),
    ],
)
def test_wrong_configs(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(t5.SIZES["tiny"], **change)
