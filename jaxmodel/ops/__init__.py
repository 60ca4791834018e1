"""Arrays in, arrays out: every contraction, gather, convolution, attention and norm of the models goes through here."""

from jaxmodel.ops.attention import attention
from jaxmodel.ops.cache import KVCache
from jaxmodel.ops.contract import conv, einsum, round_rows, take
from jaxmodel.ops.norms import layer_norm, on_last, rms_norm
from jaxmodel.ops.policy import MESH_AXES, Policy
from jaxmodel.ops.probe import STATISTICS, Probe, histogram, tap, zeros_for
from jaxmodel.ops.ragged import ragged
from jaxmodel.ops.rope import RopeScaling, rope_tables, rotate
from jaxmodel.ops.seen import Seen

__all__ = [
    "MESH_AXES",
    "STATISTICS",
    "KVCache",
    "Policy",
    "Probe",
    "RopeScaling",
    "Seen",
    "attention",
    "conv",
    "einsum",
    "histogram",
    "layer_norm",
    "on_last",
    "ragged",
    "rms_norm",
    "rope_tables",
    "rotate",
    "round_rows",
    "take",
    "tap",
    "zeros_for",
]
