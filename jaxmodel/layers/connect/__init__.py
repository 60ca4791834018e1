"""Connection patterns: which inputs meet which outputs, and in what order.

Each is a Linen module whose method `edges(params, ...)` gives the same connections as a list for
`ops.edges.edge_sum`. Inputs of several branches are dicts, branch -> `[B, N]`, and so are results
of several groups. Where they stand behind each other, in a list of edges as in `merged`, they do in
the order of their names, whatever the order of the dict: `jax.jit` would sort it anyway.

| wanted | layer |
|---|---|
| all inputs meet all outputs | `Full` |
| products of two inputs | `Bilinear`; of low rank and for any number of branches `Factorised` |
| each branch meets a group of outputs of its own before they are merged | `Groups` with one edge for each branch |
| a given pattern between groups of inputs and of outputs, which may interact by products | `Groups`, `combine="product"` |
| edges that share a weight by a rule; a factor of each edge that is learnt and reported | `Groups`, `share`, `importance` |
| one extractor for several inputs, merged for one head | `Shared`, `merged` |
| some blocks only, fixed or learnt | `BlockLinear` |
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
