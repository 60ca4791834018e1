"""Bundles of other people's Flax modules: what is stated, who hands the code over, and that a
folder imports none of it.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxmodel import hub
from jaxmodel.errors import InputError
from jaxmodel.hub.images import ImageProcessor
from jaxmodel.models import from_linen, from_nnx, mlp

PIXELS = {"pixels": jax.ShapeDtypeStruct((1, 4, 4, 1), jnp.float32)}


class Net(nn.Module):
    widths: tuple[int, ...] = (6,)
    rate: float = 0.1
    activation: Callable[..., Any] | None = None

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = x.reshape(x.shape[0], -1)
        for width in self.widths:
            x = nn.BatchNorm(use_running_average=not train)(
                (self.activation or nn.relu)(nn.Dense(width)(x))
            )
        return nn.Dense(3)(nn.Dropout(self.rate, deterministic=not train)(x))


class Small(nnx.Module):
    def __init__(self, width: int, out: int, rngs: nnx.Rngs):
        self.one = nnx.Linear(16, width, rngs=rngs)
        self.two = nnx.Linear(width, out, rngs=rngs)

    def __call__(self, x):
        return self.two(nnx.relu(self.one(x.reshape(x.shape[0], -1))))


def saved(model, folder, processor=None) -> hub.Bundle:
    bundle = hub.Bundle(model, jax.jit(model.init)(jax.random.key(1)), processor)
    bundle.save_pretrained(folder)
    return bundle


@pytest.mark.parametrize("module", [Net((5, 4), 0.2), Net], ids=["module", "class"])
def test_the_module_or_its_class_is_handed_over(module, tmp_path):
    processor = ImageProcessor(size=4, crop=(4, 4), mean=(0.0,), std=(1.0,))
    bundle = saved(from_linen(Net((5, 4), 0.2), PIXELS), tmp_path / "net", processor)
    stated = json.loads((tmp_path / "net" / "config.json").read_text())
    assert stated["module"] == f"{__name__}:Net" and stated["flax"] == "linen"
    assert (
        stated["fields"] == {"widths": [5, 4], "rate": 0.2, "activation": None}
        and stated["stated"] == {}
    )
    assert stated["inputs"] == {"pixels": {"shape": [1, 4, 4, 1], "dtype": "float32"}}
    again = hub.from_pretrained(tmp_path / "net", module=module)
    assert again.model is bundle.model and again.processor == processor
    chex.assert_trees_all_equal(again.params, bundle.params)
    assert list(again.params["state"]) == ["batch_stats"]


@pytest.mark.parametrize(
    "module", [functools.partial(Small, 5, out=3), Small], ids=["partial", "class"]
)
def test_nnx_modules_too(module, tmp_path):
    bundle = saved(from_nnx(functools.partial(Small, 5, out=3), PIXELS), tmp_path / "net")
    stated = json.loads((tmp_path / "net" / "config.json").read_text())
    assert (stated["module"], stated["fields"]) == (f"{__name__}:Small", {"": [5], "out": 3})
    again = hub.from_pretrained(tmp_path / "net", module=module)
    chex.assert_trees_all_equal(again.params, bundle.params)
    x = jnp.ones((2, 4, 4, 1))
    chex.assert_trees_all_equal(
        *(jax.jit(one.model.apply)(one.params, x).logits for one in (again, bundle))
    )


def test_a_module_that_is_made_may_be_handed_over(tmp_path):
    made = Small(5, 3, nnx.Rngs(0))
    saved(from_nnx(made, PIXELS), tmp_path / "net")
    again = hub.from_pretrained(tmp_path / "net", module=Small(5, 3, nnx.Rngs(7)))
    chex.assert_trees_all_equal(again.params["one"]["kernel"], made.one.kernel[...])
    with pytest.raises(
        InputError, match="Small cannot be made from the fields"
    ):  # nobody knows with which arguments
        hub.from_pretrained(tmp_path / "net", module=Small)


def test_without_the_module_one_line_says_how(tmp_path):
    saved(from_linen(Net((5,), 0.2), PIXELS), tmp_path / "net")
    with pytest.raises(
        InputError, match=r"module '.*:Net', whose code .* module=Net\(widths=\[5\], rate=0.2"
    ) as error:
        hub.from_pretrained(tmp_path / "net")
    assert "\n" not in str(error.value)


def test_nothing_is_imported_from_where_a_folder_says(tmp_path):
    saved(from_linen(Net(), PIXELS), tmp_path / "net")
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    (tmp_path / "net" / "config.json").write_text(json.dumps({**config, "module": "trap:Net"}))
    (tmp_path / "trap.py").write_text("raise SystemExit('it was imported')")
    program = (
        "import jaxmodel\ntry:\n    jaxmodel.from_pretrained('net')\nexcept ValueError as "
        "error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "trap:Net" in done.stdout


def test_what_does_not_fit_is_refused(tmp_path):
    saved(from_linen(Net((5,), 0.2), PIXELS), tmp_path / "net")
    for module, message in (
        (Net((5,), 0.3), "its rate is 0.3, but .* states 0.2"),
        (Net((6,), 0.2), r"its widths is \(6,\), but .* states \[5\]"),
        (nn.Dense(3), "the tensor 'bias' is missing|has no place|is missing"),
        (
            mlp.model(mlp.Config(4, (8,), 2)),
            "a model of jaxmodel.models.mlp given; allowed: one of from_linen or from_nnx",
        ),
        (3, "3"),
    ):
        with pytest.raises(InputError, match=message):
            hub.from_pretrained(tmp_path / "net", module=module)
    other = from_linen(Net((5,), 0.3), PIXELS)  # a model is taken as it is
    assert hub.from_pretrained(tmp_path / "net", module=other).model is other
    with pytest.raises(InputError, match="policy"):
        hub.from_pretrained(tmp_path / "net", module=other, dtype="bfloat16")
    ours = mlp.model(mlp.Config(4, (8,), 2))
    saved(ours, tmp_path / "ours")
    with pytest.raises(
        InputError, match="module: given for .*, whose model_type is 'jaxmodel-mlp'"
    ):
        hub.from_pretrained(tmp_path / "ours", module=Net())


def test_what_json_does_not_hold_is_stated_and_handed_over(tmp_path):
    saved(from_linen(Net(activation=nn.tanh), PIXELS), tmp_path / "net")
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    assert "tanh" in config["stated"]["activation"]
    with pytest.raises(
        InputError, match="with activation, which JSON cannot store; pass the module itself"
    ):
        hub.from_pretrained(tmp_path / "net", module=Net)
    hub.from_pretrained(tmp_path / "net", module=Net(activation=nn.tanh))
    model = from_linen(
        nn.Dense(3), PIXELS, call=lambda module, inputs, train: module(inputs["pixels"])
    )
    saved(model, tmp_path / "called")
    with pytest.raises(InputError, match="needs its own `call`; pass a model"):
        hub.from_pretrained(tmp_path / "called", module=nn.Dense(3))
