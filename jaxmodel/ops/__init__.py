"""Arrays in, arrays out: every contraction, gather, convolution, attention and norm of the models goes through here."""

from jaxmodel.ops.attention import attention
from jaxmodel.ops.cache import KVCache
from jaxmodel.ops.contract import blocks, conv, einsum, round_rows, take
from jaxmodel.ops.edges import EdgeBlock, Edges, edge_sum, edges_of
from jaxmodel.ops.memory import MemoryCache
from jaxmodel.ops.norms import Measured, batch_norm, group_norm, layer_norm, on_last, rms_norm
from jaxmodel.ops.policy import MESH_AXES, Policy
from jaxmodel.ops.pool import avg_pool, max_pool
from jaxmodel.ops.probe import GRADIENT, STATISTICS, Probe, histogram, tap, zeros_for
from jaxmodel.ops.product import compiler_options, product
from jaxmodel.ops.ragged import ragged
from jaxmodel.ops.recurrent import StateCache, recurrent_step
from jaxmodel.ops.rope import RopeScaling, rope_frequencies, rope_tables, rotate
from jaxmodel.ops.seen import Seen

__all__ = [
    "GRADIENT",
    "MESH_AXES",
    "STATISTICS",
    "EdgeBlock",
    "Edges",
    "KVCache",
    "Measured",
    "MemoryCache",
    "Policy",
    "Probe",
    "RopeScaling",
    "Seen",
    "StateCache",
    "attention",
    "avg_pool",
    "batch_norm",
    "blocks",
    "compiler_options",
    "conv",
    "edge_sum",
    "edges_of",
    "einsum",
    "group_norm",
    "histogram",
    "layer_norm",
    "max_pool",
    "on_last",
    "product",
    "ragged",
    "recurrent_step",
    "rms_norm",
    "rope_frequencies",
    "rope_tables",
    "rotate",
    "round_rows",
    "take",
    "tap",
    "zeros_for",
]
