"""Connection patterns: which inputs meet which outputs, and in what order.

Each is a Linen module whose method `edges(params, ...)` gives the same connections as a list for `ops.edge_sum`. Inputs of
several branches are dicts, branch -> `[B, N]`; in the list their features stand behind each other in the dict's order.
"""

from jaxmodel.layers.connect.full import Full
from jaxmodel.layers.connect.groups import Groups, edge_name, importances, weight_names
from jaxmodel.layers.connect.products import Bilinear, Factorised
from jaxmodel.layers.connect.shared import Shared, merged
from jaxmodel.layers.connect.sparse import BlockLinear, block_columns, settle_blocks

__all__ = [
    "Bilinear",
    "BlockLinear",
    "Factorised",
    "Full",
    "Groups",
    "Shared",
    "block_columns",
    "edge_name",
    "importances",
    "merged",
    "settle_blocks",
    "weight_names",
]
