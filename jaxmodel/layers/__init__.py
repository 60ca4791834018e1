"""Linen blocks made of ops, shared by the models."""

from jaxmodel.layers import codes, connect
from jaxmodel.layers.attention import Attention
from jaxmodel.layers.batch_norm import BatchNorm, GroupNorm, fold_batch_norm
from jaxmodel.layers.conv import activation, conv, dense
from jaxmodel.layers.cross import CrossAttention
from jaxmodel.layers.dropout import dropout
from jaxmodel.layers.encoder import ACTIVATIONS, BLOCK_AXES, AttentionPool, EncoderBlock, PooledHead
from jaxmodel.layers.fuse import fuse, unfuse
from jaxmodel.layers.leaf import leaf
from jaxmodel.layers.linear import linear
from jaxmodel.layers.mlp import MLP
from jaxmodel.layers.moe import MoE, load_balance, real_tokens
from jaxmodel.layers.norm import LayerNorm, RMSNorm
from jaxmodel.layers.patches import Patches
from jaxmodel.layers.recurrent import Additive, Multiplicative, Recurrent
from jaxmodel.layers.repeat import init_layers, repeat
from jaxmodel.layers.stochastic_depth import stochastic_depth

__all__ = [
    "ACTIVATIONS",
    "BLOCK_AXES",
    "MLP",
    "Additive",
    "Attention",
    "AttentionPool",
    "BatchNorm",
    "CrossAttention",
    "EncoderBlock",
    "GroupNorm",
    "LayerNorm",
    "MoE",
    "Multiplicative",
    "Patches",
    "PooledHead",
    "RMSNorm",
    "Recurrent",
    "activation",
    "codes",
    "connect",
    "conv",
    "dense",
    "dropout",
    "fold_batch_norm",
    "fuse",
    "init_layers",
    "leaf",
    "linear",
    "load_balance",
    "real_tokens",
    "repeat",
    "stochastic_depth",
    "unfuse",
]
