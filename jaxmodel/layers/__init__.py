"""Linen blocks made of ops, shared by the models."""

from jaxmodel.layers.attention import Attention
from jaxmodel.layers.fuse import fuse, unfuse
from jaxmodel.layers.leaf import leaf
from jaxmodel.layers.linear import linear
from jaxmodel.layers.mlp import MLP
from jaxmodel.layers.moe import MoE, load_balance
from jaxmodel.layers.norm import LayerNorm, RMSNorm
from jaxmodel.layers.repeat import init_layers, repeat

__all__ = [
    "MLP",
    "Attention",
    "LayerNorm",
    "MoE",
    "RMSNorm",
    "fuse",
    "init_layers",
    "leaf",
    "linear",
    "load_balance",
    "repeat",
    "unfuse",
]
