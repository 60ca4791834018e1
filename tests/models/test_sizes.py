"""Named sizes have the number of parameters that their papers and cards give."""

from __future__ import annotations

import math

import jax
import pytest

from jaxmodel.models import sizes

# Of the papers (to the digits that they print), and of the model cards where those are exact.
PARAMETERS = {
    "gpt2/gpt2": 124_439_808,
    "gpt2/gpt2-medium": 354_823_168,
    "gpt2/gpt2-large": 774_030_080,
    "gpt2/gpt2-xl": 1_557_611_200,
    "gpt2/gpt3-2.7b": 2.7e9,
    "gpt2/gpt3-6.7b": 6.7e9,
    "gpt2/gpt3-13b": 13.0e9,
    "gpt2/gpt3-175b": 175e9,
    "llama/smollm2-135m": 134_515_008,
    "llama/llama-2-7b": 6_738_415_616,
    "llama/llama-3-8b": 8_030_261_248,
    "llama/llama-3-70b": 70_553_706_496,
    "llama/llama-3-405b": 405_853_388_800,
    "llama/llama-3.1-8b": 8_030_261_248,
    "llama/mistral-7b": 7_241_732_096,
    "llama/qwen2-0.5b": 494_032_768,
    "llama/qwen2-7b": 7_615_616_512,
    "llama/qwen3-0.6b": 596_049_920,
    "llama/qwen3-8b": 8_190_735_360,
    "llama/gemma-2-2b": 2_614_341_888,
    "llama/gemma-3-1b": 999_885_952,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name: str) -> None:
    module, config = sizes()[name]
    shapes = jax.eval_shape(module.model(config).init, jax.random.key(0))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    want = PARAMETERS[name]
    assert count == want if isinstance(want, int) else count == pytest.approx(want, rel=0.02)
