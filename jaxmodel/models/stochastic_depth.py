"""Stochastic depth for any model: blocks are skipped in training, the later ones more often."""

from __future__ import annotations

from typing import Any

import jax

from jaxmodel import tree
from jaxmodel.errors import BELOW_ONE, InputError, within
from jaxmodel.layers.stochastic_depth import stochastic_depth as of_rows
from jaxmodel.models.model import Model, wrap
from jaxmodel.models.parts import Parts


def stochastic_depth(model: Model, rate: float) -> Model:
    """Return the model with stochastic depth (Huang et al., 2016).

    In training, a row skips layer l of L with probability `rate (l + 1) / L`: what a block adds to
    its input is 0, or divided by the probability to stay. Blocks that change the shape always run.
    In a model with an encoder, the layers are those of the decoder.

    Args:
      model: a model with blocks.
      rate: the rate of the last layer, from 0 to below 1.

    Raises:
      InputError: the model has no blocks, or the rate is outside of [0, 1).

    >>> from jaxmodel.models import mlp
    >>> model = mlp.model(mlp.Config(4, (4, 4), 2))
    >>> params, x = jax.jit(model.init)(jax.random.key(0)), jax.numpy.ones((1, 4))
    >>> shallower = stochastic_depth(model, 0.9)
    >>> drawn = shallower.apply(params, x, rng=jax.random.key(1), train=True).logits
    >>> whole = model.apply(params, x).logits
    >>> bool((drawn == whole).all()), bool((shallower.apply(params, x).logits == whole).all())
    (False, True)
    """
    within("rate", rate, BELOW_ONE)
    if model.parts.block is None:
        raise InputError(
            "model: no blocks; allowed: a model with repeated layers, which stochastic depth skips"
        )
    depth = tree.depth(jax.eval_shape(model.init, jax.random.key(0))[tree.BLOCKS])

    def change(parts: Parts) -> Parts:
        whole = parts.block
        assert whole is not None

        def block(
            params: Any,
            x: Any,
            context: Any,
            cache: Any = None,
            layer: Any = 0,
            rng: Any = None,
            train: bool = False,
        ):
            y, cache, aux = whole(params, x, context, cache, layer, rng, train)
            if train and y.shape == x.shape:
                y = of_rows(x, y, rate * ((layer + 1) / depth), rng)
            return y, cache, aux

        return parts._replace(block=block)

    return wrap(model, change)
