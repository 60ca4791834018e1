"""One feature extractor for several inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmodel import tree
from jaxmodel.errors import InputError, one_of
from jaxmodel.layers.connect.full import Full, by_name
from jaxmodel.ops.edges import Edges

MERGES = ("concat", "sum", "mean", "max")


class Shared(nn.Module):
    """The same extractor for each of several inputs (Bromley et al., 1993).

    `merged` combines its outputs for one head.

    Attributes:
      extractor: any module `[B, N] -> [B, D]`, made with `parent=None` inside of another module;
        its leaves exist once, under `extractor`.

    >>> import jax
    >>> from jaxmodel import ops
    >>> two = {"left": jnp.ones((2, 3)), "right": jnp.zeros((2, 3))}
    >>> module = Shared(Full(4, ops.Policy()))
    >>> features, variables = jax.jit(module.init_with_output)(jax.random.key(0), two)
    >>> tree.count(variables["params"]), merged(features, "max").shape
    (16, (2, 4))
    """

    extractor: nn.Module

    def __call__(self, xs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the features of each input, by name."""
        xs = by_name(xs)
        if len({x.shape[-1] for x in xs.values()}) > 1:
            sizes = ", ".join(f"{name} {x.shape[-1]}" for name, x in xs.items())
            raise InputError(
                f"branches: {sizes} features given; allowed for a shared extractor: the same "
                "number in each"
            )
        return {name: self.extractor(x) for name, x in xs.items()}

    def edges(self, params: tree.Params, count: int) -> Edges:
        """Return the connections of `count` inputs through a `Full` extractor as a list.

        They are those of one input, repeated with their weights. The outputs are concatenated, as
        by `merged` with "concat".
        """
        if not isinstance(self.extractor, Full):
            raise InputError(
                f"extractor: {type(self.extractor).__name__} given; allowed: a Full one, whose "
                "edges are known"
            )
        one = self.extractor.edges(params["extractor"])
        total = count * one.features
        of_input = np.arange(count, dtype=np.int32)[:, None]
        sources = np.where(
            one.sources == one.features, total, one.sources + one.features * of_input[..., None]
        )
        return dataclasses.replace(
            one,
            sources=sources.reshape(-1, one.sources.shape[1]),
            targets=(one.targets + one.outputs * of_input).reshape(-1),
            weights=jnp.tile(one.weights, count),
            features=total,
            outputs=count * one.outputs,
        )


def merged(xs: Mapping[str, Array], how: str = "concat") -> Float[Array, "B M"]:
    """Merge several branches into one input of a head.

    "concat" concatenates them in the order of their names; the others are "sum", "mean" and "max".

    Raises:
      InputError: `how` is unknown, or branches of different widths are not concatenated.

    >>> merged({"b": jnp.array([[1.0]]), "a": jnp.array([[2.0]])}).tolist()
    [[2.0, 1.0]]
    """
    one_of("merge", how, MERGES)
    xs = by_name(xs)
    if how == "concat":
        return jnp.concatenate(list(xs.values()), axis=-1)
    if len({x.shape for x in xs.values()}) > 1:
        raise InputError(f"merge: {how!r} given for branches of several widths; allowed: 'concat'")
    return getattr(jnp, how)(jnp.stack(list(xs.values())), axis=0)
