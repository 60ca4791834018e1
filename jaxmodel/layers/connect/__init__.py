"""Connection patterns: which inputs are connected to which outputs, and in what order.

Each is a Linen module whose method `edges(params, ...)` returns the same connections as a list for
`ops.edges.edge_sum`. Inputs of several branches are dicts, branch -> `[B, N]`, and so are outputs
of several groups. Where they are concatenated (in a list of edges, and by `merged`), the order is
that of their names, whatever the order of the dict: `jax.jit` would sort it anyway.

| wanted | layer |
|---|---|
| all inputs to all outputs | `Full` |
| products of two inputs | `Bilinear` |
| products of low rank, for any number of branches | `Factorised` |
| each branch to its own group of outputs, before they are merged | `Groups`, an edge per branch |
| a given pattern between groups of inputs and of outputs | `Groups` |
| the same, where the inputs of a group interact by products | `Groups`, `combine="product"` |
| edges that share a weight by a rule | `Groups`, `share` |
| a learnt and reported factor of each edge | `Groups`, `importance` |
| one extractor for several inputs, merged for one head | `Shared`, `merged` |
| only some blocks, fixed or learnt | `BlockLinear` |
"""

from jaxmodel import moved
from jaxmodel.layers.connect.full import Full
from jaxmodel.layers.connect.groups import Groups
from jaxmodel.layers.connect.products import Bilinear, Factorised
from jaxmodel.layers.connect.shared import Shared, merged
from jaxmodel.layers.connect.sparse import BlockLinear, settle_blocks

__all__ = [
    "Bilinear",
    "BlockLinear",
    "Factorised",
    "Full",
    "Groups",
    "Shared",
    "merged",
    "settle_blocks",
]

moved.attach(__name__)
