"""A connection pattern as a list of edges: gather, multiply, sum by target.

Every layer that computes with matrices of first or second order can be written as a list of edges.
Each edge carries the product of its sources, times a weight, to its target. This form is slow, but
it states exactly what is connected: the layers of `jaxmodel.layers.connect` return it, and tests
compare them with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmodel.errors import InputError
from jaxmodel.leaves.leaf import register, static
from jaxmodel.ops.norms import on_last


@register
class Edges:
    """The edges between features and outputs, as a pytree.

    Attributes:
      sources: int32 `[E, order]`, the features whose product each edge carries. The index N stands
        for a constant 1: for a bias, and for edges of a lower order than others.
      targets: int32 `[E]`, the output of each edge.
      weights: `[E]`; several may be one and the same parameter.
      features: N, the number of features.
      outputs: M, the number of outputs.
    """

    sources: Any
    targets: Any
    weights: Any
    features: int = static()
    outputs: int = static()

    def check(self) -> None:
        """Raise InputError if an edge begins or ends outside of the features or outputs.

        Not for use under jit.
        """
        for name, ids, count in (
            ("sources", self.sources, self.features + 1),
            ("targets", self.targets, self.outputs),
        ):
            ids = np.asarray(ids)
            if ids.size and not (ids.min() >= 0 and ids.max() < count):
                raise InputError(
                    f"{name}: {ids.min()} to {ids.max()} given; allowed: 0 to {count - 1}"
                )


class EdgeBlock(NamedTuple):
    """All edges between some ranges of features and a range of outputs.

    Attributes:
      weight: `[O, I, J, ...]`: the output, then a feature of each range; `[O]` alone is a bias.
      sources: the first feature of each range.
      target: the first output.
    """

    weight: Array
    sources: tuple[int, ...] = ()
    target: int = 0


def edges_of(blocks: Iterable[EdgeBlock], features: int, outputs: int) -> Edges:
    """Return the list of all edges of some blocks.

    >>> blocks = [EdgeBlock(jnp.ones((1, 2)), (0,)), EdgeBlock(jnp.ones(1))]
    >>> edges = edges_of(blocks, features=2, outputs=1)
    >>> edges.sources.tolist(), float(edge_sum(jnp.array([[3.0, 4.0]]), edges)[0, 0])
    ([[0], [1], [2]], 8.0)
    """
    blocks = list(blocks)
    order = max([1, *(len(block.sources) for block in blocks)])
    sources = []
    targets = []
    weights = []
    for weight, starts, target in blocks:
        grid = np.indices(weight.shape, np.int32).reshape(weight.ndim, -1)
        rows = [run + np.int32(start) for run, start in zip(grid[1:], starts, strict=True)]
        rows += [np.full(grid.shape[1], features, np.int32)] * (order - len(rows))
        sources.append(np.stack(rows, axis=-1))
        targets.append(grid[0] + np.int32(target))
        weights.append(weight.reshape(-1))
    edges = Edges(
        np.concatenate(sources),
        np.concatenate(targets),
        jnp.concatenate(weights),
        features,
        outputs,
    )
    edges.check()
    return edges


def edge_sum(x: Float[Array, "B N"], edges: Edges) -> Float[Array, "B M"]:
    """Compute `y[t] = sum over edges to t of weight * product of x[sources]`.

    It is a gather and a segment_sum. A source outside of the features gives NaN, so that wrong
    input does not look like right input.

    Raises:
      InputError: x has another number of features than the edges.
    """
    if x.shape[1] != edges.features:
        raise InputError(
            f"edge_sum: x {x.shape} has {x.shape[1]} features; the edges have {edges.features}"
        )
    known = jnp.concatenate([x, jnp.ones((x.shape[0], 1), x.dtype)], axis=1)
    carried = on_last(edges.weights, 2)
    for i in range(edges.sources.shape[1]):
        carried = carried * known.at[:, edges.sources[:, i]].get(mode="fill", fill_value=jnp.nan)
    return jax.ops.segment_sum(carried.T, edges.targets, edges.outputs).T
