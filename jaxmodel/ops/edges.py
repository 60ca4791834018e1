"""A connection pattern as a list of edges: gather, multiply, sum by target.

Whatever a layer computes by matrices of second order or less, it also is a list of edges, each of
which carries the product of its sources, times a weight, to its target. That form is slow and says
exactly what is connected: the layers of `jaxmodel.layers.connect` give theirs, and equal it.
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
    """A pytree.

    Attributes:
      sources: int32 `[E, order]`, the features whose product each edge carries. The number of
        features, N, stands for a constant one: for a bias, and for edges of a lower order than
        others.
      targets: int32 `[E]`.
      weights: `[E]`, of which several may be one and the same parameter.
      features: N.
      outputs: M.
    """

    sources: Any
    targets: Any
    weights: Any
    features: int = static()
    outputs: int = static()

    def check(self) -> None:
        """Raise InputError where an edge begins or ends outside of the features or outputs (not for
        use under jit).
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
    """All edges between some runs of features and a run of outputs.

    Attributes:
      weight: `[O, I, J, ...]`: output, then a feature of each run; `[O]` alone is a bias.
      sources: the first feature of each run.
      target: the first output.
    """

    weight: Array
    sources: tuple[int, ...] = ()
    target: int = 0


def edges_of(blocks: Iterable[EdgeBlock], features: int, outputs: int) -> Edges:
    """The list of all edges of some blocks.

    >>> edges = edges_of([EdgeBlock(jnp.ones((1, 2)), (0,)), EdgeBlock(jnp.ones(1))], features=2, outputs=1)
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
    """`y[t] = sum over edges to t of weight * product of x[sources]`: gather and segment_sum.

    A source outside of the features gives NaN: wrong input must not look like right input.

    Raises:
      InputError: another number of features than the edges are of.
    """
    if x.shape[1] != edges.features:
        raise InputError(
            f"edge_sum: x {x.shape} has {x.shape[1]} features; the edges are of {edges.features}"
        )
    known = jnp.concatenate([x, jnp.ones((x.shape[0], 1), x.dtype)], axis=1)
    carried = on_last(edges.weights, 2)
    for i in range(edges.sources.shape[1]):
        carried = carried * known.at[:, edges.sources[:, i]].get(mode="fill", fill_value=jnp.nan)
    return jax.ops.segment_sum(carried.T, edges.targets, edges.outputs).T
