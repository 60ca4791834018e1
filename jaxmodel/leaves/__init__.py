"""Compressed leaves: pytrees that take the place of an array in a parameter tree.

- `QTensor` holds codes of 1 to 8 bits with scales.
- `Sparse` holds a bitmask and the values that it keeps; the values may be a `QTensor`.
- `BlockSparse` holds whole blocks and is multiplied without being decoded.
- `Codebook` holds codes that point into a table of values.
- `RowPacked` holds codes of 1, 2 or 4 bits in the layout in which they run.
- `Turned` is a leaf of any kind whose input is scaled or rotated.
- `Adapted` is a leaf of any kind with a low-rank adapter beside it.

Every leaf works under jit, scans over its leading layer axis, shards, and is stored by name.
`static_fields` and `check_fields` protect a checkpoint that stores arrays alone.
"""

from jaxmodel import moved
from jaxmodel.leaves.adapted import Adapted
from jaxmodel.leaves.block_sparse import BlockSparse, largest_blocks
from jaxmodel.leaves.codebook import Codebook
from jaxmodel.leaves.leaf import Compressed, decode
from jaxmodel.leaves.qtensor import QTensor
from jaxmodel.leaves.row_packed import RowPacked
from jaxmodel.leaves.sparse import Sparse
from jaxmodel.leaves.turned import Turned

__all__ = [
    "Adapted",
    "BlockSparse",
    "Codebook",
    "Compressed",
    "QTensor",
    "RowPacked",
    "Sparse",
    "Turned",
    "decode",
    "largest_blocks",
]

moved.attach(__name__)
