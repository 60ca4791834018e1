"""Operations of the models on arrays: contractions, lookups, convolutions, attention and norms.

Every model goes through these functions, so a new kind of leaf or a dtype policy is added only
here.
"""

from jaxmodel import moved
from jaxmodel.ops.attention import attention
from jaxmodel.ops.cache import KVCache
from jaxmodel.ops.contract import block_sparse_matmul, conv, einsum, embed
from jaxmodel.ops.norms import batch_norm, group_norm, layer_norm, rms_norm
from jaxmodel.ops.policy import MESH_AXES, Policy
from jaxmodel.ops.pool import avg_pool, max_pool
from jaxmodel.ops.probe import STATISTICS, Probe
from jaxmodel.ops.product import product
from jaxmodel.ops.ragged import ragged
from jaxmodel.ops.recurrent import recurrent_step
from jaxmodel.ops.rope import RopeScaling, rope_tables, rotate
from jaxmodel.ops.seen import AttentionMask

__all__ = [
    "MESH_AXES",
    "STATISTICS",
    "AttentionMask",
    "KVCache",
    "Policy",
    "Probe",
    "RopeScaling",
    "attention",
    "avg_pool",
    "batch_norm",
    "block_sparse_matmul",
    "conv",
    "einsum",
    "embed",
    "group_norm",
    "layer_norm",
    "max_pool",
    "product",
    "ragged",
    "recurrent_step",
    "rms_norm",
    "rope_tables",
    "rotate",
]

moved.attach(__name__)
