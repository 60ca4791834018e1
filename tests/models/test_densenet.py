"""DenseNet: sizes of the paper, and a layer's connections written out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodel import tree
from jaxmodel.models import densenet

# Of torchvision, without the statistics of the norms, which are no parameters there.
PARAMETERS = {"densenet-121": 7_978_856, "densenet-161": 28_681_000, "densenet-169": 14_149_480, "densenet-201": 20_013_928}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    shapes = tree.flatten(jax.eval_shape(densenet.model(densenet.SIZES[name]).init, jax.random.key(0)))
    trains = {path: leaf for path, leaf in shapes.items() if not path.endswith(("/mean", "/variance"))}
    assert tree.count(tree.unflatten(trains)) == PARAMETERS[name]


def test_every_layer_of_a_stage_reads_all_before_it():
    """The first channels of a stage's output are what went in, and then what each layer added, untouched."""
    model = densenet.model(densenet.SIZES["tiny"])
    params = jax.jit(model.init)(jax.random.key(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)
    first, context = model.parts.embed(params, {"pixels": x})
    second, _, _ = model.parts.block(params["blocks"]["0"], first, context)
    third, _, _ = model.parts.block(params["blocks"]["1"], second, context)
    assert [y.shape[-1] for y in (first, second, third)] == [64, 128, 192]
    np.testing.assert_array_equal(third[..., :128], second)
    np.testing.assert_array_equal(second[..., :64], first)
    last, _, _ = model.parts.block(params["blocks"]["2"], third, context)
    assert last.shape == (2, 4, 4, 96 + 64)  # a transition halves the channels and the sides
    changed = model.parts.block(params["blocks"]["1"], second.at[..., 0].add(1.0), context)[0]
    assert np.abs(changed[..., 128:] - third[..., 128:]).max() > 1e-3


def test_config_is_checked():
    with pytest.raises(ValueError, match="stages, width"):
        densenet.Config(())
