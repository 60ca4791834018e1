"""Stochastic depth of any model: whole blocks are left out of a training step, the later ones more
often.
"""

from __future__ import annotations

from typing import Any

import jax

from jaxmodel import tree
from jaxmodel.errors import InputError
from jaxmodel.layers.stochastic_depth import stochastic_depth as of_rows
from jaxmodel.models.model import Model, Parts, wrap

_SITE = 2**32 - 1  # tells its draws apart from the dropout within a block


def stochastic_depth(model: Model, rate: float) -> Model:
    """The model whose layer l of L a row skips with the probability `rate (l + 1) / L` in training
    (Huang et al., 2016).

    What a block adds to its input is 0, or divided by the probability to stay. Blocks that change
    the shape always run. Of a model with an encoder these are the layers of the decoder.

    Args:
      model: with blocks.
      rate: of the last layer, from 0 to below 1.

    Raises:
      InputError: a model without blocks, or a rate outside of [0, 1).

    >>> from jaxmodel.models import mlp
    >>> model = mlp.model(mlp.Config(4, (4, 4), 2))
    >>> params, x = jax.jit(model.init)(jax.random.key(0)), jax.numpy.ones((1, 4))
    >>> shallower = stochastic_depth(model, 0.9)
    >>> drawn = shallower.apply(params, x, rng=jax.random.key(1), train=True).logits
    >>> whole = model.apply(params, x).logits
    >>> bool((drawn == whole).all()), bool((shallower.apply(params, x).logits == whole).all())
    (False, True)
    """
    if not 0 <= rate < 1:
        raise InputError(f"rate: {rate!r} given; allowed: from 0 to below 1")
    if model.parts.block is None:
        raise InputError(
            "model: one without blocks given; stochastic depth needs layers that repeat"
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
                y = of_rows(x, y, rate * ((layer + 1) / depth), rng, _SITE)
            return y, cache, aux

        return parts._replace(block=block)

    return wrap(model, change)
